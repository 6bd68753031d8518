#!/usr/bin/env python3
"""Times Tandem and PyTorch's attention side by side, in one process, interleaved, and writes JSON.

    python3 bench/peers.py --library build/lib/libtandem.so --device cpu --json result.json

Every case runs A B A B ... over the same random tensors; the figure is the median, and a ratio is ours over a peer's
in the same run. FLOPs count visible pairs: 4 * B * H * D * pairs. Errors are against an f64 evaluation of sampled rows.
Ceilings (matrix product, copy) are measured in the same run. Needs torch; on CUDA the peers are FlashAttention-2,
memory-efficient and cuDNN as PyTorch ships them.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tandem_ctypes as tandem

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Case:
    """One shape and mask, with its tensors."""

    def __init__(self, device, dtype, batch, heads, kv_heads, q_len, kv_len, dim, mask):
        self.name = (f"forward/{device}/{dtype}/b{batch}/h{heads}/hk{kv_heads}/q{q_len}/k{kv_len}"
                     f"/d{dim}/{mask}")
        self.device, self.mask = device, mask
        make = lambda h, s: torch.randn(batch, h, s, dim, device=device).to(DTYPES[dtype])
        self.q, self.k, self.v = make(heads, q_len), make(kv_heads, kv_len), make(kv_heads, kv_len)
        self.terms, self.bias, self.torch_mask = [], None, None
        pairs = q_len * kv_len
        if mask == "causal":
            self.terms = [("causal", tandem.TOP_LEFT)]
            pairs = sum(min(i + 1, kv_len) for i in range(q_len))
        elif mask == "boolean":
            self.torch_mask = torch.rand(batch, 1, q_len, kv_len, device=device) < 0.9
            self.terms = [("dense", self.torch_mask)]
        elif mask == "bias":
            self.bias = torch.randn(batch, 1, q_len, kv_len, device=device).to(DTYPES[dtype])
            self.torch_mask = self.bias
        self.flops = 4 * batch * heads * dim * pairs
        self.bytes = 2 * self.k.numel() * self.k.element_size()

    def peer(self):
        return torch.nn.functional.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self.torch_mask, is_causal=self.mask == "causal",
            enable_gqa=self.q.shape[1] != self.k.shape[1])

    def error(self, out):
        """The largest absolute error on the first and last rows of the first and last head, in f64."""
        worst = 0.0
        group = self.q.shape[1] // self.k.shape[1]
        rows = sorted({0, self.q.shape[2] // 2, self.q.shape[2] - 1})
        for b, h in {(0, 0), (self.q.shape[0] - 1, self.q.shape[1] - 1)}:
            q, k, v = self.q[b, h, rows].double(), self.k[b, h // group].double(), self.v[b, h // group].double()
            s = q @ k.T / math.sqrt(q.shape[-1])
            if self.mask == "causal":
                j = torch.arange(k.shape[0], device=q.device)
                s = s.masked_fill(j[None, :] > torch.tensor(rows, device=q.device)[:, None], -math.inf)
            elif self.mask == "boolean":
                s = s.masked_fill(~self.torch_mask[b, 0, rows], -math.inf)
            elif self.mask == "bias":
                s = s + self.bias[b, 0, rows].double()
            worst = max(worst, (torch.softmax(s, -1) @ v - out[b, h, rows].double()).abs().max().item())
        return worst


def timer(device):
    if device == "cpu":
        def once(call):
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        return once

    def once(call):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    return once


def interleaved(calls, once, seconds):
    """Medians of calls run in turn until each has had its seconds, at least 5 times."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            times[name].append(once(call))
    return {name: statistics.median(t) for name, t in times.items()}


def peer_calls(case):
    """Name and call of every peer that accepts the case."""
    if case.device == "cpu":
        return {"torch flash_cpu": case.peer}
    calls = {}
    for name, backend in (("torch FA2", SDPBackend.FLASH_ATTENTION),
                          ("torch efficient", SDPBackend.EFFICIENT_ATTENTION),
                          ("torch cuDNN", SDPBackend.CUDNN_ATTENTION)):
        def call(backend=backend):
            with sdpa_kernel(backend):
                return case.peer()
        try:
            call()
            calls[name] = call
        except RuntimeError:
            pass
    return calls


def ceilings(device, once, seconds):
    result = {}
    size = 8192 if device == "cuda" else 1536
    for name in ("bf16", "f32"):
        a = torch.randn(size, size, device=device).to(DTYPES[name])
        b = torch.randn(size, size, device=device).to(DTYPES[name])
        t = interleaved({"": lambda: a @ b}, once, seconds)[""]
        result[f"matmul {name} GFLOP/s"] = 2 * size**3 / t * 1e-9
    source = torch.randn(1 << (30 if device == "cuda" else 27), device=device)
    target = torch.empty_like(source)
    t = interleaved({"": lambda: target.copy_(source)}, once, seconds)[""]
    result["copy GB/s, read and written"] = 2 * source.numel() * 4 / t * 1e-9
    return result


def cases(device):
    big = dict(batch=4, heads=16, kv_heads=16, q_len=4096, kv_len=4096) if device == "cuda" else \
        dict(batch=1, heads=8, kv_heads=8, q_len=2048, kv_len=2048)
    for dtype in ("bf16", "f16", "f32"):
        for dim in (64, 128):
            for mask in ("none", "causal", "boolean", "bias"):
                yield dict(device=device, dtype=dtype, dim=dim, mask=mask, **big)
    yield dict(device=device, dtype="bf16", dim=128, mask="none", batch=1, heads=32, kv_heads=8,
               q_len=1, kv_len=8192)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--library", required=True, help="path of libtandem.so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of ours and PyTorch (0: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per call and case")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    library = tandem.Library(options.library)
    once = timer(options.device)
    device_type = tandem.CUDA if options.device == "cuda" else tandem.CPU
    report = {"device": library.device(device_type), "torch": torch.__version__,
              "threads": torch.get_num_threads(),
              "ceilings": ceilings(options.device, once, options.seconds), "results": []}
    print(json.dumps(report["ceilings"]), flush=True)
    for arguments in cases(options.device):
        case = Case(**arguments)
        if options.filter not in case.name:
            continue
        ours = tandem.Attention(library, torch, case.q, case.k, case.v, case.terms, case.bias,
                                threads=options.threads)
        calls = {"tandem": ours, **peer_calls(case)}
        times = interleaved(calls, once, options.seconds)
        entry = {"case": case.name, "kernel": ours.kernel, "workspace_bytes": ours.workspace_size,
                 "time_ms": {n: t * 1e3 for n, t in times.items()},
                 "gflops": {n: case.flops / t * 1e-9 for n, t in times.items()},
                 "kv_gb_per_s": {n: case.bytes / t * 1e-9 for n, t in times.items()},
                 "max_error": {n: case.error(call()) for n, call in calls.items()}}
        peers = [t for n, t in times.items() if n != "tandem"]
        entry["ratio_to_best_peer"] = min(peers) / times["tandem"] if peers else None
        report["results"].append(entry)
        print(f"{case.name:62s} {ours.kernel:28s} " +
              " ".join(f"{n} {g:.0f}" for n, g in entry["gflops"].items()) +
              f" GFLOP/s, ratio {entry['ratio_to_best_peer'] or math.nan:.2f}", flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
