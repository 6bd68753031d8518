#!/usr/bin/env python3
"""Prints the results of accuracy.py (JSON) as Markdown tables.

    python3 bench/accuracy_table.py docs/evidence/DATE/accuracy_cpu.json ...
"""

import json
import sys

from table import number

SERIES = ("head dim", "length", "scale", "mask")


def answerers(entries):
    """Names in the order of the JSON, ours first."""
    names = {}
    for entry in entries:
        for name, found in entry["results"].items():
            names[name] = found["ours"]
    return sorted(names, key=lambda name: not names[name])


def is_wrong(found):
    return found["nonfinite_mismatches"] > 0 or found["empty_row_mismatches"] > 0


def worst(entries, name, key):
    """The largest figure of an answerer, "wrong" where an answer was wrong by definition, None where it never ran."""
    found = [entry["results"][name] for entry in entries if name in entry["results"]]
    if not found:
        return None
    return "wrong" if any(map(is_wrong, found)) else max(item[key] for item in found)


def figure(value):
    if value is None:
        return "refused"
    if value == "wrong":
        return "**wrong**"
    return f"**{number(value, 2)}**" if value > 1 else number(value, 2)


def error_beside_ordinary(entries, name):
    """f32: the largest ratio of the answerer's largest error to that of PyTorch's unfused evaluation."""
    ratios = []
    for entry in entries:
        ordinary = entry["results"].get("math")
        mine = entry["results"].get(name)
        if ordinary and mine and ordinary["max_error"] > 0 and not is_wrong(ordinary) and not is_wrong(mine):
            ratios.append(mine["max_error"] / ordinary["max_error"])
    return max(ratios, default=None)


def bounds_table(entries, dtype):
    has_ordinary = dtype == "f32" and any("math" in entry["results"] for entry in entries)
    head = ["answer"] + list(SERIES) + ["LSE"] + (["error beside math's"] if has_ordinary else [])
    rows = [head, ["---"] * len(head)]
    regular = [entry for entry in entries if entry["series"] in SERIES]
    for name in answerers(regular):
        ours = any(entry["results"][name]["ours"] for entry in regular if name in entry["results"])
        row = [f"`{name}`" if ours else name]
        for series in SERIES:
            row.append(figure(worst([e for e in regular if e["series"] == series], name, "out_error_over_bound")))
        row.append(figure(worst(regular, name, "lse_error_over_bound")) if ours else "")
        if has_ordinary:
            ratio = error_beside_ordinary(regular, name)
            row.append("" if ratio is None else number(ratio, 2))
        rows.append(row)
    return rows


def hostile_cell(entry, name):
    found = entry["results"].get(name)
    if found is None:
        return "refused"
    if found["nonfinite_mismatches"] > 0:
        return "**leaks**" if "masked" in entry["label"] else "**NaN or inf**"
    if found["empty_row_mismatches"] > 0:
        value = found["largest_on_empty_rows"]
        return f"**{value if isinstance(value, str) else number(value, 2)} in empty rows**"
    return figure(found["out_error_over_bound"])


def hostile_table(entries):
    hostile = [entry for entry in entries if entry["series"] == "hostile"]
    names = answerers(hostile)
    rows = [["case"] + names, ["---"] * (len(names) + 1)]
    for entry in hostile:
        rows.append([entry["label"]] + [hostile_cell(entry, name) for name in names])
    return rows


def markdown(rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report_text(report):
    lines = [f"{report['device']}; {report['machine']['date']}, commit {report['stamp'].get('commit', 'unknown')}, "
             f"PyTorch {report['versions']['torch']}.", ""]
    for name, reason in report["absent"].items():
        lines += [f"Absent: {name} ({reason}).", ""]
    for dtype in dict.fromkeys(entry["dtype"] for entry in report["results"]):
        entries = [entry for entry in report["results"] if entry["dtype"] == dtype]
        lines += [f"**{dtype}**: the largest error / bound of O over each series", "",
                  markdown(bounds_table(entries, dtype)), "", f"**{dtype}**: hostile inputs", "",
                  markdown(hostile_table(entries)), ""]
    return "\n".join(lines)


def main():
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            print(report_text(json.load(file)))


if __name__ == "__main__":
    main()
