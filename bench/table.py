#!/usr/bin/env python3
"""Prints the results of peers.py (JSON) as Markdown tables: rates by visible pairs, and ours over each peer's.

    python3 bench/table.py docs/evidence/DATE/peers_cpu.json ...
"""

import json
import sys


def print_table(report):
    unit, factor = ("TFLOP/s", 1e-3) if "NVIDIA" in report["device"] else ("GFLOP/s", 1)
    peers = []
    for entry in report["results"]:
        peers += [name for name in entry["gflops"] if name not in peers and name != "tandem"]
    print(f"{report['device']}; PyTorch {report['torch']}, {report['threads']} CPU threads. Ceilings: " +
          ", ".join(f"{name} {value:.0f}" for name, value in report["ceilings"].items()) + ".\n")
    print(f"| case | kernel | tandem, {unit} | " + " | ".join(peers) + " | ratio to the best | workspace, MB |")
    print("|---|---|---|" + "---|" * len(peers) + "---|---|")
    for entry in report["results"]:
        rates = [f"{entry['gflops'][p] * factor:.0f}" if p in entry["gflops"] else "refused" for p in peers]
        ratio = f"{entry['ratio_to_best_peer']:.2f}" if entry["ratio_to_best_peer"] else ""
        print(f"| {entry['case'].removeprefix('forward/')} | {entry['kernel']} | "
              f"{entry['gflops']['tandem'] * factor:.0f} | " + " | ".join(rates) +
              f" | {ratio} | {entry['workspace_bytes'] / 1e6:.1f} |")


for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        print_table(json.load(file))
    print()
