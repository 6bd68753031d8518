"""The backward pass on CUDA beside PyTorch's, in one run: time, TFLOP/s over visible pairs (2.5 times the forward
pass's), the largest error against f32 mathematics on one head, and that repeated runs give the same bits.

  python3 bench/backward_peers.py --library build/release/lib/libtandem.so [--filter TEXT] [--repeats 20]
"""

import argparse
import json
import sys

import tandem_ctypes as tandem

CASES = {
    # name: (dtype, batch, heads, key heads, rows, dim, mask)
    "bf16 D128 4k dense": ("bfloat16", 4, 16, 16, 4096, 128, None),
    "bf16 D128 4k causal": ("bfloat16", 4, 16, 16, 4096, 128, "causal"),
    "bf16 D64 4k dense": ("bfloat16", 4, 16, 16, 4096, 64, None),
    "bf16 D64 4k causal": ("bfloat16", 4, 16, 16, 4096, 64, "causal"),
    "bf16 D256 4k dense": ("bfloat16", 4, 8, 8, 4096, 256, None),
    "bf16 D128 4k boolean": ("bfloat16", 4, 16, 16, 4096, 128, "boolean"),
    "bf16 D128 4k bias": ("bfloat16", 2, 16, 16, 4096, 128, "bias"),
    "bf16 D128 16k window": ("bfloat16", 1, 16, 16, 16384, 128, "window"),
    "bf16 D128 4k causal GQA 4": ("bfloat16", 4, 16, 4, 4096, 128, "causal"),
    "f16 D128 4k dense": ("float16", 4, 16, 16, 4096, 128, None),
    "f32 D128 4k dense": ("float32", 1, 16, 16, 4096, 128, None),
    "f32 D64 4k dense": ("float32", 1, 16, 16, 4096, 64, None),
}
PEERS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def time_of(torch, call, repeats):
    """Median milliseconds."""
    for _ in range(2):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def exact_gradients(torch, q, k, v, dout, mask):
    """Of batch 0 and head 0 (its keys' whole group), in f64."""
    group = q.shape[1] // k.shape[1]
    q, k, v, dout = (x[:1, :n].double() for x, n in ((q, group), (k, 1), (v, 1), (dout, group)))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:1, :group] if mask.dim() == 4 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    (torch.softmax(scores, -1) @ v).backward(dout)
    return q.grad, k.grad, v.grad


def run_case(torch, library, name, repeats):
    dtype, batch, heads, kv_heads, rows, dim, mask = CASES[name]
    torch.manual_seed(1)
    make = lambda h: torch.randn(batch, h, rows, dim, device="cuda").to(getattr(torch, dtype))
    q, k, v, dout = make(heads), make(kv_heads), make(kv_heads), make(heads)
    terms, dense, bias, pairs = [], None, None, rows * rows
    index = torch.arange(rows, device="cuda")
    if mask == "causal":
        terms, pairs = [("causal", tandem.TOP_LEFT)], rows * (rows + 1) // 2
        dense = index[:, None] >= index[None, :]
    elif mask == "window":
        terms, dense = [("window", 1023, 0, tandem.TOP_LEFT)], (index[:, None] >= index[None, :]) & (
            index[:, None] - index[None, :] < 1024)
        pairs = int(dense.sum())
    elif mask == "boolean":
        dense = torch.rand(batch, 1, rows, rows, device="cuda") < 0.5
        terms = [("dense", dense)]
    elif mask == "bias":
        bias = dense = torch.randn(batch, 1, rows, rows, device="cuda").to(getattr(torch, dtype))
    flops = 10 * batch * heads * pairs * dim
    forward = tandem.Attention(library, torch, q, k, v, terms, bias, prepared=mask == "boolean")
    forward()
    backward = tandem.BackwardAttention(forward, q, k, v, dout, bias)
    row = {"case": name, "kernel": backward.kernel, "workspace_mib": backward.workspace_size / 2**20}
    row["tandem_ms"] = time_of(torch, backward, repeats)
    row["tandem_tflops"] = flops / row["tandem_ms"] / 1e9
    first = [g.clone() for g in (backward.dq, backward.dk, backward.dv)]
    same = True
    for _ in range(10):
        backward()
        same = same and all(torch.equal(a, b) for a, b in zip(first, (backward.dq, backward.dk, backward.dv)))
    row["same_bits"] = same
    if rows <= 4096:
        exact = exact_gradients(torch, q, k, v, dout, dense)
        group = heads // kv_heads
        for grad, ours, want in zip(("dq", "dk", "dv"), first, exact):
            ours = ours[:1, :group if grad == "dq" else 1].double()
            row[f"{grad}_error"] = float((ours - want).abs().max() / want.abs().max())
    for peer in PEERS:
        if peer == "MATH" and rows > 4096:
            continue
        try:
            qq, kk, vv = (x.detach().clone().requires_grad_() for x in (q, k, v))
            bb = None if bias is None else bias.detach().clone().requires_grad_()
            attend = dense if mask in ("boolean", "window") else bb
            if mask == "window" and peer != "CUDNN_ATTENTION":
                continue
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, peer)):
                out = torch.nn.functional.scaled_dot_product_attention(
                    qq, kk, vv, attend, is_causal=mask == "causal", enable_gqa=heads != kv_heads)
                wanted = [qq, kk, vv] + ([bb] if bb is not None else [])
                call = lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)
                row[f"{peer}_tflops"] = flops / time_of(torch, call, repeats) / 1e9
            del out, call
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row[f"{peer}_declined"] = str(error).splitlines()[0][:80]
        torch.cuda.empty_cache()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--filter", default="")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    import torch

    library = tandem.Library(arguments.library)
    results = []
    for name in CASES:
        if arguments.filter not in name:
            continue
        try:
            results.append(run_case(torch, library, name, arguments.repeats))
        except RuntimeError as error:
            results.append({"case": name, "error": str(error)})
        print(json.dumps(results[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}, file,
                      indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
