"""The tensors of a case of cases.py: random, on its device, with the mask in Tandem's form and in PyTorch's."""

import functools

import torch

import cases
import tandem_ctypes as tandem

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Inputs:
    """q, k, v are [B, H, S, D], packed cases B = 1; `kv` holds as many copies of k and v as a benchmark rotates. The
    scale is the default one."""

    def __init__(self, case, copies=1):
        self.case, self.device = case, case.device
        dtype = self.dtype = DTYPES[case.dtype]
        self.q = torch.randn(case.batch, case.heads, case.q_len, case.dim, device=self.device, dtype=dtype)
        shape = (case.batch, case.kv_heads, case.kv_len, case.dim)
        self.kv = [tuple(torch.randn(shape, device=self.device, dtype=dtype) for _ in range(2))
                   for _ in range(copies)]
        if case.mask == "growing":
            self.q *= 2
            growth = (1 + torch.arange(case.kv_len, device=self.device) / 256)[:, None]
            self.kv = [((k * growth).to(dtype), v) for k, v in self.kv]
        self.bias = self.dense = self.scale = None
        if case.mask == "boolean":
            self.dense = torch.rand(case.batch, 1, case.q_len, case.kv_len, device=self.device) < cases.VISIBLE
        elif case.mask in ("bias", "bias_per_head"):
            heads = case.heads if case.mask == "bias_per_head" else 1
            self.bias = torch.randn(case.batch, heads, case.q_len, case.kv_len, device=self.device, dtype=dtype)
        if case.document_mean:
            lengths = torch.tensor([0] + case.documents())
            self.cu_seqlens = lengths.cumsum(0).to(torch.int32).to(self.device)
            self.longest = int(lengths.max())
            document = torch.repeat_interleave(torch.arange(len(lengths) - 1), lengths[1:])
            self.document = document.to(self.device)
        elif case.mask == "prefix":
            self.prefix = torch.tensor([case.prefix], dtype=torch.int32, device=self.device)
        elif case.mask == "blocks":
            longest = max(map(len, case.blocks))
            listed = [row + [0] * (longest - len(row)) for row in case.blocks]
            counts = [len(row) for row in case.blocks]
            self.blocks = [torch.tensor(t, dtype=torch.int32, device=self.device)[None, None]
                           for t in (counts, listed)]
            self.block_map = torch.zeros(2 * [len(counts)], dtype=torch.bool)
            for i, row in enumerate(case.blocks):
                self.block_map[i, row] = True
            self.block_map = self.block_map.to(self.device)
        elif case.mask == "padded":
            self.kv_lengths = torch.tensor(case.kv_lengths(), dtype=torch.int32, device=self.device)

    @property
    def k(self):
        return self.kv[0][0]

    @property
    def v(self):
        return self.kv[0][1]

    @property
    def is_causal(self):
        return self.case.mask in ("causal", "packed_causal", "segments_causal")

    def packed(self, tensor):
        """[1, H, T, D] as [T, H, D], contiguous."""
        return tensor[0].transpose(0, 1).contiguous()

    def description(self, device, k, v):
        """Tandem's q, k, v and the mask's terms, on a device: the case's own, or "cpu" for the oracle."""
        case = self.case
        to = lambda t: t.to(device)
        terms = []
        if case.is_packed:
            terms.append(("packed", to(self.cu_seqlens), self.longest if device == "cuda" else 0))
        elif case.document_mean:
            terms.append(("segments", to(self.document)[None].to(torch.int32)))
        if self.is_causal:
            terms.append(("causal", tandem.TOP_LEFT))
        elif case.mask == "prefix":
            terms.append(("prefix", to(self.prefix), tandem.TOP_LEFT))
        elif case.mask == "blocks":
            terms.append(("blocks", cases.BLOCK, *map(to, self.blocks)))
        elif case.mask == "window":
            terms.append(("window", case.window, 0, tandem.TOP_LEFT))
        elif case.mask == "padded":
            terms.append(("kv_lengths", to(self.kv_lengths)))
        elif case.mask == "boolean":
            terms.append(("dense", to(self.dense)))
        arrange = self.packed if case.is_packed else lambda t: t
        tensors = [to(arrange(t)) for t in (self.q, k, v)]
        return tensors, terms, to(self.bias) if self.bias is not None else None

    @functools.cached_property
    def torch_mask(self):
        """scaled_dot_product_attention's attn_mask; None where there is none, or where is_causal says it all."""
        case = self.case
        if self.bias is not None:
            return self.bias
        if self.dense is not None:
            return self.dense
        i = torch.arange(case.q_len, device=self.device)[:, None]
        j = torch.arange(case.kv_len, device=self.device)[None, :]
        if case.document_mean:
            mask = self.document[:, None] == self.document[None, :]
            return (mask & (j <= i) if self.is_causal else mask)[None, None]
        if case.mask == "window":
            return ((j <= i) & (j >= i - case.window))[None, None]
        if case.mask == "prefix":
            return ((j <= i) | (j < case.prefix))[None, None]
        if case.mask == "blocks":
            return self.block_map[i // cases.BLOCK, j // cases.BLOCK][None, None]
        if case.mask == "padded":
            return (j < self.kv_lengths[:, None, None, None]).expand(case.batch, 1, 1, case.kv_len)
        return None
