"""The packing of documents and, where PyTorch is there, a short training run on the CPU.

    python3 training_test.py [directory of libtandem.so]
"""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import documents

LIBRARIES = None


class PackingTest(unittest.TestCase):
    ROWS, ROW_LENGTH = 4, 384

    def setUp(self):
        self.documents = documents.read_documents(self.ROW_LENGTH)

    def batches(self, count, seed=1):
        return list(itertools.islice(documents.batches(self.documents, self.ROWS, self.ROW_LENGTH, seed), count))

    def test_documents_are_real_text(self):
        self.assertGreater(sum(map(len, self.documents)), 50_000)
        self.assertTrue(all(1 < len(document) <= self.ROW_LENGTH for document in self.documents))

    def test_pieces_segments_and_targets_say_the_same(self):
        for batch in self.batches(5):
            tokens = self.ROWS * self.ROW_LENGTH
            for values in (batch.tokens, batch.targets, batch.positions, batch.segments):
                self.assertEqual(len(values), tokens)
            self.assertEqual((batch.starts[0], batch.starts[-1]), (0, tokens))
            self.assertEqual(len(batch.lengths), len(batch.starts) - 1)
            for begin, end, length in zip(batch.starts, batch.starts[1:], batch.lengths):
                self.assertIn(length, (0, end - begin))
                self.assertEqual(begin // self.ROW_LENGTH, (end - 1) // self.ROW_LENGTH)
                self.assertEqual(len(set(batch.segments[begin:end])), 1)
                if length:
                    self.assertIn(bytes(batch.tokens[begin:end]), self.documents)
                    self.assertEqual(batch.targets[begin:end], [*batch.tokens[begin + 1:end], documents.IGNORED])
                    self.assertEqual(batch.positions[begin:end], list(range(length)))
                else:
                    self.assertEqual(set(batch.segments[begin:end]), {documents.PADDING})
                    self.assertEqual(set(batch.targets[begin:end]), {documents.IGNORED})
            self.assertEqual(set(batch.segments[-self.ROW_LENGTH:]), {documents.PADDING})

    def test_an_epoch_has_every_document_once(self):
        seen = []
        for batch in self.batches(len(self.documents)):
            seen += [bytes(batch.tokens[begin:begin + length])
                     for begin, length in zip(batch.starts, batch.lengths) if length]
            if len(seen) >= len(self.documents):
                break
        self.assertEqual(sorted(seen[:len(self.documents)]), sorted(self.documents))

    def test_seeds(self):
        self.assertEqual(self.batches(2), self.batches(2))
        self.assertNotEqual(self.batches(1), self.batches(1, seed=2))


class TrainTest(unittest.TestCase):
    def test_a_few_steps(self):
        if LIBRARIES is None or importlib.util.find_spec("torch") is None:
            self.skipTest("no PyTorch, or no directory of libtandem.so was given")
        program = pathlib.Path(__file__).with_name("train.py")
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "training.json")
            subprocess.run([sys.executable, str(program), "--library", os.path.join(LIBRARIES, "libtandem.so"),
                            "--devices", "cpu", "--steps", "6", "--json", path], check=True, stdout=subprocess.DEVNULL)
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
        self.assertEqual([result["case"] for result in report["results"]],
                         ["f32 math cpu", "f32 tandem cpu", "bf16 math cpu", "bf16 tandem cpu"])
        self.assertEqual(report["wrong"], [])


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith(("-", "Packing", "Train")):
        LIBRARIES = sys.argv.pop(1)
    unittest.main()
