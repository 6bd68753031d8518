"""The peers that come with PyTorch, and those with its interface. A peer is a function of Inputs that prepares what
may be prepared outside the measurement and gives a Call; one that cannot serve raises, and the reason is kept."""

import dataclasses
import typing

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import cases


class Declined(Exception):
    """Why a peer does not take a case."""


class NotMeant(Exception):
    """A peer that is there for other cases only."""


@dataclasses.dataclass
class Call:
    """run(copy) computes with that copy of the keys and values; arrange(what run gave) is [B, H, S, D], or
    [T, H, D] in packed cases. tensors: the q, k and v that it reads, for copy 0, where it arranged them itself.
    clock: runs it and gives the seconds, where it does not compute on PyTorch's current stream."""

    run: typing.Callable
    arrange: typing.Callable = lambda out: out
    tensors: tuple = ()
    clock: typing.Callable | None = None


def _sdpa(backend):
    def prepare(inputs):
        case = inputs.case
        mask = inputs.torch_mask
        causal = inputs.is_causal and mask is None
        gqa = case.heads != case.kv_heads

        def run(copy):
            k, v = inputs.kv[copy]
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    inputs.q, k, v, attn_mask=mask, is_causal=causal, scale=inputs.scale,
                    enable_gqa=gqa)
        return Call(run, inputs.packed if case.is_packed else lambda out: out)
    return prepare


def _sdpa_per_document(inputs):
    """Packed documents on the CPU without a mask: one call for each."""
    case = inputs.case
    if not case.is_packed:
        raise NotMeant
    spans = list(zip(inputs.cu_seqlens[:-1].tolist(), inputs.cu_seqlens[1:].tolist()))
    out = torch.empty_like(inputs.q)

    def run(copy):
        k, v = inputs.kv[copy]
        for begin, end in spans:
            out[:, :, begin:end] = torch.nn.functional.scaled_dot_product_attention(
                inputs.q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], is_causal=inputs.is_causal)
        return out
    return Call(run, inputs.packed)


def _flash2(inputs):
    """FlashAttention-2 itself where scaled_dot_product_attention cannot say what it serves: packed, windows."""
    case = inputs.case
    flash = torch.ops.aten._flash_attention_forward
    if case.is_packed:
        q, (k, v) = inputs.packed(inputs.q), map(inputs.packed, inputs.kv[0])
        cu, longest = inputs.cu_seqlens, inputs.longest
        return Call(lambda _: flash(q, k, v, cu, cu, longest, longest, 0.0, inputs.is_causal, False)[0],
                    tensors=(q, k, v))
    if case.mask == "window":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (inputs.q, *inputs.kv[0]))
        run = lambda _: flash(q, k, v, None, None, case.q_len, case.kv_len, 0.0, False, False,
                              window_size_left=case.window, window_size_right=0)[0]
        return Call(run, lambda out: out.transpose(1, 2), (q, k, v))
    return _sdpa(SDPBackend.FLASH_ATTENTION)(inputs)


def _efficient(inputs):
    """The memory-efficient kernel, with its own interface for packed sequences and windows."""
    case = inputs.case
    efficient = torch.ops.aten._efficient_attention_forward
    if not case.is_packed and case.mask != "window":
        return _sdpa(SDPBackend.EFFICIENT_ATTENTION)(inputs)
    q, k, v = (t.transpose(1, 2).contiguous() for t in (inputs.q, *inputs.kv[0]))
    causal_top_left = 1
    kind = causal_top_left if inputs.is_causal or case.window else 0
    if case.is_packed:
        cu, longest = inputs.cu_seqlens, inputs.longest
        return Call(lambda _: efficient(q, k, v, None, cu, cu, longest, longest, 0.0, kind)[0], lambda out: out[0],
                    (q, k, v))
    run = lambda _: efficient(q, k, v, None, None, None, None, None, 0.0, kind, window_size=case.window + 1)[0]
    return Call(run, lambda out: out.transpose(1, 2), (q, k, v))


