"""What the accuracy report asks of every kernel and every peer. Needs nothing but Python.

A case is one small problem. Series vary one thing at a time; those of `series` "hostile" have answers that are right or
wrong by definition: fully masked rows, finfo.min, NaN and infinities where nobody may look.
"""

import dataclasses

HEAD_DIMS = (8, 16, 24, 32, 40, 64, 80, 96, 112, 128, 160, 192, 224, 256)
LENGTHS = (1, 7, 63, 64, 65, 129, 512, 2048, 4096)
SCALES = (0.0, 1e-6, 0.1, 1.0, 8.0, 64.0, -1.0, -8.0)  # times 1 / sqrt(dim)
MASKS = ("none", "causal", "window", "boolean", "padded", "bias", "bias_inf")
HOSTILE = {
    "empty rows": "boolean mask, rows 5 to 8 and 100 see nothing, nor does anybody see the last 40 keys",
    "-inf rows": "the same as a bias of -inf",
    "finfo.min rows": "the same rows with a bias of finfo.min, which is a number: these rows are the mean of V",
    "NaN in masked K": "boolean mask; the last 40 keys, which nobody sees, are NaN",
    "NaN in masked V": "boolean mask; the values of those keys are NaN",
    "inf in masked V": "boolean mask; the values of those keys are infinite",
    "NaN in visible V": "no mask; one value is NaN: its column has to be NaN, and no other",
    "scores of 1e4": "q and k such that scores reach ten thousand and more",
}
HIDDEN_KEYS = 40
HIDDEN_ROWS = (5, 6, 7, 8, 100)


@dataclasses.dataclass(frozen=True)
class Case:
    series: str
    label: str  # the value that varies
    dtype: str
    length: int = 256  # of queries and keys
    dim: int = 64
    scale: float | None = None
    mask: str = "none"

    batch = 2
    heads = 2
    kv_heads = 2
    is_packed = False
    document_mean = 0

    @property
    def window(self):
        """Keys before the query's own."""
        return 32 if self.mask == "window" else 0

    @property
    def q_len(self):
        return self.length

    @property
    def kv_len(self):
        return self.length


def cases(dtype):
    for dim in HEAD_DIMS:
        yield Case("head dim", str(dim), dtype, dim=dim)
    for length in LENGTHS:
        yield Case("length", str(length), dtype, length=length)
    for scale in SCALES:
        yield Case("scale", f"{scale:g}", dtype, scale=scale / 8.0)
    for mask in MASKS:
        yield Case("mask", mask, dtype, mask=mask)
    for label in HOSTILE:
        yield Case("hostile", label, dtype, mask=label)
