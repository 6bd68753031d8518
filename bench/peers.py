#!/usr/bin/env python3
"""Times Tandem and its peers side by side, in one process per device, interleaved, and writes JSON.

    python3 bench/peers.py --library build/release/lib/libtandem.so --device cpu --json peers_cpu.json

Every case of cases.py runs A B C, B A C, ... over the same random tensors, every round in an order of its own; a ratio
is ours over the best peer's median in the same run. Errors are held against the f64 oracle (libtandem_bench.so, beside
the library) over sampled rows, by the same bound for everybody. Ceilings are measured at the start and at the end of the same run. The JSON has every
single time. A peer that is absent or refuses a case is listed with its reason. Needs PyTorch; ONNX Runtime and the
FlashAttention wheels are used where they can be imported.

Calls of ours: "tandem" runs a plan, with dense masks prepared once (a mask plan); "tandem with preparation" prepares
the mask in every call; "tandem dense" is the same problem without mask and bias. "onednn.cpu" is our kernel of that
name: oneDNN's products around our softmax. The group "backward" times gradients; see peers_backward.py.
"""

import argparse
import os
import signal
import statistics
import time
import warnings

import torch

import cases
import inputs as case_inputs
import machine
import measure
import peers_backward
import peers_onnx
import peers_torch
import tandem_ctypes as tandem
from table import OURS


COMPILED = ("flex", "FA4")  # for every case, when it is first called


class Budget:
    """Seconds that compiling may take, over all cases."""

    def __init__(self, seconds):
        self.left = seconds

    def __enter__(self):
        if self.left <= 0:
            raise peers_torch.Declined("the time for compiling (--compile-seconds) was used up")
        self.start = time.monotonic()
        signal.signal(signal.SIGALRM, self._expired)
        signal.setitimer(signal.ITIMER_REAL, self.left)

    def _expired(self, *_):
        raise peers_torch.Declined("compiling took longer than was left of --compile-seconds")

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.left -= time.monotonic() - self.start