def _flex(inputs):
    """Compiled FlexAttention; its block mask is made outside the measurement, as our mask plan is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # slow to import
    case = inputs.case
    visible, score = None, None
    if case.document_mean:
        document, causal = inputs.document, inputs.is_causal
        visible = lambda b, h, i, j: (document[i] == document[j]) & ((j <= i) | (not causal))
    elif inputs.is_causal:
        visible = lambda b, h, i, j: j <= i
    elif case.mask == "window":
        visible = lambda b, h, i, j: (j <= i) & (j >= i - case.window)
    elif case.mask == "prefix":
        visible = lambda b, h, i, j: (j <= i) | (j < case.prefix)
    elif case.mask == "blocks":
        block_map, block = inputs.block_map, cases.BLOCK
        visible = lambda b, h, i, j: block_map[i // block, j // block]
    elif case.mask == "padded":
        lengths = inputs.kv_lengths
        visible = lambda b, h, i, j: j < lengths[b]
    elif inputs.dense is not None:
        dense = inputs.dense
        visible = lambda b, h, i, j: dense[b, 0, i, j]
    elif inputs.bias is not None:
        bias, per_head = inputs.bias, case.mask == "bias_per_head"
        score = (lambda s, b, h, i, j: s + bias[b, h, i, j]) if per_head else (
            lambda s, b, h, i, j: s + bias[b, 0, i, j])
    blocks = None
    if visible is not None:
        batch = case.batch if case.mask in ("boolean", "padded") else None
        blocks = create_block_mask(visible, batch, None, case.q_len, case.kv_len, device=inputs.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads != case.kv_heads
    run = lambda copy: compiled(inputs.q, *inputs.kv[copy], score_mod=score, block_mask=blocks, enable_gqa=gqa)
    return Call(run, inputs.packed if case.is_packed else lambda out: out)


def _flash_package(attention, varlen, **settings):
    """FlashAttention-3 and -4: [B, S, H, D], causal at the bottom right, which is the same for square cases."""
    def prepare(inputs):
        case = inputs.case
        if not case.is_packed and case.mask != "window" and inputs.torch_mask is not None:
            raise Declined("it takes no mask and no bias")
        first = lambda result: result[0] if isinstance(result, tuple) else result
        scale = {} if inputs.scale is None else {"softmax_scale": inputs.scale}
        if case.is_packed:
            if varlen is None:
                raise Declined("this wheel has no interface for packed sequences")
            q, (k, v) = inputs.packed(inputs.q), map(inputs.packed, inputs.kv[0])
            more = dict(cu_seqlens_q=inputs.cu_seqlens, cu_seqlens_k=inputs.cu_seqlens,
                        max_seqlen_q=inputs.longest, max_seqlen_k=inputs.longest, causal=inputs.is_causal, **settings)
            return Call(lambda _: first(varlen(q, k, v, **more)))
        window = {"window_size": (case.window, 0)} if case.window else {}
        q = inputs.q.transpose(1, 2).contiguous()
        kv = [tuple(t.transpose(1, 2).contiguous() for t in pair) for pair in inputs.kv]
        return Call(lambda copy: first(attention(q, *kv[copy], causal=inputs.is_causal, **window, **scale,
                                                 **settings)),
                    lambda out: out.transpose(1, 2))
    return prepare


def _fa3():
    import fa3_fwd_interface as fa3
    return _flash_package(fa3.flash_attn_func, fa3.flash_attn_varlen_func, num_splits=0)  # 0: its heuristic


def _fa4():
    from flash_attn.cute import interface as fa4
    return _flash_package(fa4.flash_attn_func, getattr(fa4, "flash_attn_varlen_func", None))


def peers(device):
    """Peers by name, and why others are absent."""
    if device == "cpu":
        return {"flash_cpu": _sdpa(SDPBackend.FLASH_ATTENTION), "flash_cpu per document": _sdpa_per_document,
                "math": _sdpa(SDPBackend.MATH), "flex": _flex}, {}
    found = {"FA2": _flash2, "efficient": _efficient, "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION), "flex": _flex,
             "math": _sdpa(SDPBackend.MATH)}
    absent = {}
    for name, load in (("FA3", _fa3), ("FA4", _fa4)):
        try:
            found[name] = load()
        except Exception as error:  # an optional wheel can fail in any way when it is imported
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent
