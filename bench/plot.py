#!/usr/bin/env python3
"""Draws the JSON of peers.py, accuracy.py and examples/training/train.py as PNG and SVG. Needs matplotlib.

    python3 bench/plot.py docs/evidence/DATE/*.json --out docs/plots

Of each result of peers.py: ratio_DEVICE (ours over the best peer, case by case) and roofline_DEVICE; of one for each
device: cpu_beside_cuda; of each of accuracy.py: accuracy_DEVICE; of one of train.py: training.
"""

import argparse
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of the backend)

from accuracy_table import SERIES, answerers, is_wrong  # noqa: E402

plt.rcParams.update({"svg.hashsalt": "tandem", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.axisbelow": True, "svg.fonttype": "none"})
COLOURS = {"f32": "tab:blue", "bf16": "tab:orange", "f16": "tab:green"}
DEVICE_NAMES = {"cpu": "CPU", "cuda": "GPU"}


def save(figure, target, name):
    directory, suffix = target
    for extension in ("png", "svg"):
        path = os.path.join(directory, f"{name}{suffix}.{extension}")
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Date": None} if extension == "svg" else None)
        print(path)
    plt.close(figure)


def title(report):
    return f"{report['device'].split(':')[0]}, {report['machine']['threads']} threads" if (
        report["device_type"] == "cpu") else report["device"].split(",")[0]


def short_name(entry):
    return entry["case"].split("/", 2)[2] + (" gradients" if entry["group"] == "backward" else "")


def plot_ratio(report, target):
    entries = [entry for entry in report["results"] if entry["ratio_to_best_peer"]]
    if not entries:
        return
    figure, axes = plt.subplots(figsize=(7, 0.19 * len(entries) + 1))
    ratios = [entry["ratio_to_best_peer"] for entry in entries]
    colours = [COLOURS[entry["case"].split("/")[2]] for entry in entries]
    places = range(len(entries))
    axes.barh(places, ratios, color=colours)
    for place, entry, ratio in zip(places, entries, ratios):
        axes.text(ratio, place, f" {ratio:.2f} of {entry['best_peer']}", va="center", fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [short_name(entry) for entry in entries], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ratios) * 1.25)
    axes.set_xlabel("Tandem's rate over that of the best peer in the same run")
    axes.set_title(title(report))
    save(figure, target, f"ratio_{report['device_type']}")


def plot_roofline(report, target):
    """Work per byte that has to move, against rate: ours filled, the best peer's hollow."""
    ceilings = {name: values["median"] for name, values in report["ceilings"].items()}
    bandwidth = next((rate for name, rate in ceilings.items() if name.startswith("memory read")),
                     ceilings.get("copy (read and written), bytes/s"))
    if not report["results"] or not bandwidth:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    intensity = [entry["flops"] / entry["io_bytes"] for entry in report["results"]]
    # Without those of types that the machine is slow with.
    top = max(rate for name, rate in ceilings.items() if name.endswith("FLOP/s"))
    roofs = {name: rate for name, rate in ceilings.items() if name.endswith("FLOP/s") and rate > top / 20}
    knees = [rate / bandwidth for rate in roofs.values()]
    left, right = min(intensity + knees) / 4, max(intensity + knees) * 2
    for name, rate in roofs.items():
        axes.plot([left, rate / bandwidth, right], [bandwidth * left, rate, rate], color="grey", linewidth=0.8)
        axes.text(right, rate, " " + name.removesuffix(", FLOP/s"), va="center", fontsize=6, color="grey")
    for dtype, colour in COLOURS.items():
        entries = [entry for entry in report["results"] if entry["case"].split("/")[2] == dtype]
        x = [entry["flops"] / entry["io_bytes"] for entry in entries]
        axes.plot(x, [entry["calls"]["tandem"]["flops_per_second"] for entry in entries], "o", color=colour,
                  markersize=5, label=f"Tandem {dtype}")
        peers = [(at, entry["calls"][entry["best_peer"]]["flops_per_second"]) for at, entry in zip(x, entries)
                 if entry["best_peer"]]
        if peers:
            axes.plot(*zip(*peers), "o", color=colour, markersize=5, markerfacecolor="none",
                      label=f"best peer {dtype}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOP per byte of q, k, v, mask, bias and output")
    axes.set_ylabel("FLOP/s")
    axes.set_title(title(report))
    axes.legend(fontsize=6, loc="lower right")
    save(figure, target, f"roofline_{report['device_type']}")


def by_kind(report):
    """The largest case of every (dtype, dim, mask): what both devices may share."""
    kinds = {}
    for entry in report["results"]:
        if entry["group"] == "backward":
            continue
        parts = entry["case"].split("/")
        kind = (parts[2], parts[-2], "decode" if entry["group"] == "decode" else parts[-1].rstrip("0123456789"))
        if kind not in kinds or kinds[kind]["flops"] < entry["flops"]:
            kinds[kind] = entry
    return kinds


def plot_side_by_side(cpu, cuda, target):
    kinds = {device: by_kind(report) for device, report in (("cpu", cpu), ("cuda", cuda))}
    shared = [kind for kind in kinds["cuda"] if kind in kinds["cpu"]]
    if not shared:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for shift, (device, colour) in zip((-0.2, 0.2), (("cpu", "tab:purple"), ("cuda", "tab:olive"))):
        places = [place + shift for place in range(len(shared))]
        rates = [kinds[device][kind]["calls"]["tandem"]["flops_per_second"] for kind in shared]
        axes.bar(places, rates, width=0.4, color=colour, label=f"Tandem, {title(cpu if device == 'cpu' else cuda)}")
        best = [(place, kinds[device][kind]["calls"][kinds[device][kind]["best_peer"]]["flops_per_second"])
                for place, kind in zip(places, shared) if kinds[device][kind]["best_peer"]]
        if best:
            axes.plot(*zip(*best), "_", color="black", markersize=10,
                      label="best peer there" if device == "cuda" else None)
    axes.set_yscale("log")
    axes.set_ylabel("FLOP/s")
    axes.set_xticks(range(len(shared)), [" ".join(kind) for kind in shared], rotation=60, ha="right", fontsize=6)
    axes.set_title("The same kinds of case on both devices, each in its largest shape")
    axes.legend(fontsize=6)
    save(figure, target, "cpu_beside_cuda")


def plot_accuracy(report, target):
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in report["results"]))
    figure, grid = plt.subplots(len(dtypes), len(SERIES), figsize=(12, 2.6 * len(dtypes)), sharey="row", squeeze=False)
    names = answerers(report["results"])
    colours = {name: plt.get_cmap("tab20")(n % 20) for n, name in enumerate(names)}
    for row, dtype in zip(grid, dtypes):
        for axes, series in zip(row, SERIES):
            entries = [e for e in report["results"] if e["dtype"] == dtype and e["series"] == series]
            labels = [entry["label"] for entry in entries]
            for name in names:
                found = [entry["results"].get(name) for entry in entries]
                if not any(found):
                    continue
                ours = next(item for item in found if item)["ours"]
                values = [max(item["out_error_over_bound"], 1e-5) if item and not is_wrong(item) else math.nan
                          for item in found]
                axes.plot(labels, values, "o-" if ours else "x--", color=colours[name], markersize=3, linewidth=0.9,
                          label=name)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.tick_params(axis="x", rotation=60, labelsize=6)
            axes.set_title(f"{dtype}: {series}", fontsize=8)
        row[0].set_ylabel("error of O / bound")
    handles = {}
    for axes in grid.flat:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels())})
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=6, fontsize=7,
                  bbox_to_anchor=(0.5, -0.04))
    figure.suptitle(f"{title(report)}: solid is Tandem, dashed are peers; 1 is the contract")
    figure.tight_layout()
    save(figure, target, f"accuracy_{report['device_type']}")


