#!/usr/bin/env python3
"""Prints the results of peers.py (JSON) as Markdown tables, one per group of cases.

    python3 bench/table.py docs/evidence/DATE/peers_cpu.json ...
"""

import json
import sys

OURS = ("tandem", "tandem with preparation", "tandem dense", "tandem deterministic")
TITLES = {"dense": "No mask and causal", "mask": "Boolean mask and bias, every tile partial",
          "sparse": "Documents, padding, windows, prefixes, blocks", "gqa": "Grouped queries", "f16": "f16", "f32": "f32",
          "decode": "Decoding: one query per sequence", "backward": "Gradients", "short": "Short", "long": "Long"}


def unit_of(group, device_type):
    """Which rate a group is shown in: its key in the JSON, the unit's name, its size."""
    prefix, size = ("T", 1e12) if device_type == "cuda" else ("G", 1e9)
    if group == "decode":
        return "kv_bytes_per_second", prefix + "B/s of K and V", size
    return "flops_per_second", prefix + "FLOP/s", size


def number(value, digits=3):
    """At least three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def peer_names(entries):
    return list(dict.fromkeys(name for entry in entries for name in entry["calls"] if name not in OURS))


def group_table(entries, device_type):
    rate, unit, size = unit_of(entries[0]["group"], device_type)
    peers = peer_names(entries)
    masked = any(entry["ratio_to_own_dense"] for entry in entries)
    backward = entries[0]["group"] == "backward"
    head = ["case", "kernel", f"Tandem, {unit}"] + (["of own dense", "with preparation"] if masked else []) + (
        ["deterministic"] if backward else []) + peers + [
        "of best peer", "largest error" if backward else "error / bound", "of best peer's", "workspace, MB"]
    rows = [head, ["---"] * len(head)]
    for entry in entries:
        calls = entry["calls"]
        ours = calls["tandem"]
        shown = lambda name: number(calls[name][rate] / size) if name in calls else ""
        row = [entry["case"].split("/", 2)[2], ours["kernel"], f"**{shown('tandem')}**"]
        if masked:
            row += [f"{entry['ratio_to_own_dense']:.2f}" if entry["ratio_to_own_dense"] else "",
                    shown("tandem with preparation")]
        if backward:
            row.append(shown("tandem deterministic"))
        row += [shown(name) or ("refused" if name in entry["declined"] else "-") for name in peers]
        row.append(f"{entry['ratio_to_best_peer']:.2f}" if entry["best_peer"] else "")
        for call in (ours, calls.get(entry["best_peer"], {})):
            error = call.get("max_error" if backward else "error_over_bound")
            row.append("" if error is None else f"{error:.1e}" if backward else number(error, 2))
        row.append(number((ours["workspace_bytes"] + ours["mask_plan_bytes"]) / 1e6, 2))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def ceilings_line(ceilings):
    parts = []
    for name, values in ceilings.items():
        text, unit = name.rsplit(", ", 1)
        size, prefix = (1e12, "T") if values["median"] >= 1e12 else (1e9, "G")
        parts.append(f"{text} {number(values['median'] / size)} {prefix}{unit.replace('bytes', 'B')}")
    return "; ".join(parts)


def report_text(report):
    machine, versions = report["machine"], report["versions"]
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value and value is not True)
    lines = [f"{report['device']}. {machine['threads']} CPU threads on {len(machine['affinity'])} processors; "
             f"{machine['date']}, commit {report['stamp'].get('commit', 'unknown')}; {known}.", "",
             f"Ceilings, medians in the same run: {ceilings_line(report['ceilings'])}.", ""]
    for name, reason in report["absent"].items():
        lines += [f"Absent: {name} ({reason}).", ""]
    for group in dict.fromkeys(entry["group"] for entry in report["results"]):
        entries = [entry for entry in report["results"] if entry["group"] == group]
        lines += [f"**{TITLES.get(group, group)}**", "", group_table(entries, report["device_type"]), ""]
    for name, reason in report["failed"].items():
        lines += [f"Failed: {name} ({reason}).", ""]
    return "\n".join(lines)


def main():
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            print(report_text(json.load(file)))


if __name__ == "__main__":
    main()
