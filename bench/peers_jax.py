"""FlashAttention-3's gradients. Its wheel for PyTorch has the forward pass only; `flash-attn3-jax` has both, for JAX.

JAX computes on a stream of its own, so a turn is several runs between two looks at the clock, not between two events.
"""

import os
import time

import torch

import peers_torch

RUNS_A_TURN = 4  # what the host does around them is then a hundredth of the time


def flash3_gradients(inputs):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has the memory
    try:
        import flash_attn3_jax as flash3
        import jax
    except ImportError as error:
        raise peers_torch.Declined(f"its gradients need the wheel flash-attn3-jax: {error}") from error
    case = inputs.case
    if not case.is_packed and case.mask != "window" and inputs.torch_mask is not None:
        raise peers_torch.Declined("it takes no mask and no bias")
    arrange = inputs.packed if case.is_packed else lambda tensor: tensor.transpose(1, 2)
    given = lambda tensor: jax.dlpack.from_dlpack(arrange(tensor.detach()).contiguous())
    q, k, v, dout = map(given, (inputs.q, *inputs.kv[0], inputs.dout))
    if case.is_packed:
        cu = jax.dlpack.from_dlpack(inputs.cu_seqlens)
        forward = lambda q, k, v: flash3.flash_mha_varlen(
            q, k, v, cu, max_seqlen_q=inputs.longest, max_seqlen_k=inputs.longest, softmax_scale=case.dim**-0.5,
            is_causal=inputs.is_causal)
    else:
        window = (case.window, 0) if case.window else (-1, -1)
        forward = lambda q, k, v: flash3.flash_mha(q, k, v, is_causal=inputs.is_causal, window_size=window)
    gradients = jax.jit(lambda pullback, dout: pullback(dout))
    pullback = jax.vjp(jax.jit(forward), q, k, v)[1]
    run = lambda _: gradients(pullback, dout)

    def clock():
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(RUNS_A_TURN):
            last = run(0)
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / RUNS_A_TURN
    jax.block_until_ready(run(0))
    return peers_torch.Call(run, torch.from_dlpack, tensors=(inputs.q,), clock=clock)