def plot_training(report, target):
    """Losses, and below them how far each is from the math path's, with the tolerance as a line."""
    dtypes = list(dict.fromkeys(result["dtype"] for result in report["results"]))
    figure, grid = plt.subplots(2, len(dtypes), figsize=(4.5 * len(dtypes), 5), sharex=True, sharey="row",
                                squeeze=False, height_ratios=(3, 2))
    for dtype, (losses, differences) in zip(dtypes, grid.T):
        results = [result for result in report["results"] if result["dtype"] == dtype]
        math_losses = next(result["losses"] for result in results if result["path"] == "math")
        for result in results:
            place = f"{result['path'].capitalize()}, {DEVICE_NAMES[result['device']]}"
            if result["path"] == "math":
                losses.plot(result["losses"], color="lightgrey", linewidth=3, label=place)
                continue
            style = {"color": {"cpu": "tab:purple", "cuda": "tab:olive"}[result["device"]], "linewidth": 0.8,
                     "linestyle": (0, (2, 2)) if result["device"] == "cpu" else "-", "label": place}
            losses.plot(result["losses"], **style)
            # 1e-5, the last digit of the JSON, stands for no difference too.
            differences.plot([max(abs(a - b), 1e-5) for a, b in zip(result["losses"], math_losses)], **style)
        differences.axhline(report["tolerances"]["loss"][dtype], color="black", linewidth=0.8)
        differences.set_yscale("log")
        differences.set_xlabel("step")
        losses.set_title(f"attention in {dtype}")
        losses.legend(fontsize=7)
    grid[0, 0].set_ylabel("loss, nats a byte")
    grid[1, 0].set_ylabel("difference to Math")
    figure.tight_layout()
    save(figure, target, "training")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON of peers.py, accuracy.py and train.py")
    parser.add_argument("--out", default="docs/plots", help="directory for the plots (docs/plots)")
    parser.add_argument("--suffix", default="", help="end of the plots' names, for results of another machine")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    peers, target = {}, (options.out, options.suffix)
    for path in options.results:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        if report.get("format") != 2 or report.get("kind") == "scaling":
            print(f"{path}: nothing to draw")
        elif report.get("kind") == "accuracy":
            plot_accuracy(report, target)
        elif report.get("kind") == "training":
            plot_training(report, target)
        else:
            plot_ratio(report, target)
            plot_roofline(report, target)
            peers[report["device_type"]] = report
    if len(peers) == 2:
        plot_side_by_side(peers["cpu"], peers["cuda"], target)


if __name__ == "__main__":
    main()
