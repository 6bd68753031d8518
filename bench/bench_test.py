"""The parts of the benchmarks that need no PyTorch: how work is counted, the tables, and the binding with the oracle.

    python3 bench_test.py [directory of libtandem.so and libtandem_bench.so]
"""

import array
import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import types
import unittest

import accuracy_cases
import accuracy_table
import cases
import machine
import table
import tandem_ctypes as tandem

LIBRARIES = None


class CaseTableTest(unittest.TestCase):
    def test_names_are_unique_and_say_what_the_case_is(self):
        for device in ("cpu", "cuda"):
            names = [case.name for case in cases.cases(device)]
            self.assertEqual(len(names), len(set(names)))
            for name in names:
                self.assertRegex(name, rf"^(forward|backward)/{device}/(f32|bf16|f16)/b\d+/h\d+/hk\d+/q\d+/k\d+/d\d+/[a-z_0-9]+$")
        self.assertIn("forward/cpu/bf16/b1/h8/hk8/q2048/k2048/d128/causal",
                      [case.name for case in cases.cases("cpu")])

    def test_groups_and_filters_choose(self):
        decode = cases.cases("cuda", groups=["decode"])
        self.assertEqual([(c.batch, c.kv_len) for c in decode], [(16, 8192), (1, 65536), (128, 2048)])
        chosen = cases.cases("cpu", filters=["bf16", "f32"])
        self.assertTrue(chosen and all("f16/" not in c.name or "bf16" in c.name for c in chosen))
        self.assertEqual(cases.cases("cpu", groups=["no such group"]), [])

    def visible(self, case):
        """By definition, pair by pair."""
        if case.document_mean:
            document = [n for n, length in enumerate(case.documents()) for _ in range(length)]
        pairs = 0
        for b in range(case.batch):
            for i in range(case.q_len):
                for j in range(case.kv_len):
                    sees = {"none": True, "causal": j <= i, "window": i - case.window <= j <= i,
                            "padded": case.mask == "padded" and j < case.kv_lengths()[b],
                            "prefix": j <= i or j < case.prefix,
                            "blocks": case.mask == "blocks" and j // cases.BLOCK in case.blocks[i // cases.BLOCK],
                            "packed": case.document_mean and document[i] == document[j],
                            "packed_causal": case.document_mean and document[i] == document[j] and j <= i}
                    sees["segments_causal"] = sees["packed_causal"]
                    pairs += bool(sees[case.mask])
        return pairs

    def test_pairs_are_the_visible_ones(self):
        small = cases.Case("", "cpu", "f32", 3, 2, 1, 50, 50, 8)
        for mask, more in (("none", {}), ("causal", {}), ("window", {"window": 7}), ("padded", {}),
                           ("packed", {"batch": 1, "document_mean": 8}),
                           ("packed_causal", {"batch": 1, "document_mean": 8}),
                           ("segments_causal", {"batch": 1, "document_mean": 8}), ("prefix", {"prefix": 9}),
                           ("blocks", {"batch": 1, "q_len": 1024, "kv_len": 1024})):
            case = dataclasses.replace(small, mask=mask, **more)
            self.assertEqual(case.pairs, self.visible(case), mask)
            self.assertEqual(case.flops, 4 * 2 * 8 * case.pairs)
        self.assertEqual(dataclasses.replace(small, mask="boolean").pairs, 3 * 50 * 50)

    def test_documents_fill_the_row_around_their_mean(self):
        for case in cases.cases("cpu") + cases.cases("cuda"):
            if case.is_packed:
                lengths = case.documents()
                self.assertEqual(sum(lengths), case.q_len)
                self.assertGreater(min(lengths), 0)
                self.assertLess(abs(sum(lengths) / len(lengths) - case.document_mean), 0.3 * case.document_mean)

    def test_decoding_goes_through_more_than_the_cache(self):
        for case in cases.cases("cpu", groups=["decode"]):
            self.assertGreaterEqual((case.rotated_copies(1 << 25) - 1) * case.kv_bytes, 4 << 25)
        self.assertEqual({case.rotated_copies(1 << 25) for case in cases.cases("cuda")}, {1})

    def test_bytes(self):
        case = cases.Case("", "cpu", "bf16", 2, 4, 2, 10, 20, 8, "bias")
        self.assertEqual(case.kv_bytes, 2 * 2 * 2 * 20 * 8 * 2)
        self.assertEqual(case.io_bytes, case.kv_bytes + 2 * 2 * 4 * 10 * 8 * 2 + 2 * 10 * 20 * 2)


