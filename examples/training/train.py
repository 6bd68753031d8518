#!/usr/bin/env python3
"""Trains a small transformer on packed documents with Tandem's attention and with PyTorch's math path, from the same
seed, on every device asked for, and compares the losses.

    python3 examples/training/train.py --library build/release/lib/libtandem.so --json training.json
    python3 bench/plot.py training.json                                          # draws docs/plots/training.png

Each layer tells its causal document mask in another way: as packed sequences, as segments, as a dense mask. Exits with
1 where a loss or a gradient is not finite, where the gradients of the first step or the losses of any step differ from
the math path's by more than the tolerances below, or where nothing was learnt. Needs PyTorch.
"""

import argparse
import hashlib
import itertools
import math
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's threads and Tandem's take turns on the same cores

import torch  # noqa: E402  (after the environment)

import attention  # noqa: E402
import documents  # noqa: E402
import machine  # noqa: E402  (of bench/, as tandem_ctypes)
import tandem_ctypes as tandem  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}  # of q, k, v; everything else is f32
# Gradients of the first step: |difference| / |math's|, over all parameters as one vector.
GRADIENT_TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}
# Loss of any step, in nats a byte. Rounding differs, and hundreds of steps let differences grow.
LOSS_TOLERANCE = {"f32": 0.01, "bf16": 0.05}
ROWS, ROW_LENGTH = 4, 384
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64
LEARNING_RATE, WARM_UP = 1e-3, 20


class Layer(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.attention_norm, self.mlp_norm = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(),
                                       torch.nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, mask, attend, dtype):
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, HEAD_DIM)).to(dtype)
        heads = attend(*qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2), mask, self.form)
        x = x + self.out(heads.flatten(2).to(x.dtype))
        return x + self.mlp(self.mlp_norm(x))


class Model(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.token, self.position = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(ROW_LENGTH, WIDTH)
        forms = itertools.islice(itertools.cycle(attention.Mask.FORMS), layers)
        self.layers = torch.nn.ModuleList(Layer(form) for form in forms)
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 256)

    def forward(self, tokens, positions, mask, attend, dtype):
        x = self.token(tokens) + self.position(positions)
        for layer in self.layers:
            x = layer(x, mask, attend, dtype)
        return self.head(self.norm(x))


def train(options, text, attend, device, dtype):
    """Losses and norms of gradients, step by step, and the gradient of the first step."""
    torch.manual_seed(options.seed)
    model = Model(options.layers).to(device)  # made on the CPU: the same everywhere
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), foreach=True)
    losses, norms, first = [], [], None
    start = time.monotonic()
    for step, batch in zip(range(options.steps), documents.batches(text, ROWS, ROW_LENGTH, options.seed)):
        tokens, targets, positions = (torch.tensor(values, device=device).view(ROWS, ROW_LENGTH)
                                      for values in (batch.tokens, batch.targets, batch.positions))
        logits = model(tokens, positions, attention.Mask(batch, ROWS, device), attend, dtype)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                 ignore_index=documents.IGNORED)
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            first = torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        losses.append(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP)
        optimizer.step()
    return {"losses": torch.stack(losses).tolist(), "gradient_norms": torch.stack(norms).tolist(),
            "seconds": time.monotonic() - start, "kernels": sorted(attend.kernels)}, first


def compare(result, first, math_result, math_first):
    """Adds the differences to the result; returns what is wrong as sentences."""
    dtype, wrong = result["dtype"], []
    result["first_gradient_difference"] = float((first - math_first).norm() / math_first.norm())
    differences = [abs(a - b) for a, b in zip(result["losses"], math_result["losses"])]
    result["largest_loss_difference"] = max(differences, key=lambda x: (math.isnan(x), x))
    if not all(map(math.isfinite, result["losses"] + result["gradient_norms"])) or not first.isfinite().all():
        wrong.append("a loss or a gradient is not finite")
    # Written so that NaN is wrong.
    if not result["first_gradient_difference"] <= GRADIENT_TOLERANCE[dtype]:
        wrong.append(f"the first gradient differs by {result['first_gradient_difference']:.2g} of its norm, "
                     f"and may by {GRADIENT_TOLERANCE[dtype]:g}")
    if not result["largest_loss_difference"] <= LOSS_TOLERANCE[dtype]:
        wrong.append(f"a loss differs by {result['largest_loss_difference']:.2g}, and may by {LOSS_TOLERANCE[dtype]:g}")
    if not result["losses"][-1] < result["losses"][0]:
        wrong.append("the last loss is not below the first")
    return [f"{result['case']}: {sentence}" for sentence in wrong]


def print_table(results):
    steps = len(results[0]["losses"])
    rows = [["step", *(result["case"] for result in results)]]
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
        rows.append([step, *(f"{result['losses'][step]:.4f}" for result in results)])
    rows.append(["largest loss difference", *(f"{result['largest_loss_difference']:.2g}" for result in results)])
    rows.append(["first gradient difference", *(f"{result['first_gradient_difference']:.2g}" for result in results)])
    rows.append(["ms a step", *(f"{1e3 * result['seconds'] / steps:.1f}" for result in results)])
    rows.insert(1, ["---"] * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def write_report(options, text, library, devices, results, wrong):
    text = b"".join(text)
    machine.write_json({
        "format": 2, "kind": "training", "stamp": machine.stamp(options.stamp),
        "machine": machine.describe(torch, devices[0], options.threads), "versions": machine.versions(torch),
        "devices": {d: library.device(tandem.CUDA if d == "cuda" else tandem.CPU) for d in devices},
        "text": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()[:16]},
        "settings": {"steps": options.steps, "layers": options.layers, "seed": options.seed, "rows": ROWS,
                     "row_length": ROW_LENGTH, "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS,
                     "head_dim": HEAD_DIM, "learning_rate": LEARNING_RATE},
        "tolerances": {"first_gradient": GRADIENT_TOLERANCE, "loss": LOSS_TOLERANCE},
        "wrong": wrong, "results": results}, options.json)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libtandem.so")
    parser.add_argument("--devices", default="cuda,cpu" if torch.cuda.is_available() else "cpu",
                        help="cuda, cpu or both; the math path runs on the first")
    parser.add_argument("--dtypes", default="f32,bf16", help="of q, k and v")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch on the CPU (0: its default)")
    parser.add_argument("--stamp", help="the stamp file of the bundle that the library is of")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    library, devices = tandem.Library(options.library), options.devices.split(",")
    text = documents.read_documents(ROW_LENGTH)
    results, wrong = [], []
    for dtype in options.dtypes.split(","):
        reference = None
        runs = [(attention.Math(), "math", devices[0]), *((attention.Tandem(library), "tandem", d) for d in devices)]
        for attend, path, device in runs:
            result, first = train(options, text, attend, device, DTYPES[dtype])
            result = {"case": f"{dtype} {path} {device}", "dtype": dtype, "path": path, "device": device, **result}
            reference = reference or (result, first)
            wrong += compare(result, first, *reference)
            results.append(result)
            print(f"{result['case']}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
            if options.json:  # after each, so that a run that is cut short leaves something
                write_report(options, text, library, devices, results, wrong)
    print_table(results)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
