"""Gradients beside the peers': the calls of peers.py for cases of the group "backward".

A call computes dQ, dK and dV, and dBias where there is a bias, from a forward pass that ran before. "tandem" is as fast as
it can be, "tandem deterministic" asks for the same bits on every run. The largest error of a gradient, over that gradient's
largest element, is held against f64 mathematics on the first sequence and key head, up to 4096 rows.
"""

import torch

import peers_jax
import peers_torch
import tandem_ctypes as tandem

MOST_JUDGED_ROWS = 4096


def leaves(inputs, call=None):
    tensors = (call and call.tensors) or (inputs.q, inputs.k, inputs.v)
    return [*tensors] + ([inputs.bias] if inputs.bias is not None else [])


def require_gradients(inputs):
    for tensor in leaves(inputs):
        tensor.requires_grad_()
    inputs.dout = torch.randn_like(inputs.q)


def ours(library, inputs, threads=0):
    tensors, terms, bias = inputs.description(inputs.device, inputs.k, inputs.v)
    dout = inputs.packed(inputs.dout) if inputs.case.is_packed else inputs.dout
    calls, declined = {}, {}
    for name, deterministic in (("tandem", False), ("tandem deterministic", True)):
        forward = tandem.Attention(library, torch, *tensors, terms, bias, threads=threads,
                                   prepared=inputs.dense is not None)
        forward()
        backward = tandem.BackwardAttention(forward, *tensors, dout, bias, deterministic=deterministic)

        def run(_, backward=backward):
            backward()
            return backward.dq, backward.dk, backward.dv
        facts = {"kernel": backward.kernel, "workspace_bytes": backward.workspace_size,
                 "mask_plan_bytes": forward.mask_plan_size}
        if deterministic:
            first = [gradient.clone() for gradient in run(0)]
            facts["same_bits"] = all(torch.equal(a, b) for _ in range(10) for a, b in zip(first, run(0)))
        calls[name] = (peers_torch.Call(run), facts)
    return calls, declined


def gradients_of(name, prepare):
    """A peer's backward pass, from what prepares its forward pass."""
    if name == "FA3":
        return peers_jax.flash3_gradients

    def prepare_gradients(inputs):
        with torch.enable_grad():
            forward = prepare(inputs)
            wanted = leaves(inputs, forward)
            for tensor in wanted:
                tensor.detach_().requires_grad_()
            out = forward.run(0)
        dout = inputs.dout
        if forward.tensors:
            dout = inputs.packed(dout) if inputs.case.is_packed and out.dim() == 3 else dout.transpose(1, 2)
        run = lambda _: torch.autograd.grad(out, wanted, dout, retain_graph=True)[:3]
        return peers_torch.Call(run, tensors=forward.tensors)
    return prepare_gradients


def exact_gradients(inputs):
    """Of the first sequence and key head, with its query heads, in f64."""
    group = inputs.case.heads // inputs.case.kv_heads
    first = lambda tensor, heads: tensor[:1, :heads].detach().double()
    leaf = [first(inputs.q, group), first(inputs.k, 1), first(inputs.v, 1)]
    with torch.enable_grad():
        q, k, v = (tensor.requires_grad_() for tensor in leaf)
        scores = q @ k.transpose(-1, -2) * inputs.case.dim**-0.5
        mask = inputs.torch_mask
        if inputs.is_causal and mask is None:
            mask = torch.ones(inputs.case.q_len, inputs.case.kv_len, dtype=torch.bool, device=inputs.device).tril()
        if mask is not None:
            mask = mask[:1, :group].detach() if mask.dim() == 4 else mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch.autograd.grad(torch.softmax(scores, -1) @ v, leaf, first(inputs.dout, group))


def judge(inputs, calls):
    """Adds each call's largest error to its facts."""
    if inputs.case.is_packed or inputs.case.q_len > MOST_JUDGED_ROWS:
        return
    group = inputs.case.heads // inputs.case.kv_heads
    exact = exact_gradients(inputs)
    for call, facts in calls.values():
        errors = []
        for gradient, want, heads in zip(map(call.arrange, call.run(0)), exact, (group, 1, 1)):
            if call.tensors:  # [B, S, H, D]
                gradient = gradient.transpose(1, 2)
            difference = gradient[:1, :heads].double() - want
            errors.append(float(difference.abs().max() / want.abs().max()))
        facts["max_error"] = max(errors)
