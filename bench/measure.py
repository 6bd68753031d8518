"""Timing calls in turn, on either device, and the ceilings of the device."""

import random
import statistics
import time

import torch

CPU_PAUSE = 0.003  # seconds before each turn: the threads of whoever ran before stop spinning meanwhile


def on_cpu(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class OnCuda:
    """Device time between two events. The device waits in a kernel of its own until the host has queued
    everything, so that slow launches do not count."""

    def __init__(self):
        self.cycles = 1_000_000

    def __call__(self, call):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.cycles)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def interleaved(calls, device, seconds, least=5, clocks={}):
    """Times of each call by name, run in turn until each has had its seconds on average, at least `least` times but
    for calls so slow that this would take three times as long. Every round has an order of its own: what a call finds
    in the caches depends on the one before it, which for decoding is worth up to a tenth.

    calls: functions of no argument that have run once already. On the CPU a turn is several runs where they are
    short, after one that is not counted and wakes the threads. clocks: those that time themselves, by name.
    """
    once = on_cpu if device == "cpu" else OnCuda()
    timed = {name: clocks.get(name, lambda call=call: once(call)) for name, call in calls.items()}
    runs = {name: 1 for name in calls}
    if device == "cpu":
        for name, call in calls.items():
            runs[name] = min(8, int(0.02 / max(once(call), 1e-6)) + 1)
    times = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    rounds = 0
    shuffle = random.Random(1)
    while (time.perf_counter() < deadline or rounds < 2 or
           rounds < least and time.perf_counter() < deadline + 2 * seconds * len(calls)):
        for name, call in shuffle.sample(list(calls.items()), len(calls)):
            if device == "cpu":
                time.sleep(CPU_PAUSE)
                if runs[name] > 1:
                    call()
            times[name] += [timed[name]() for _ in range(runs[name])]
        rounds += 1
    return times


def summary(samples):
    return {"median": statistics.median(samples), "best": max(samples), "samples": samples}


def warm_up(device, seconds):
    """Load that brings the clocks to where they stay."""
    size = 4096 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        b = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
    return b


class Ceilings:
    """Rates per second that bound any attention here; samples gather over several calls of `sample`."""

    def __init__(self, device, threads, support, seconds):
        self.device, self.threads, self.support, self.seconds = device, threads, support, seconds
        self.samples = {}

    def _matmul(self, name, dtype):
        size = 8192
        if self.device == "cpu":
            size = 2048 if self.threads > 4 else 1024
            probe = torch.randn(256, 256).to(dtype)
            if min(on_cpu(lambda: probe @ probe) for _ in range(3)) > 2e-3:  # a type that this CPU is slow with
                size = 256
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        self._time(f"matmul {name}, FLOP/s", 2 * size**3, lambda: a @ b)

    def _time(self, name, work, call):
        call()
        times = interleaved({name: call}, self.device, self.seconds, least=3)[name]
        self.samples.setdefault(name, []).extend(work / t for t in times)

    def _support(self, name, text):
        rate = self.support.ceiling(name, self.threads, self.seconds) if self.support else None
        if rate:
            self.samples.setdefault(text, []).append(rate)

    def sample(self):
        for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
            self._matmul(name, dtype)
        count = 1 << (29 if self.device == "cuda" else 27)
        source = torch.randn(count, device=self.device)
        target = torch.empty_like(source)
        self._time("copy (read and written), bytes/s", 8 * count, lambda: target.copy_(source))
        if self.device == "cuda":
            self._time("memory read, bytes/s", 4 * count, source.sum)
        else:
            self.sample_cpu_peaks()
            self.sample_cpu_read()

    def sample_cpu_peaks(self):
        self._support("fma_flops", "FMA f32 peak, FLOP/s")
        self._support("amx_flops", "AMX bf16 peak on random data, FLOP/s")

    def sample_cpu_read(self):
        self._support("read_bytes", "memory read, bytes/s")

    def result(self):
        return {name: summary(samples) for name, samples in self.samples.items()}
