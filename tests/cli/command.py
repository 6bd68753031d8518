"""What the tests of the tandem command share: running it, and arrays for it.

A test program's arguments: path/to/tandem [path/to/libdamage_results.so]
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import npy_files

TANDEM = sys.argv.pop(1)
# A library that changes results.
DAMAGE = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1].endswith(".so") else None


class CommandTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)

    def path(self, name):
        return self.dir / name

    def tandem(self, *arguments, code=0, env=None):
        environment = {**os.environ, **(env or {})}
        done = subprocess.run(
            [TANDEM, *map(str, arguments)], capture_output=True, text=True, timeout=300,
            env=environment, check=False,
        )  # fmt: skip
        self.assertEqual(done.returncode, code, f"{arguments}\n{done.stdout}\n{done.stderr}")
        if code in (2, 3):
            self.assertNotEqual(done.stderr.strip(), "")
        self.last_stderr = done.stderr
        return done.stdout

    def json(self, *arguments, code=0):
        return json.loads(self.tandem(*arguments, "--json", code=code))

    def qkv(self, q=(1, 2, 5, 8), kv=(1, 1, 7, 8), descr="<f4"):
        files = []
        for seed, (name, shape) in enumerate((("q", q), ("k", kv), ("v", kv))):
            files += [f"--{name}", npy_files.write_normal(self.path(f"{name}.npy"), shape, seed, descr)]
        return files

    def ints(self, name, shape, values, descr="<i4"):
        return npy_files.write(self.path(name), descr, shape, values)

    def ran(self, report):
        return [r for r in report["results"] if r["declined"] is None]
