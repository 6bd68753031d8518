"""Attention with gradients for PyTorch modules: Tandem as an autograd.Function over its C interface, and PyTorch's math
path as the comparison. Both take q [B, S, Hq, D] and k, v [B, S, Hk, D], and give [B, S, Hq, D]."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "bench"))
import tandem_ctypes as tandem  # noqa: E402  (the binding is the benchmarks')


class TandemFunction(torch.autograd.Function):
    """Rows without keys give zeros, and zero gradients: neither pass asks which they are."""

    @staticmethod
    def forward(ctx, q, k, v, library, terms, kernels):
        ctx.attention = tandem.Attention(library, torch, q, k, v, terms)
        ctx.inputs, ctx.kernels = (q, k, v), kernels
        kernels.add(ctx.attention.kernel)
        return ctx.attention().detach()  # another tensor: the result must not own itself through ctx

    @staticmethod
    def backward(ctx, dout):
        backward = tandem.BackwardAttention(ctx.attention, *ctx.inputs, dout)
        ctx.kernels.add(backward.kernel)
        backward()
        return backward.dq, backward.dk, backward.dv, None, None, None


class Mask:
    """A batch's causal document mask, told in each way that attention may take it."""

    FORMS = ("packed", "segments", "dense")

    def __init__(self, batch, rows, device):
        index = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
        self.rows, causal = rows, ("causal", tandem.TOP_LEFT)
        segments = index(batch.segments).view(rows, -1)
        starts, lengths = index(batch.starts), index(batch.lengths)
        row_length = segments.shape[1]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
        self.dense = same.tril()[:, None]  # [B, 1, S, S]
        longest = 0 if starts.device.type == "cpu" else row_length
        self.terms = {"packed": [("packed", starts, longest), ("lengths", lengths), causal],
                      "segments": [("segments", segments), causal],
                      "dense": [("dense", self.dense)]}


class Tandem:
    """kernels: the names of those that ran."""

    def __init__(self, library):
        self.library, self.kernels = library, set()

    def __call__(self, q, k, v, mask, form):
        if form == "packed":  # [B * S, H, D]; the pieces of all rows are sequences
            arrange, restore = (lambda x: x.flatten(0, 1)), (lambda x: x.unflatten(0, (mask.rows, -1)))
        else:  # [B, H, S, D]
            arrange = restore = lambda x: x.transpose(1, 2)
        return restore(TandemFunction.apply(arrange(q), arrange(k), arrange(v), self.library, mask.terms[form],
                                            self.kernels))


class Math:
    def __init__(self):
        self.kernels = {"math"}

    def __call__(self, q, k, v, mask, form):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), mask.dense, enable_gqa=True).transpose(1, 2)