def peers_report():
    def call(ms, **more):
        return {"median_ms": ms, "flops_per_second": 1e12 / ms, "kv_bytes_per_second": 1e9 / ms, "times_ms": [ms],
                "error_over_bound": 0.25, **more}
    ours = dict(kernel="flash_cpu.avx2.f32", workspace_bytes=2_000_000, mask_plan_bytes=500_000)
    entry = {"case": "forward/cpu/f32/b1/h8/hk8/q2048/k2048/d64/boolean", "group": "mask", "best_peer": "flash_cpu",
             "ratio_to_best_peer": 2.0, "ratio_to_own_dense": 0.95, "declined": {"FA2": "it takes no mask"},
             "calls": {"tandem": call(10, **ours), "tandem with preparation": call(11, **ours),
                       "tandem dense": call(9.5, **ours), "flash_cpu": call(20)}}
    other = {"case": "forward/cpu/f32/b1/h8/hk8/q2048/k2048/d64/bias", "group": "mask", "best_peer": "FA2",
             "ratio_to_best_peer": 1.0, "ratio_to_own_dense": None, "declined": {},
             "calls": {"tandem": call(10, **ours), "FA2": call(10)}}
    return {"format": 2, "device_type": "cpu", "device": "A CPU", "stamp": {"commit": "abc"},
            "machine": {"threads": 2, "affinity": [0, 1], "date": "today"}, "versions": {"torch": "2", "onnx": None},
            "ceilings": {"matmul f32, FLOP/s": {"median": 1.5e11},
                         "copy (read and written), bytes/s": {"median": 2e10}},
            "absent": {"FA3": "no wheel"}, "results": [entry, other], "failed": {}}


class TableTest(unittest.TestCase):
    def test_peers(self):
        text = table.report_text(peers_report())
        self.assertIn("matmul f32 150 GFLOP/s; copy (read and written) 20 GB/s", text)
        self.assertIn("Absent: FA3 (no wheel).", text)
        rows = [line for line in text.splitlines() if line.startswith("| f32/")]
        self.assertEqual(
            rows[0], "| f32/b1/h8/hk8/q2048/k2048/d64/boolean | flash_cpu.avx2.f32 | **100** | 0.95 | 90.9 | 50 "
            "| refused | 2.00 | 0.25 | 0.25 | 2.5 |")
        cells = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        self.assertEqual(len(set(cells)), 1, text)

    def test_numbers(self):
        for value, text in ((0.01234, "0.0123"), (1.5, "1.5"), (12.34, "12.3"), (1234.5, "1234"), (0, "0")):
            self.assertEqual(table.number(value), text)

    def test_accuracy(self):
        found = {"ours": False, "max_error": 2e-7, "error_over_bound": 0.5, "out_error_over_bound": 0.5,
                 "lse_error_over_bound": 0, "nonfinite_mismatches": 0, "empty_row_mismatches": 0,
                 "largest_on_empty_rows": 0}
        ours = {**found, "ours": True, "lse_error_over_bound": 0.1, "max_error": 3e-7}
        regular = [{"series": series, "label": "1", "dtype": "f32", "mask": "none",
                    "results": {"math": found, "kernel": ours}, "declined": {}} for series in accuracy_table.SERIES]
        hostile = {"series": "hostile", "label": "NaN in masked V", "dtype": "f32", "mask": "", "declined": {},
                   "results": {"kernel": ours, "math": {**found, "nonfinite_mismatches": 3},
                               "other": {**found, "empty_row_mismatches": 2, "largest_on_empty_rows": 0.71}}}
        rows = accuracy_table.bounds_table(regular, "f32")
        self.assertEqual(rows[2], ["`kernel`", "0.5", "0.5", "0.5", "0.5", "0.1", "1.5"])
        rows = accuracy_table.hostile_table(regular + [hostile])
        self.assertEqual(rows[2], ["NaN in masked V", "0.5", "**leaks**", "**0.71 in empty rows**"])
        self.assertEqual(accuracy_table.figure(1.25), "**1.2**")

    def test_accuracy_cases_are_unique(self):
        labels = [(case.series, case.label) for case in accuracy_cases.cases("f32")]
        self.assertEqual(len(labels), len(set(labels)))
        self.assertEqual({series for series, _ in labels}, {*accuracy_table.SERIES, "hostile"})