class Bench:
    def __init__(self, options):
        self.options, self.device = options, options.device
        self.threads = options.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        self.library = tandem.Library(options.library)
        self.support, support_absent = None, {}
        try:
            self.support = tandem.Support(os.path.join(os.path.dirname(options.library) or ".", "libtandem_bench.so"))
        except OSError as error:
            support_absent = {"oracle and CPU ceilings": str(error)}
        self.device_type = tandem.CUDA if self.device == "cuda" else tandem.CPU
        self.peers, self.absent = peers_torch.peers(self.device)
        self.absent.update(support_absent)
        if self.device == "cpu":
            more, absent = peers_onnx.peers(self.threads)
            self.peers.update(more)
            self.absent.update(absent)
        if options.peers is not None:
            self.peers = {name: peer for name, peer in self.peers.items() if name in options.peers}
        self.compile_budget = Budget(options.compile_seconds)
        self.ceilings = measure.Ceilings(self.device, self.threads, self.support, options.seconds)

    # Calls of one case: name -> (Call, facts for the JSON).

    def ours(self, inputs):
        calls = {}
        tensors, terms, bias = inputs.description(self.device, *inputs.kv[0])
        arranged = [inputs.description(self.device, *pair)[0][1:] for pair in inputs.kv[1:]]
        copies = [tensors[1:], *arranged]

        def add(name, terms, bias, **more):
            attention = tandem.Attention(self.library, torch, *tensors, terms, bias, threads=self.threads, **more)

            def run(copy):
                attention.set_kv(*copies[copy])
                return attention()
            facts = {"kernel": attention.kernel, "workspace_bytes": attention.workspace_size,
                     "mask_plan_bytes": attention.mask_plan_size, "lse": attention.lse}
            calls[name] = (peers_torch.Call(run), facts)

        kernel = self.options.kernel
        has_dense = inputs.dense is not None
        add("tandem", terms, bias, kernel=kernel, prepared=has_dense)
        if has_dense:
            add("tandem with preparation", terms, bias, kernel=kernel)
        if has_dense or bias is not None:
            add("tandem dense", [], None, kernel=kernel)
        if self.device == "cpu" and (self.options.peers is None or "onednn.cpu" in self.options.peers):
            try:
                add("onednn.cpu", terms, bias, kernel="onednn.cpu")
            except RuntimeError as error:
                return calls, {"onednn.cpu": str(error)}
        return calls, {}

    def theirs(self, inputs):
        calls, declined = {}, {}
        for name, prepare in self.peers.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    if inputs.case.is_backward:
                        prepare = peers_backward.gradients_of(name, prepare)
                    if name in COMPILED:
                        with self.compile_budget:
                            call = prepare(inputs)
                            call.run(0)
                    else:
                        call = prepare(inputs)
                    facts = {}
                    is_counted = self.device == "cuda" and call.clock is None  # memory that PyTorch gives
                    if is_counted:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    call.run(0)
                    if is_counted:
                        torch.cuda.synchronize()
                        facts["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
                    calls[name] = (call, facts)
                except peers_torch.NotMeant:
                    pass
                except Exception as error:  # a peer may refuse in any way; it is listed with what it says
                    reasons = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
                    reasons += [str(w.message).split(" (Triggered")[0] for w in said
                                if issubclass(w.category, UserWarning)]
                    declined[name] = "; ".join(dict.fromkeys(reasons))[:600]
        return calls, declined

    def judge(self, inputs, calls):
        """Adds to each call's facts how its answer compares with the oracle's, for the last copy of the keys."""
        if self.support is None:
            return
        tensors, terms, bias = inputs.description("cpu", *inputs.kv[-1])
        for name, (call, facts) in calls.items():
            lse = facts.pop("lse", None)
            if name == "tandem dense":
                continue
            out = call.arrange(call.run(len(inputs.kv) - 1)).cpu().contiguous()
            description = tandem.Description(*tensors, out, lse.cpu() if lse is not None else None, terms, bias)
            facts.update(self.support.judge(description, self.device == "cuda", self.options.judge_pairs))

    def measure(self, case):
        copies = case.rotated_copies(machine.last_level_cache_bytes())
        inputs = case_inputs.Inputs(case, copies)
        if case.is_backward:
            peers_backward.require_gradients(inputs)
        entry = {"case": case.name, "group": case.group, "pairs": case.pairs, "flops": case.flops,
                 "kv_bytes": case.kv_bytes, "io_bytes": case.io_bytes, "kv_copies": copies, "calls": {}}
        calls, declined = (peers_backward.ours(self.library, inputs, self.threads) if case.is_backward
                           else self.ours(inputs))
        more, more_declined = self.theirs(inputs)
        calls.update(more)
        entry["declined"] = {**declined, **more_declined}
        if case.is_backward:
            peers_backward.judge(inputs, calls)
        else:
            self.judge(inputs, calls)
        turn = {name: 0 for name in calls}

        def rotate(name, call):
            turn[name] = (turn[name] + 1) % copies
            return call.run(turn[name])
        runs = {name: (lambda name=name, call=call: rotate(name, call)) for name, (call, _) in calls.items()}
        for run in runs.values():
            run()
        self.sample_beside(case)
        clocks = {name: call.clock for name, (call, _) in calls.items() if call.clock}
        times = measure.interleaved(runs, self.device, self.options.seconds, clocks=clocks)
        self.sample_beside(case)
        for name, (_, facts) in calls.items():
            median = statistics.median(times[name])
            entry["calls"][name] = {
                "median_ms": median * 1e3, "flops_per_second": case.flops / median,
                "kv_bytes_per_second": case.kv_bytes / median, "times_ms": [t * 1e3 for t in times[name]], **facts}
        medians = {name: values["median_ms"] for name, values in entry["calls"].items()}
        theirs = {name: ms for name, ms in medians.items() if name not in OURS}
        entry["best_peer"] = min(theirs, key=theirs.get, default=None)
        entry["ratio_to_best_peer"] = theirs[entry["best_peer"]] / medians["tandem"] if theirs else None
        entry["ratio_to_own_dense"] = (medians["tandem dense"] / medians["tandem"] if "tandem dense" in medians
                                       else None)
        return entry

    def sample_beside(self, case):
        """The CPU's ceilings beside each case: its clock is not constant."""
        if self.device == "cpu":
            if case.group == "decode":
                self.ceilings.sample_cpu_read()
            else:
                self.ceilings.sample_cpu_peaks()


def print_entry(entry, device):
    decode = entry["group"] == "decode"
    unit = ("GB/s of K and V" if decode else "GFLOP/s") if device == "cpu" else ("TB/s of K and V" if decode
                                                                               else "TFLOP/s")
    scale = 1e-9 if device == "cpu" else 1e-12
    rate = "kv_bytes_per_second" if decode else "flops_per_second"
    ours = entry["calls"]["tandem"]
    parts = [f"{name} {values[rate] * scale:.4g}" for name, values in entry["calls"].items()]
    ratios = [f"{text} {value:.2f}" for text, value in
              (("of best peer", entry["ratio_to_best_peer"]), ("of own dense", entry["ratio_to_own_dense"])) if value]
    error = ours.get("error_over_bound")
    print(f"{entry['case'].removeprefix('forward/'):52s} {ours['kernel']:26s} {', '.join(parts)} {unit}; "
          f"{', '.join(ratios)}; error/bound {'?' if error is None else format(error, '.2g')}", flush=True)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [word for word in text.split(",") if word]
    parser.add_argument("--library", required=True, help="path of libtandem.so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of everybody (0: all that may be used)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per call and case (0.3)")
    parser.add_argument("--groups", type=words, default=[], help="only these groups of cases: " +
                        " ".join(dict.fromkeys(cases.group_names("cuda") + cases.group_names("cpu"))))
    parser.add_argument("--filter", type=words, default=[], help="only cases whose names contain one of these")
    parser.add_argument("--peers", type=words, help="only these peers, by name; '' for none")
    parser.add_argument("--kernel", help="ours by this kernel")
    parser.add_argument("--compile-seconds", type=float, default=60, help="for FlexAttention and FlashAttention-4 in all (60; 0: without)")
    parser.add_argument("--judge-pairs", type=int, default=1 << 20, help="rows are sampled above this (2^20)")
    parser.add_argument("--stamp", help="stamp file of the bundle that the library is from")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args()


def main():
    options = parse_options()
    table = cases.cases(options.device, options.groups, options.filter)
    if options.list:
        for case in table:
            print(f"{case.group:8s} {case.name}")
        return
    torch.manual_seed(1)
    start = time.monotonic()
    with torch.no_grad():
        bench = Bench(options)
        measure.warm_up(options.device, 1.0)
        bench.ceilings.sample()
        report = {"format": 2, "device_type": options.device, "device": bench.library.device(bench.device_type),
                  "machine": machine.describe(torch, options.device, bench.threads),
                  "versions": machine.versions(torch), "stamp": machine.stamp(options.stamp),
                  "seconds": options.seconds, "absent": bench.absent, "results": [], "failed": {}}
        for name, reason in bench.absent.items():
            print(f"absent: {name}: {reason}")
        for case in table:
            try:
                entry = bench.measure(case)
                report["results"].append(entry)
                print_entry(entry, options.device)
            except (RuntimeError, MemoryError) as error:
                report["failed"][case.name] = str(error)
                print(f"{case.name}: FAILED: {error}", flush=True)
            report["ceilings"] = bench.ceilings.result()
            if options.json:
                machine.write_json(report, options.json)
        bench.ceilings.sample()
        report["ceilings"] = bench.ceilings.result()
        report["wall_seconds"] = time.monotonic() - start
        if options.json:
            machine.write_json(report, options.json)
    for name, values in report["ceilings"].items():
        print(f"ceiling: {name}: median {values['median']:.4g}, best {values['best']:.4g}")
    print(f"{len(report['results'])} cases in {report['wall_seconds']:.0f} s, {len(report['failed'])} failed")


if __name__ == "__main__":
    main()
