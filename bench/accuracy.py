#!/usr/bin/env python3
"""Holds every kernel of Tandem and every peer against the f64 oracle, on the same inputs, and writes JSON.

    python3 bench/accuracy.py --library build/release/lib/libtandem.so --device cpu --json accuracy_cpu.json
    python3 bench/accuracy_table.py accuracy_cpu.json           # the tables of docs/accuracy.md
    python3 bench/plot.py accuracy accuracy_cpu.json --out docs/plots

The figure is error / bound of docs/semantics.md section 7, the largest over all elements of O (for ours of LSE too); at
most 1 is the contract. Answers that are wrong by definition are counted besides: elements that are NaN or infinite
where they may not be (or the other way round), and elements of empty rows that are not +0. Inputs come from seeds and
are the same on both devices. Needs PyTorch, and libtandem_bench.so beside the library.
"""

import argparse
import math
import os
import zlib

import torch

import accuracy_cases
import machine
import peers_onnx
import peers_torch
import tandem_ctypes as tandem
from accuracy_table import is_wrong
from inputs import DTYPES

SKIPPED_PEERS = ("flex", "flash_cpu per document")  # one compiles for every case, one is of packed documents


class Inputs:
    """The tensors of a case, as inputs.Inputs has them."""

    def __init__(self, case, device):
        self.case, self.device, self.scale, self.dtype = case, device, case.scale, DTYPES[case.dtype]
        self.source = torch.Generator().manual_seed(zlib.crc32(f"{case.series}/{case.label}".encode()))
        n, shape = case.length, (case.batch, case.heads, case.length, case.dim)
        q, k, v = (torch.randn(shape, generator=self.source) for _ in range(3))
        keep = torch.ones(case.batch, 1, n, n, dtype=torch.bool)
        bias, terms = None, []
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        hidden = slice(n - accuracy_cases.HIDDEN_KEYS, n)
        lowest = torch.finfo(self.dtype).min
        mask = case.mask
        if mask == "causal":
            terms = [("causal", tandem.TOP_LEFT)]
        elif mask == "window":
            terms = [("window", case.window, 0, tandem.TOP_LEFT)]
            keep &= (j <= i) & (j >= i - case.window)
        elif mask == "padded":
            lengths = torch.tensor([n, n // 3], dtype=torch.int32)
            terms = [("kv_lengths", lengths.to(device))]
            keep &= j < lengths[:, None, None, None]
        elif mask == "boolean":
            keep &= torch.rand(keep.shape, generator=self.source) < 0.5
        elif mask == "bias":
            bias = torch.randn(keep.shape, generator=self.source)
        elif mask == "bias_inf":
            hide = torch.rand(keep.shape, generator=self.source) < 0.3
            bias = torch.randn(keep.shape, generator=self.source).masked_fill(hide, float("-inf"))
        elif mask == "scores of 1e4":
            q, k = q * 40, k * 40
        elif mask == "NaN in visible V":
            v[0, 0, 17, 3] = float("nan")
        elif mask != "none":
            keep[..., hidden] = False
            if mask in ("empty rows", "-inf rows", "finfo.min rows"):
                keep[:, :, accuracy_cases.HIDDEN_ROWS, :] = False
            if mask in ("-inf rows", "finfo.min rows"):
                value = float("-inf") if mask == "-inf rows" else lowest
                bias = torch.zeros(keep.shape).masked_fill(~keep, value)
                keep[:] = True
            if mask == "NaN in masked K":
                k[:, :, hidden] = float("nan")
            elif mask == "NaN in masked V":
                v[:, :, hidden] = float("nan")
            elif mask == "inf in masked V":
                v[:, :, hidden] = float("inf")
        to = lambda t: t.to(self.dtype).to(device)
        self.q, self.kv = to(q), [(to(k), to(v))]
        self.bias = to(bias) if bias is not None else None
        self.is_causal = mask == "causal"
        self.torch_mask = self.bias if bias is not None else (None if keep.all() else keep.to(device))
        self.terms = terms or ([] if keep.all() else [("dense", keep.to(device))])
        seen = keep.any(-1) if bias is None else (bias > float("-inf")).any(-1)
        self.empty = ~seen[:, 0]  # [B, S]

    def description(self, out, lse):
        """On the host, for the oracle."""
        terms = [tuple(a.cpu() if torch.is_tensor(a) else a for a in term) for term in self.terms]
        bias = self.bias.cpu() if self.bias is not None else None
        return tandem.Description(self.q.cpu(), *(t.cpu() for t in self.kv[0]), out, lse, terms, bias, self.scale)


def answers(library, inputs, device_type, peers):
    """Name, whether it is ours, and a function that gives O and LSE (None for peers)."""
    for kernel in library.kernels(device_type):
        def ours(kernel=kernel):
            attention = tandem.Attention(library, torch, inputs.q, *inputs.kv[0], inputs.terms, inputs.bias,
                                         inputs.scale, kernel=kernel)
            out = attention()
            return out.cpu(), attention.lse.cpu()
        yield kernel, True, ours
    for name, prepare in peers.items():
        def theirs(prepare=prepare):
            call = prepare(inputs)
            return call.arrange(call.run(0)).cpu().contiguous(), None
        yield name, False, theirs


def judge(library, support, case, device, device_type, peers):
    inputs = Inputs(case, device)
    results, declined = {}, {}
    for name, is_ours, answer in answers(library, inputs, device_type, peers):
        try:
            out, lse = answer()
        except Exception as error:  # kernels and peers refuse in many ways; each is listed with what it says
            declined[name] = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            continue
        found = support.judge(inputs.description(out, lse), device == "cuda", max_pairs=1 << 21)
        on_empty = out.float().transpose(1, 2)[inputs.empty].abs()
        largest = on_empty.max().item() if on_empty.numel() else 0.0
        found["largest_on_empty_rows"] = largest if math.isfinite(largest) else "NaN"
        if found["error_over_bound"] <= 1 and not is_wrong(found):
            del found["worst"]
        results[name] = {"ours": is_ours, **found}
    return {"series": case.series, "label": case.label, "dtype": case.dtype, "length": case.length, "dim": case.dim,
            "scale": case.scale, "mask": case.mask, "results": results, "declined": declined}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="path of libtandem.so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", default="f32,bf16,f16")
    parser.add_argument("--series", default="", help="only this one: head dim, length, scale, mask or hostile")
    parser.add_argument("--stamp", help="stamp file of the bundle that the library is from")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    library = tandem.Library(options.library)
    support = tandem.Support(os.path.join(os.path.dirname(options.library) or ".", "libtandem_bench.so"))
    device_type = tandem.CUDA if options.device == "cuda" else tandem.CPU
    threads = len(os.sched_getaffinity(0))
    peers, absent = peers_torch.peers(options.device)
    if options.device == "cpu":
        more, more_absent = peers_onnx.peers(threads)
        peers.update(more)
        absent.update(more_absent)
    peers = {name: peer for name, peer in peers.items() if name not in SKIPPED_PEERS}
    report = {"format": 2, "kind": "accuracy", "device_type": options.device, "device": library.device(device_type),
              "machine": machine.describe(torch, options.device, threads), "versions": machine.versions(torch),
              "stamp": machine.stamp(options.stamp), "absent": absent, "results": []}
    with torch.inference_mode():
        for dtype in options.dtypes.split(","):
            for case in accuracy_cases.cases(dtype):
                if options.series in ("", case.series):
                    entry = judge(library, support, case, options.device, device_type, peers)
                    report["results"].append(entry)
                    shown = ", ".join(f"{name} {found['error_over_bound']:.2g}" + (
                        " WRONG" if is_wrong(found) else "")
                        for name, found in entry["results"].items())
                    print(f"{dtype} {case.series} {case.label}: {shown}", flush=True)
            if options.json:  # after each type, so that a run cut short leaves what it has
                machine.write_json(report, options.json)


if __name__ == "__main__":
    main()
