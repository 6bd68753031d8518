"""What the tandem command does with bad input: exit code 2, a reason, and no file left. Arguments as in command.py."""

import os
import subprocess
import unittest

import npy_files
from command import TANDEM, CommandTest


class BadInput(CommandTest):
    def refuse(self, *arguments, says=""):
        self.tandem("run", *arguments, "--out", self.path("o.npy"), "--lse", self.path("l.npy"), code=2)
        self.assertIn(says, self.last_stderr)
        left = {p.name for p in self.dir.iterdir()} - self.inputs
        self.assertEqual(left, set())

    def setUp(self):
        super().setUp()
        self.files = self.qkv()
        self.inputs = {p.name for p in self.dir.iterdir()}

    def file(self, data):
        self.inputs.add("bad.npy")
        self.path("bad.npy").write_bytes(data)
        return self.path("bad.npy")

    def test_hostile_files(self):
        good = npy_files.encode("<f4", (1, 2, 5, 8), [0.0] * 80)
        cases = {
            "not a .npy": b"hello",
            "truncated": good[:-1],
            "follow its data": good + b"\0",
            "ends inside its header": good[:40],
            "big-endian": npy_files.encode(">f4", (1, 2, 5, 8), bytes(320)),
            "Fortran": npy_files.encode("<f4", (1, 2, 5, 8), bytes(320), fortran=True),
            "Python objects": npy_files.encode("|O", (1, 2, 5, 8), bytes(320)),
            "dtype is '<c8'": npy_files.encode("<c8", (1, 2, 5, 8), bytes(640)),
            "more elements": npy_files.encode("<f4", (2**62, 2**62, 0, 1), b""),
            "needs 4398046511104 bytes": npy_files.encode("<f4", (1, 2**40), b""),
            "beyond 64 bits": npy_files.encode("<f4", (2**70,), b""),
            "negative": npy_files.encode("<f4", (1, -2, 5, 8), bytes(320)),
            "more than 5 dimensions": npy_files.encode("<f4", (1,) * 6, bytes(4)),
            "records": good.replace(b"'<f4'", b"[('a','f4')]").replace(b" " * 7, b"", 1),
            "format version": good[:6] + b"\x09\x00" + good[8:],
            ".npz": b"PK\x03\x04" + bytes(60),
        }
        for says, data in cases.items():
            with self.subTest(says):
                self.refuse("--q", self.file(data), *self.files[2:], says=says)

    def test_places_that_are_no_files(self):
        os.mkfifo(self.path("pipe"))
        self.inputs.add("pipe")
        for path in (self.path("absent.npy"), self.dir, self.path("pipe"), "/dev/zero"):
            self.refuse("--q", path, *self.files[2:])
        self.tandem("run", *self.files, "--out", self.dir / "absent" / "o.npy", code=2)
        self.tandem("run", *self.files, "--out", "/dev/null", code=2)

    def test_a_refused_run_keeps_the_old_output(self):
        self.inputs.add("o.npy")
        self.path("o.npy").write_bytes(b"old")
        self.refuse(*self.files[:2], *self.files[:2], *self.files[4:])
        self.assertEqual(self.path("o.npy").read_bytes(), b"old")

    def test_a_full_stdout_leaves_no_output(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [TANDEM, "run", *map(str, self.files), "--out", str(self.path("o.npy"))],
                stdout=full, stderr=subprocess.PIPE, timeout=60, check=False,
            )  # fmt: skip
        self.assertEqual(done.returncode, 2)
        self.assertFalse(self.path("o.npy").exists())

    def test_arrays_that_do_not_fit(self):
        mask = npy_files.encode("|b1", (3, 7), [1] * 21)
        self.refuse(*self.files, "--mask", self.file(mask), says="mask")
        self.refuse(*self.files, "--mask", self.path("q.npy"), says="float32")
        for values in ([0, 5, 9], [3, 2, 5], [-1, 2, 5], [0, 2**62, 5]):
            cu = self.file(npy_files.encode("<i8", (3,), values))
            self.inputs |= {"q3.npy", "k3.npy"}
            q = npy_files.write_normal(self.path("q3.npy"), (5, 2, 8), 1)
            k = npy_files.write_normal(self.path("k3.npy"), (5, 1, 8), 1)
            self.refuse("--q", q, "--k", k, "--v", k, "--cu-seqlens-q", cu, "--cu-seqlens-k", cu,
                        says="cu_seqlens")  # fmt: skip
        wide = self.file(npy_files.encode("<i8", (1,), [2**40]))
        self.refuse(*self.files, "--kv-lengths", wide, says="32 bits")
        long = self.file(npy_files.encode("<i4", (1,), [8]))
        self.refuse(*self.files, "--kv-lengths", long, says="lengths")
        blocks = self.file(npy_files.encode("|b1", (1, 1, 2, 2), [1] * 4))
        self.refuse(*self.files, "--blocks", blocks, "--block-size", "4,2", says="[B or 1, H or 1, 2, 4]")

    def test_usage(self):
        cases = [
            ["--shape", "1,1,1,4,4"],
            ["--shape", "1,1,1,4,-4,8"],
            ["--shape", "1,1,1,4,x,8"],
            ["--shape", "1,1,1,9999999999,9999999999,9999999999"],
            ["--shape", "1,3,2,4,4,8"],
            ["--shape", "1,1,1,4,4,8", "--dtype", "f8"],
            ["--shape", "1,1,1,4,4,8", "--device", "tpu"],
            ["--shape", "1,1,1,4,4,8", "--layout", "sbhd"],
            ["--shape", "1,1,1,4,4,8", "--causal", "left"],
            ["--shape", "1,1,1,4,4,8", "--window", "3,0"],
            ["--shape", "1,1,1,4,4,8", "--window", "-2,0,top_left"],
            ["--shape", "1,1,1,4,4,8", "--window", "99999999999,0,top_left"],
            ["--shape", "1,1,1,4,4,8", "--scale", "nan"],
            ["--shape", "1,1,1,4,4,8", "--softcap", "-1"],
            ["--shape", "1,1,1,4,4,8", "--dropout", "1"],
            ["--shape", "1,1,1,4,4,8", "--alibi-align", "top_left"],
            ["--shape", "1,1,1,4,4,8", "--prefix", self.path("q.npy")],
            ["--shape", "1,1,1,4,4,8", "--blocks", self.path("q.npy")],
            ["--shape", "1,1,1,4,4,8", "--q-segments", self.path("q.npy")],
            ["--shape", "1,1,1,4,4,8", "--cu-seqlens-q", self.path("q.npy")],
            ["--shape", "1,1,1,4,4,8", "--repeat", "0"],
            ["--shape", "1,1,1,4,4,8", "--frobnicate"],
            [*self.files, "--shape", "1,1,1,4,4,8"],
            [*self.files, "--dtype", "f16"],
            self.files[:4],
        ]
        for arguments in cases:
            with self.subTest(arguments):
                self.refuse(*arguments)
        prefix = self.file(npy_files.encode("<i4", (1,), [1]))
        both = ["--causal", "top_left", "--window", "1,1,top_left"]
        self.refuse("--shape", "1,1,1,4,4,8", *both, "--prefix", prefix, says="--prefix")
        self.tandem(code=2)
        self.tandem("dance", code=2)
        self.tandem("run", *self.files, code=2)


if __name__ == "__main__":
    unittest.main()
