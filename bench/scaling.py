#!/usr/bin/env python3
"""Times Tandem on 1, 2, 4, ... CPU threads, interleaved, beside the cores' own ceiling on as many, and prints a table.

    python3 bench/scaling.py --library build/release/lib/libtandem.so --json scaling.json

"of linear" is the speed-up over one thread, divided by that of the ceiling: products from registers, on AMX for bf16
and f16 where the CPU has it, else FMA. Decoding is held against reading memory.
"""

import argparse
import os
import statistics

import torch

import cases
import inputs as case_inputs
import machine
import measure
import tandem_ctypes as tandem
from table import number, unit_of

DEFAULT_FILTER = "q2048/k2048/d128/none,q2048/k2048/d128/causal,q2048/k2048/d128/boolean,b1/h32/hk8/q1/"


def thread_counts(most):
    """Powers of two up to all of them, and all of them."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts + [most] if most > 1 else counts


class Scaling:
    def __init__(self, library, support, seconds, counts):
        self.library, self.support, self.seconds, self.counts = library, support, seconds, counts
        self.ceilings = {}

    def ceiling_name(self, case):
        if case.group == "decode":
            return "read_bytes"
        has_amx = case.dtype != "f32" and self.support.ceiling("amx_flops", 1, 0.01) is not None
        return "amx_flops" if has_amx else "fma_flops"

    def sample(self, name):
        """More samples of a ceiling on every number of threads: the clock is not constant."""
        for threads in self.counts:
            rate = self.support.ceiling(name, threads, 0.05)
            self.ceilings.setdefault(name, {}).setdefault(threads, []).append(rate)

    def measure(self, case):
        copies = case.rotated_copies(machine.last_level_cache_bytes())
        inputs = case_inputs.Inputs(case, copies)
        tensors, terms, bias = inputs.description("cpu", *inputs.kv[0])
        turn, calls, kernels = [0], {}, {}
        for threads in self.counts:
            attention = tandem.Attention(self.library, torch, *tensors, terms, bias, threads=threads,
                                         prepared=inputs.dense is not None)

            def run(attention=attention):
                turn[0] = (turn[0] + 1) % copies
                attention.set_kv(*inputs.kv[turn[0]])
                attention()
            run()
            calls[threads], kernels[threads] = run, attention.kernel
        name = self.ceiling_name(case)
        self.sample(name)
        times = measure.interleaved(calls, "cpu", self.seconds)
        self.sample(name)
        work = case.kv_bytes if case.group == "decode" else case.flops
        return {"case": case.name, "group": case.group, "ceiling": name, "kernel": kernels[self.counts[0]],
                "rates": {str(threads): work / statistics.median(samples) for threads, samples in times.items()},
                "times_ms": {str(threads): [t * 1e3 for t in samples] for threads, samples in times.items()}}


def of_linear(entry, ceilings, threads):
    """The speed-up over one thread, as a part of that of the ceiling."""
    ceiling = {count: statistics.median(samples) for count, samples in ceilings[entry["ceiling"]].items()}
    return (entry["rates"][threads] / entry["rates"]["1"]) / (ceiling[threads] / ceiling["1"])


def markdown(report):
    counts = list(report["results"][0]["rates"])
    head = ["case", "kernel", "unit"] + [f"{count} threads" for count in counts] + [f"of linear at {counts[-1]}"]
    rows = [head, ["---"] * len(head)]
    for entry in report["results"]:
        _, unit, size = unit_of(entry["group"], "cpu")
        rows.append([entry["case"].split("/", 2)[2], entry["kernel"], unit] +
                    [number(entry["rates"][count] / size) for count in counts] +
                    [f"{of_linear(entry, report['ceilings'], counts[-1]):.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="path of libtandem.so")
    parser.add_argument("--threads", type=int, default=0, help="the most (0: all that may be used)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per number of threads and case (0.3)")
    parser.add_argument("--filter", default=DEFAULT_FILTER, help="cases whose names contain one of these")
    parser.add_argument("--stamp", help="stamp file of the bundle that the library is from")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    library = tandem.Library(options.library)
    support = tandem.Support(os.path.join(os.path.dirname(options.library) or ".", "libtandem_bench.so"))
    counts = thread_counts(options.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(1)
    scaling = Scaling(library, support, options.seconds, counts)
    report = {"format": 2, "kind": "scaling", "device_type": "cpu", "device": library.device(tandem.CPU),
              "machine": machine.describe(torch, "cpu", counts[-1]), "versions": machine.versions(torch),
              "stamp": machine.stamp(options.stamp), "results": []}
    with torch.inference_mode():
        for case in cases.cases("cpu", filters=options.filter.split(",")):
            report["results"].append(scaling.measure(case))
    report["ceilings"] = {name: {str(threads): samples for threads, samples in by_threads.items()}
                          for name, by_threads in scaling.ceilings.items()}
    if options.json:
        machine.write_json(report, options.json)
    print(markdown(report))


if __name__ == "__main__":
    main()