class MachineTest(unittest.TestCase):
    def test_stamp(self):
        with tempfile.NamedTemporaryFile("w", suffix=".stamp") as file:
            file.write("commit=123+changes\ncpu_sources=abc\n")
            file.flush()
            self.assertEqual(machine.stamp(file.name), {"commit": "123+changes", "cpu_sources": "abc"})
        self.assertRegex(machine.stamp()["cpu_sources"], "^[0-9a-f]{16}$")

    def test_results_are_json_with_a_line_for_each(self):
        report = {"format": 2, "results": [{"case": "a", "times_ms": [1.23456789, 2]}, {"case": "b"}], "failed": {}}
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "result.json")
            machine.write_json(report, path)
            with open(path, encoding="utf-8") as file:
                text = file.read()
        self.assertEqual(json.loads(text), {**report, "results": [{"case": "a", "times_ms": [1.23457, 2]},
                                                                  {"case": "b"}]})
        self.assertEqual(len(text.splitlines()), 8)

    def test_last_level_cache(self):
        self.assertGreater(machine.last_level_cache_bytes(), 0)


class FakeTensor:
    """As much of a PyTorch tensor on the CPU as the binding looks at."""

    CODES = {"float32": "f", "uint8": "B", "bool": "B", "int32": "i"}
    is_cuda = False
    device = types.SimpleNamespace(index=None)

    def __init__(self, *shape, dtype="float32", make=lambda: 0, **_):
        self.shape, self.dtype = shape, dtype
        self.size = 1
        for extent in shape:
            self.size *= extent
        self.values = array.array(self.CODES[dtype], (make() for _ in range(self.size)))

    def dim(self):
        return len(self.shape)

    def data_ptr(self):
        return self.values.buffer_info()[0]

    def stride(self, axis):
        stride = 1
        for extent in self.shape[axis + 1:]:
            stride *= extent
        return stride

    def as_batch(self):
        """[T, H, D] as [1, H, T, D]."""
        rows, heads, dim = self.shape
        batch = FakeTensor(1, heads, rows, dim)
        for row, values in enumerate(self.rows()):
            for head in range(heads):
                at = (head * rows + row) * dim
                batch.values[at:at + dim] = array.array("f", values[head * dim:(head + 1) * dim])
        return batch

    def rows(self):
        """A list for each row of [T, H, D] or [1, H, T, D]: all heads' numbers."""
        heads, dim = self.shape[-2 if self.dim() == 3 else 1], self.shape[-1]
        rows = self.size // heads // dim
        start = lambda row, head: (row * heads + head if self.dim() == 3 else head * rows + row) * dim
        return [[x for head in range(heads) for x in self.values[start(row, head):start(row, head) + dim]]
                for row in range(rows)]


