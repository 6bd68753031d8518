"""The tandem command: its answers, exit codes and JSON. Arguments as in command.py."""

import json
import math
import unittest
import xml.etree.ElementTree

import npy_files
from command import DAMAGE, CommandTest

RESULT_FIELDS = [
    "kernel", "pass", "device", "time_ms", "repeats", "tflops", "max_error", "error_over_bound",
    "empty_rows", "in_contract", "declined",
]  # fmt: skip


class InfoAndExplain(CommandTest):
    def test_info_lists_the_reference_last_of_the_cpu(self):
        info = self.json("info")
        cpu = [k["kernel"] for k in info["kernels"] if k["device"] == "cpu"]
        self.assertEqual(cpu[-1], "reference.cpu")
        self.assertIn("reference.cpu", self.tandem("info"))
        cuda_devices = [d for d in info["devices"] if d["device"] == "cuda"]
        self.assertEqual(not cuda_devices, "cuda" in info["unavailable"])

    def test_explain_gives_each_kernel_a_verdict(self):
        arguments = ["explain", "--q", "1,32,8192,128", "--kv", "1,8,8192,128", "--dtype", "bf16",
                     "--causal", "bottom_right"]  # fmt: skip
        self.assertIn("chosen", self.tandem(*arguments))
        report = self.json(*arguments, "--device", "cpu")
        self.assertEqual(report["problem"]["kv_heads"], 8)
        self.assertTrue(any(r["declined"] for r in report["results"]))

    def test_version_and_help(self):
        self.assertRegex(self.tandem("--version"), r"^\d+\.\d+\.\d+")
        self.assertIn("--causal", self.tandem("run", "--help"))


