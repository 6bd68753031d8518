"""The cases that Tandem and its peers are timed on: one table, for both devices. Needs nothing but Python.

A case is a shape, a type and a mask; its name is that of docs/benchmarks.md and of tandem_benchmark:
forward/cpu/bf16/b1/h8/hk8/q2048/k2048/d128/causal. "growing" has no mask, but queries twice as large and keys that grow
along the row, by 1 + j / 256. How its work is counted:

- pairs: visible (query, key) pairs of one head, summed over the batch. A random dense mask leaves every tile partial,
  so all pairs count there, for everybody.
- flops: 4 * heads * dim * pairs, and 10 times that product for the backward pass.
- kv_bytes: keys and values, read once. io_bytes: besides these queries, output and the mask or bias given.
"""

import dataclasses
import functools
import random

ELEMENT_SIZE = {"f32": 4, "f16": 2, "bf16": 2}
VISIBLE = 0.9  # of the pairs of a boolean mask
BLOCK = 128  # rows and keys of a block of mask "blocks"


@dataclasses.dataclass(frozen=True)
class Case:
    group: str  # "backward" for gradients, else of forward passes
    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    mask: str = "none"
    window: int = 0  # mask "window": keys before the query's own that it sees
    document_mean: int = 0  # masks "packed", "packed_causal" and "segments_causal": all of q_len is documents of this
    # mean length, which "segments_causal" keeps in one sequence
    prefix: int = 0  # mask "prefix": keys that all queries see, beside those that a causal mask shows

    @property
    def is_backward(self):
        return self.group == "backward"

    @property
    def mask_name(self):
        return f"{self.mask}{self.window or self.document_mean or self.prefix or ''}"

    @property
    def name(self):
        return (f"{'backward' if self.is_backward else 'forward'}/{self.device}/{self.dtype}/b{self.batch}/h{self.heads}/hk{self.kv_heads}"
                f"/q{self.q_len}/k{self.kv_len}/d{self.dim}/{self.mask_name}")

    @property
    def is_packed(self):
        return self.mask in ("packed", "packed_causal")

    def documents(self):
        """Lengths of the packed documents: from a quarter of the mean to seven quarters, the last one cut."""
        source = random.Random(self.document_mean)
        lengths, left = [], self.q_len
        while left > 0:
            length = min(left, source.randint(self.document_mean // 4, self.document_mean * 7 // 4))
            lengths.append(length)
            left -= length
        return lengths

    def kv_lengths(self):
        """Mask "padded": the keys of each sequence, from all of them down to a quarter in equal steps."""
        steps = max(self.batch - 1, 1)
        return [self.kv_len - self.kv_len * 3 * b // (4 * steps) for b in range(self.batch)]

    @functools.cached_property
    def blocks(self):
        """Mask "blocks": for each block of rows the blocks of keys that it sees: the first one, its own and the three
        before it, and about one in eight of the others before it."""
        source = random.Random(self.q_len)
        return [[j for j in range(i + 1) if j == 0 or j > i - 4 or source.random() < 1 / 8]
                for i in range(self.q_len // BLOCK)]

    @property
    def pairs(self):
        if self.document_mean:
            causal = self.mask != "packed"
            return sum(n * (n + 1) // 2 if causal else n * n for n in self.documents())
        if self.mask == "blocks":
            return self.batch * BLOCK * BLOCK * sum(map(len, self.blocks))
        if self.mask == "prefix":
            return self.batch * sum(max(i + 1, self.prefix) for i in range(self.q_len))
        if self.mask == "padded":
            return self.q_len * sum(self.kv_lengths())
        if self.mask in ("causal", "window"):  # top-left, and as many queries as keys
            widest = self.window + 1 if self.window else self.kv_len
            return self.batch * sum(min(i + 1, widest) for i in range(self.q_len))
        return self.batch * self.q_len * self.kv_len

    @property
    def flops(self):
        return (10 if self.is_backward else 4) * self.heads * self.dim * self.pairs

    @property
    def kv_bytes(self):
        return 2 * self.batch * self.kv_heads * self.kv_len * self.dim * ELEMENT_SIZE[self.dtype]

    def rotated_copies(self, cache_bytes):
        """Copies of keys and values to go through so that decoding on the CPU reads memory, not a cache: four times
        its size, and one more."""
        if self.device != "cpu" or self.group != "decode":
            return 1
        return -(-4 * cache_bytes // self.kv_bytes) + 1

    @property
    def io_bytes(self):
        queries = 2 * self.batch * self.heads * self.q_len * self.dim * ELEMENT_SIZE[self.dtype]
        scores = self.batch * self.q_len * self.kv_len
        extra = {"boolean": scores, "bias": scores * ELEMENT_SIZE[self.dtype],
                 "bias_per_head": scores * self.heads * ELEMENT_SIZE[self.dtype]}
        return self.kv_bytes + queries + extra.get(self.mask, 0)


def _square(group, device, dtype, batch, heads, length, dim, mask="none", kv_heads=None, **more):
    return Case(group, device, dtype, batch, heads, kv_heads or heads, length, length, dim, mask, **more)


def cuda_cases():
    """Hidden size 2048 and 16k tokens, but for decoding. What matters most comes first: compiling peers may run out
    of time."""
    shapes = {128: ((4, 16, 4096), (16, 16, 1024), (1, 16, 16384)),
              64: ((4, 32, 4096), (16, 32, 1024), (1, 32, 16384)),
              256: ((4, 8, 4096), (1, 8, 16384))}
    dense = [_square("dense", "cuda", "bf16", *shape, dim, mask)
             for dim in shapes for shape in shapes[dim] for mask in ("none", "causal")]
    first = [case for case in dense if case.q_len == 4096 and case.dim <= 128]
    yield from first
    yield _square("sparse", "cuda", "bf16", 4, 16, 4096, 128, "prefix", prefix=1024)
    yield _square("sparse", "cuda", "bf16", 1, 16, 16384, 128, "segments_causal", document_mean=1024)
    yield _square("sparse", "cuda", "bf16", 1, 16, 16384, 128, "blocks")
    for mask in ("boolean", "bias", "bias_per_head"):
        yield _square("mask", "cuda", "bf16", 4, 16, 4096, 128, mask)
    for mask in ("boolean", "bias"):
        yield _square("mask", "cuda", "bf16", 4, 32, 4096, 64, mask)
    yield _square("sparse", "cuda", "bf16", 1, 16, 16384, 128, "packed_causal", document_mean=1024)
    yield _square("sparse", "cuda", "bf16", 1, 16, 65536, 128, "packed_causal", document_mean=4096)
    yield _square("sparse", "cuda", "bf16", 1, 16, 16384, 128, "window", window=1024)
    yield _square("dense", "cuda", "bf16", 4, 16, 4096, 128, "growing")
    yield _square("gqa", "cuda", "bf16", 4, 32, 4096, 128, "causal", kv_heads=8)
    for batch, kv_len in ((16, 8192), (1, 65536), (128, 2048)):
        yield Case("decode", "cuda", "bf16", batch, 32, 8, 1, kv_len, 128)
    for dim, mask in ((128, "none"), (128, "causal"), (128, "boolean"), (64, "none")):
        yield _square("f32", "cuda", "f32", 4, 16, 4096, dim, mask)
    for mask in ("none", "causal"):
        yield _square("f16", "cuda", "f16", 4, 16, 4096, 128, mask)
    yield from (case for case in dense if case not in first)
    yield from _cuda_backward_cases()


def _cuda_backward_cases():
    backward = lambda dtype, *shape, **more: _square("backward", "cuda", dtype, *shape, **more)
    for shape in ((4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128), (1, 32, 16384, 64), (4, 8, 4096, 256),
                  (16, 16, 1024, 128)):
        for mask in ("none", "causal"):
            yield backward("bf16", *shape, mask)
    for shape in ((4, 16, 4096, 128), (4, 32, 4096, 64)):
        yield backward("bf16", *shape, "boolean")
    yield backward("bf16", 4, 16, 4096, 128, "bias")
    yield backward("bf16", 1, 16, 16384, 128, "packed_causal", document_mean=1024)
    yield backward("bf16", 1, 16, 65536, 128, "packed_causal", document_mean=4096)
    yield backward("bf16", 1, 16, 16384, 128, "window", window=1024)
    yield backward("bf16", 4, 32, 4096, 128, "causal", kv_heads=8)
    yield backward("f16", 4, 16, 4096, 128)
    for dim in (128, 64):
        yield backward("f32", 1, 16, 4096, dim)


def cpu_cases():
    dtypes = ("f32", "bf16", "f16")
    for dtype in dtypes:
        for dim in (64, 128):
            for mask in ("none", "causal"):
                yield _square("dense", "cpu", dtype, 1, 8, 2048, dim, mask)
            for mask in ("boolean", "bias"):
                yield _square("mask", "cpu", dtype, 1, 8, 2048, dim, mask)
    for dtype in dtypes:
        yield Case("decode", "cpu", dtype, 1, 32, 8, 1, 8192, 128)
        yield Case("decode", "cpu", dtype, 8, 32, 8, 1, 2048, 128)
    for dtype in dtypes:
        yield _square("sparse", "cpu", dtype, 1, 8, 2048, 64, "packed", document_mean=200)
        yield _square("sparse", "cpu", dtype, 4, 8, 1024, 64, "padded")
        yield _square("sparse", "cpu", dtype, 1, 8, 2048, 64, "window", window=256)
        yield _square("gqa", "cpu", dtype, 1, 32, 1024, 128, "causal", kv_heads=8)
    for dtype in dtypes:
        yield _square("short", "cpu", dtype, 1, 8, 512, 64)
        yield _square("long", "cpu", dtype, 1, 8, 8192, 128)
    for dtype in dtypes:
        for heads in (2, 16):  # for one thread, and for many
            for dim in (64, 128):
                yield _square("backward", "cpu", dtype, 1, heads, 2048, dim)


def cases(device, groups=(), filters=()):
    """Those of some groups (none given: all) whose name contains one of the filters (none given: all)."""
    table = cuda_cases() if device == "cuda" else cpu_cases()
    return [case for case in table if (not groups or case.group in groups) and
            (not filters or any(text in case.name for text in filters))]


def group_names(device):
    return list(dict.fromkeys(case.group for case in cases(device)))