class BindingTest(unittest.TestCase):
    torch = types.SimpleNamespace(empty=FakeTensor, uint8="uint8", float32="float32",
                                  empty_like=lambda tensor: FakeTensor(*tensor.shape))

    def setUp(self):
        if LIBRARIES is None:
            self.skipTest("no directory of the libraries was given")
        self.library = tandem.Library(os.path.join(LIBRARIES, "libtandem.so"))
        self.support = tandem.Support(os.path.join(LIBRARIES, "libtandem_bench.so"))
        source = random.Random(1)
        self.tensors = [FakeTensor(1, 2, 40, 16, make=lambda: source.gauss(0, 1)) for _ in range(3)]
        self.mask = FakeTensor(1, 1, 40, 40, dtype="bool", make=lambda: source.random() < 0.5)

    def judge(self, attention, terms):
        description = tandem.Description(*self.tensors, attention.out, attention.lse, terms)
        return self.support.judge(description, False)

    def test_answers_are_judged(self):
        lengths = FakeTensor(1, dtype="int32", make=lambda: 17)
        for terms in ([], [("causal", tandem.TOP_LEFT)], [("window", 5, 0, tandem.BOTTOM_RIGHT)],
                      [("kv_lengths", lengths)], [("dense", self.mask)]):
            for prepared in (False, bool(terms)):
                attention = tandem.Attention(self.library, self.torch, *self.tensors, terms, prepared=prepared)
                attention()
                judgement = self.judge(attention, terms)
                self.assertLessEqual(judgement["error_over_bound"], 1, terms)
                self.assertEqual((judgement["rows"], judgement["rows_compared"]), (80, 80))
                self.assertEqual(judgement["nonfinite_mismatches"] + judgement["empty_row_mismatches"], 0)
        attention.out.values[3] += 1
        self.assertGreater(self.judge(attention, terms)["error_over_bound"], 1)

    def test_visible_pairs(self):
        description = tandem.Description(*self.tensors, self.tensors[0], terms=[("dense", self.mask)])
        self.assertEqual(self.support.visible_pairs(description), 2 * sum(self.mask.values))

    def test_packed(self):
        q, k, v = (FakeTensor(40, 2, 16, make=random.random) for _ in range(3))
        starts = FakeTensor(3, dtype="int32")
        starts.values[1], starts.values[2] = 15, 40
        terms = [("packed", starts, 0), ("causal", tandem.TOP_LEFT)]
        attention = tandem.Attention(self.library, self.torch, q, k, v, terms)
        attention()
        description = tandem.Description(q, k, v, attention.out, attention.lse, terms)
        self.assertLessEqual(self.support.judge(description, False)["error_over_bound"], 1)
        self.assertEqual(self.support.visible_pairs(description), 2 * (15 * 16 // 2 + 25 * 26 // 2))

    def test_a_mask_told_in_three_ways_has_the_same_gradients(self):
        """Documents of 15 and 17 tokens and 8 of padding, as examples/training has them."""
        identity = [0] * 15 + [1] * 17 + [-1] * 8
        q, k, v, dout = (FakeTensor(40, 2, 16, make=random.random) for _ in range(4))
        starts, lengths, segments = (FakeTensor(*extents, dtype="int32") for extents in ((4,), (3,), (1, 40)))
        starts.values[:], lengths.values[:] = array.array("i", (0, 15, 32, 40)), array.array("i", (15, 17, 0))
        segments.values[:] = array.array("i", identity)
        mask = FakeTensor(1, 1, 40, 40, dtype="bool")
        mask.values[:] = array.array("B", (i >= j and identity[i] == identity[j] >= 0
                                           for i in range(40) for j in range(40)))
        causal, answers = ("causal", tandem.TOP_LEFT), []
        for terms in ([("packed", starts, 0), ("lengths", lengths), causal],
                      [("segments", segments), causal], [("dense", mask)]):
            tensors = (q, k, v, dout)
            if terms[0][0] != "packed":
                tensors = [tensor.as_batch() for tensor in tensors]
            forward = tandem.Attention(self.library, self.torch, *tensors[:3], terms)
            forward()
            backward = tandem.BackwardAttention(forward, *tensors)
            backward()
            answers.append([tensor.rows() for tensor in (forward.out, backward.dq, backward.dk, backward.dv)])
        for answer in answers:
            for tensor, first in zip(answer, answers[0]):
                self.assertEqual(tensor[32:], [[0] * 32] * 8)
                self.assertTrue(any(any(row) for row in tensor[:32]))
                for row, other in zip(tensor, first):
                    for a, b in zip(row, other):
                        self.assertAlmostEqual(a, b, delta=1e-5)

    def test_other_keys(self):
        attention = tandem.Attention(self.library, self.torch, *self.tensors)
        attention()
        before = list(attention.out.values)
        attention.set_kv(self.tensors[1], self.tensors[0])
        attention()
        self.assertNotEqual(before, list(attention.out.values))
        attention.set_kv(self.tensors[1], self.tensors[2])
        attention()
        self.assertEqual(before, list(attention.out.values))

    def test_errors_are_the_librarys_sentences(self):
        with self.assertRaisesRegex(RuntimeError, "no such kernel"):
            tandem.Attention(self.library, self.torch, *self.tensors, kernel="no such kernel")

    def test_ceilings(self):
        flops = self.support.ceiling("fma_flops", 1, 0.01)
        if flops is not None:
            self.assertTrue(1e9 < flops < 1e12, flops)
        self.assertTrue(1e8 < self.support.ceiling("read_bytes", 1, 0.01) < 1e12)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not re.match("-|[A-Z]", sys.argv[1]):
        LIBRARIES = sys.argv.pop(1)
    unittest.main()