class Run(CommandTest):
    def test_uniform_weights_give_the_mean_of_v(self):
        q = npy_files.write(self.path("q.npy"), "<f4", (1, 1, 2, 1), [0, 0])
        k = npy_files.write(self.path("k.npy"), "<f4", (1, 1, 4, 1), [1, 2, 3, 4])
        v = npy_files.write(self.path("v.npy"), "<f4", (1, 1, 4, 1), [1, 2, 4, 8])
        mask = npy_files.write(self.path("m.npy"), "|b1", (2, 4), [0, 0, 1, 1, 0, 0, 0, 0])
        out, lse = self.path("o.npy"), self.path("l.npy")
        report = self.json("run", "--q", q, "--k", k, "--v", v, "--mask", mask, "--out", out, "--lse", lse)
        descr, shape, values = npy_files.read(out)
        self.assertEqual((descr, shape), ("<f4", (1, 1, 2, 1)))
        self.assertAlmostEqual(values[0], 6.0, places=5)
        self.assertEqual(math.copysign(1, values[1]), 1)
        self.assertEqual(values[1], 0)
        descr, shape, values = npy_files.read(lse)
        self.assertEqual((descr, shape), ("<f4", (1, 1, 2)))
        self.assertAlmostEqual(values[0], math.log(2), places=5)
        self.assertEqual(values[1], -math.inf)
        result = report["results"][0]
        self.assertEqual(list(result), RESULT_FIELDS)
        self.assertEqual(result["empty_rows"], 1)
        for field in ("max_error", "error_over_bound", "in_contract", "declined"):
            self.assertIsNone(result[field])
        self.assertEqual(report["problem"]["visible_pairs"], 2)

    def test_a_seed_fixes_the_data_and_the_output(self):
        arguments = ["run", "--shape", "1,2,1,9,9,16", "--dtype", "bf16", "--data-seed", 5]
        self.tandem(*arguments, "--out", self.path("a.npy"))
        self.tandem(*arguments, "--out", self.path("b.npy"), "--threads", 1)
        self.assertEqual(self.path("a.npy").read_bytes(), self.path("b.npy").read_bytes())
        self.assertEqual(npy_files.read(self.path("a.npy"))[0], "<u2")
        self.tandem(*arguments[:-1], 6, "--out", self.path("c.npy"))
        self.assertNotEqual(self.path("a.npy").read_bytes(), self.path("c.npy").read_bytes())

    def test_bshd_is_bhsd_transposed(self):
        bhsd = self.qkv((1, 2, 3, 4), (1, 2, 5, 4))
        self.tandem("run", *bhsd, "--causal", "bottom_right", "--out", self.path("o.npy"))
        expected = npy_files.read(self.path("o.npy"))[2]
        for name in ("q", "k", "v"):
            _, (b, h, s, d), values = npy_files.read(self.path(f"{name}.npy"))
            turned = [values[(n * s + i) * d + x] for i in range(s) for n in range(h) for x in range(d)]
            npy_files.write(self.path(f"{name}.npy"), "<f4", (b, s, h, d), turned)
        self.tandem("run", *bhsd, "--causal", "bottom_right", "--layout", "bshd",
                    "--out", self.path("t.npy"), "--lse", self.path("l.npy"))  # fmt: skip
        _, (_, s, h, d), values = npy_files.read(self.path("t.npy"))
        turned = [values[(i * h + n) * d + x] for n in range(h) for i in range(s) for x in range(d)]
        self.assertEqual(list(expected), turned)
        self.assertEqual(npy_files.read(self.path("l.npy"))[1], (1, 2, 3))

    def test_the_asked_for_kernel_and_device(self):
        arguments = ["run", "--shape", "1,1,1,4,4,8", "--out", self.path("o.npy")]
        report = self.json(*arguments, "--kernel", "reference.cpu", "--repeat", 3)
        self.assertEqual(report["results"][0]["kernel"], "reference.cpu")
        self.assertEqual(report["results"][0]["repeats"], 3)
        self.path("o.npy").unlink()
        self.tandem(*arguments, "--kernel", "reference.cpu", "--device", "cuda", code=3)
        self.tandem(*arguments, "--kernel", "no.such.kernel", code=3)
        if "cuda" in self.json("info")["unavailable"]:
            self.tandem(*arguments, "--device", "cuda", code=3)
            self.assertIn("cuda", self.last_stderr)
        self.assertFalse(self.path("o.npy").exists())

    def test_the_backward_pass_writes_what_is_asked_for(self):
        qkv = self.qkv((1, 2, 3, 4), (1, 1, 5, 4))
        dout = npy_files.write_normal(self.path("g.npy"), (1, 2, 3, 4), 9)
        out, dq, dv = self.path("o.npy"), self.path("dq.npy"), self.path("dv.npy")
        arguments = ["run", *qkv, "--causal", "bottom_right", "--out", out]
        report = self.json(*arguments, "--dout", dout, "--dq", dq, "--dv", dv)
        self.assertEqual([r["pass"] for r in report["results"]], ["forward", "backward"])
        self.assertEqual(npy_files.read(dq)[1], (1, 2, 3, 4))
        # Each row's weights sum to 1, so dV sums over the keys to the sum of dO.
        _, shape, values = npy_files.read(dv)
        self.assertEqual(shape, (1, 1, 5, 4))
        gradient = npy_files.read(dout)[2]
        for c in range(4):
            self.assertAlmostEqual(sum(values[c::4]), sum(gradient[c::4]), places=4)
        first = dq.read_bytes()
        self.tandem(*arguments, "--dout", dout, "--dq", dq, "--kernel", "reference.cpu")
        self.assertEqual(len(dq.read_bytes()), len(first))

    def test_the_backward_pass_needs_its_inputs(self):
        dout = npy_files.write_normal(self.path("g.npy"), (1, 2, 5, 8), 9)
        dq = self.path("dq.npy")
        arguments = ["run", *self.qkv(), "--out", self.path("o.npy")]
        self.tandem(*arguments, "--dq", dq, code=2)
        self.assertIn("--dout", self.last_stderr)
        self.tandem(*arguments, "--dout", dout, "--dbias", dq, code=2)
        self.assertIn("--bias", self.last_stderr)
        short = npy_files.write_normal(self.path("s.npy"), (1, 2, 4, 8), 9)
        self.tandem(*arguments, "--dout", short, "--dq", dq, code=2)
        self.assertIn("dout", self.last_stderr)
        self.assertFalse(self.path("o.npy").exists() or dq.exists())


class Compare(CommandTest):
    def check(self, *arguments):
        report = self.json("compare", *arguments, "--backward", "--repeat", 1)
        ran = self.ran(report)
        self.assertTrue(ran)
        for result in report["results"]:
            self.assertEqual(list(result), RESULT_FIELDS)
        for result in ran:
            self.assertTrue(result["in_contract"], result)
            self.assertLessEqual(result["error_over_bound"], 1)
            self.assertEqual(result["empty_rows"], ran[0]["empty_rows"])
        self.assertIn("reference.cpu", [r["kernel"] for r in ran])
        return report

    def test_terms_and_scores(self):
        shape = ["--shape", "2,4,2,70,90,24"]
        prefix = self.ints("prefix.npy", (2,), [3, 0], "<i8")
        q_lengths = self.ints("ql.npy", (2,), [70, 5])
        kv_lengths = self.ints("kl.npy", (2,), [0, 66])
        ranges = self.ints("r.npy", (1, 1, 70, 1, 2), [x for i in range(70) for x in (i // 2, i + 9)])
        segments_q = self.ints("sq.npy", (1, 70), [i // 30 for i in range(70)])
        segments_kv = self.ints("sk.npy", (1, 90), [j // 40 - (j > 85) * 9 for j in range(90)])
        blocks = npy_files.write(self.path("b.npy"), "|b1", (1, 4, 3, 2), [1, 0] * 12)
        bias = npy_files.write_normal(self.path("bias.npy"), (4, 70, 90), 4)
        bias = npy_files.write(self.path("bias.npy"), "<f4", (1, 4, 70, 90), npy_files.read(bias)[2])
        sink = npy_files.write_normal(self.path("sink.npy"), (4,), 5)
        alibi = npy_files.write(self.path("alibi.npy"), "<f4", (4,), [0.5, 0.25, 0.125, 0.0625])
        self.check(*shape, "--causal", "top_left", "--prefix", prefix)
        report = self.check(*shape, "--window", "-1,0,bottom_right", "--q-lengths", q_lengths,
                            "--kv-lengths", kv_lengths, "--dtype", "f16")  # fmt: skip
        self.assertEqual(report["results"][-1]["empty_rows"], 70 * 4 + 65 * 4)
        self.check(*shape, "--row-ranges", ranges, "--dtype", "bf16")
        self.check(*shape, "--q-segments", segments_q, "--kv-segments", segments_kv)
        self.check(*shape, "--blocks", blocks, "--block-size", "32,64", "--softcap", 5)
        self.check(*shape, "--bias", bias, "--sink", sink, "--scale", "-0.3")
        self.check(*shape, "--alibi", alibi, "--alibi-align", "bottom_right", "--dropout", 0.25,
                   "--dropout-seed", 7, "--layout", "bshd")  # fmt: skip

    def test_packed_sequences(self):
        cu_q = self.ints("cq.npy", (4,), [1, 6, 6, 18], "<i8")
        cu_k = self.ints("ck.npy", (4,), [0, 7, 9, 20], "<i8")
        arguments = [*self.qkv((20, 2, 8), (20, 1, 8)), "--cu-seqlens-q", cu_q, "--cu-seqlens-k", cu_k]
        report = self.check(*arguments, "--causal", "bottom_right")
        self.assertEqual(report["problem"]["layout"], "thd")
        self.assertEqual(report["problem"]["batch"], 3)
        self.tandem("run", *arguments, "--out", self.path("o.npy"), "--lse", self.path("l.npy"))
        _, shape, values = npy_files.read(self.path("o.npy"))
        self.assertEqual(shape, (20, 2, 8))
        self.assertEqual(set(values[:16]), {0.0})
        self.assertEqual(npy_files.read(self.path("l.npy"))[1], (2, 20))

    def test_nan_at_masked_places_is_nobodys(self):
        q, k, v = self.qkv((1, 1, 4, 4), (1, 1, 6, 4))[1::2]
        for file in (k, v):
            values = list(npy_files.read(file)[2])
            values[16:] = [math.nan] * 8
            npy_files.write(file, "<f4", (1, 1, 6, 4), values)
        files = ["--q", q, "--k", k, "--v", v]
        self.check(*files, "--kv-lengths", self.ints("n.npy", (1,), [4]))
        self.check(*files)  # where they are seen, every kernel shows them

    def test_sampled_rows_of_a_large_problem(self):
        report = self.check("--shape", "1,2,1,4500,4500,8", "--causal", "top_left", "--device", "cpu")
        self.assertEqual(report["problem"]["visible_pairs"], 2 * 4500 * 4501 // 2)

    def test_a_wrong_result_is_out_of_contract(self):
        if DAMAGE is None:
            self.skipTest("the library that changes results was not given")
        arguments = ["compare", "--shape", "1,2,1,5,5,8", "--device", "cpu"]
        preload = {"LD_PRELOAD": DAMAGE}
        text = self.tandem(*arguments, code=1, env=preload)
        self.assertIn("OUT OF CONTRACT", text)
        self.assertIn("head 0, row 0, out column 0", text)
        report = json.loads(self.tandem(*arguments, "--json", code=1, env=preload))
        for result in self.ran(report):
            self.assertIs(result["in_contract"], False)
            self.assertGreater(result["error_over_bound"], 1)
            self.assertAlmostEqual(result["max_error"], 0.125, places=5)

    def test_the_table_for_people(self):
        text = self.tandem("compare", "--shape", "1,2,1,5,5,8", "--dtype", "f16")
        for heading in ("kernel", "device", "time", "max error", "error/bound", "empty rows", "declined"):
            self.assertIn(heading, text)


class Mask(CommandTest):
    def test_a_causal_mask_in_characters(self):
        text = self.tandem("mask", "--q", "1,1,4,8", "--kv", "1,1,3,8", "--causal", "bottom_right", "--ascii")
        self.assertIn("......", text)
        self.assertIn("##....", text)
        self.assertIn("empty rows: 1 of 4 (0)", text)
        self.assertIn("visible pairs: 6 of 12, sparsity 50.00 %", text)
        self.assertIn("tiles of 64 x 64: 0 full, 1 partial, 0 empty", text)
        blocks = self.tandem("mask", "--shape", "1,1,1,4,4,8", env={"LC_ALL": "C.UTF-8"})
        self.assertIn("████████", blocks)

    def test_sizes_come_from_a_dense_mask(self):
        mask = npy_files.write(self.path("m.npy"), "|b1", (2, 1, 2, 3), [1, 0, 0, 0, 0, 0] * 2)
        self.assertIn("visible pairs: 1 of 6", self.tandem("mask", "--mask", mask, "--sequence", 1))
        self.tandem("mask", "--mask", mask, "--sequence", 2, code=2)

    def test_svg_and_png(self):
        sizes = ["mask", "--shape", "1,1,1,700,300,8", "--window", "64,64,top_left"]
        self.tandem(*sizes, "--svg", self.path("m.svg"))
        root = xml.etree.ElementTree.parse(self.path("m.svg")).getroot()
        self.assertGreater(len(root), 10)
        self.tandem(*sizes, "--png", self.path("m.png"))
        self.assertEqual(self.path("m.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        self.tandem(*sizes, "--png", self.path("x.png"), "--svg", self.path("x.svg"), code=2)


if __name__ == "__main__":
    unittest.main()
