"""The correctness gates of `decode_gpu.py`: nothing is timed before they are green."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from decode_setup import reference_row
from torch import Tensor, nn
from transformers import LlamaConfig

from moba_hf import MobaCache, kernels
from moba_hf.config import LayerConfig
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.rows import Rows
from moba_hf.kernels.sparse_decode import decode_attention
from moba_hf.op.block_means import block_means_of
from moba_hf.op.sequences import Sequences, batched_table


def check(name: str, got: Tensor, expected: Tensor, share: float = 2**-6) -> None:
    """Correctness gate: allows bf16 rounding of the output and of the softmax weights, no more."""
    error, size = (got.float() - expected.float()).abs().max(), expected.float().abs().max()
    assert error <= share * size, f"{name}: wrong by {error:.2e} where values reach {size:.2e}"


def gate(cache: MobaCache, config: LlamaConfig, args: argparse.Namespace) -> None:
    """Compares decode rows with prefill rows, the reference and torch's dense attention, on cached keys."""
    first = cache.layers[0]
    length = min(8 * args.block_size * args.topk + 77, max(args.lengths))
    keys, values = first.keys[:, :, :length], first.values[:, :, :length]
    heads, device = config.num_attention_heads, keys.device
    queries = torch.randn(1, heads, 200, keys.shape[3], device=device, dtype=keys.dtype)
    rule = (args.block_size, args.topk, 0, 0)
    sequences = Sequences(batched_table(1, 200, length, device), 200, length)
    whole = kernels.select_blocks(queries, keys, sequences, LayerConfig(*rule))
    means = block_means_of(keys, None, args.block_size, "triton")
    for count in (1, 5, 16):
        some, table = queries[:, :, -count:], batched_table(1, count, length, device)
        choice = kernels.choose_blocks(some, means, table, length, *rule)
        same = choice.sort(3).values == whole[:, -count:].sort(3).values
        assert same.all(), f"{int((~same).sum())} of {same.numel()} chosen blocks differ from prefill's"
        out, _ = decode_attention(
            *(some, keys, values, choice, Sequences(table, count, length)),
            args.block_size,
            keys.shape[3] ** -0.5,
            by_row=True,
        )
        if count == 1:
            check("sparse", out[0], reference_row(some, keys, values, args))
        group = heads // keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
        exact = nn.functional.scaled_dot_product_attention(
            some.float(), *(x.float().repeat_interleave(group, 1) for x in (keys, values)), attn_mask=mask
        )
        dense, _ = kernels.dense_decode_attention(some, keys, values, table, keys.shape[3] ** -0.5)
        check("dense", dense, exact.transpose(1, 2))


def gate_model(model: Any, cache: MobaCache, config: LlamaConfig, args: argparse.Namespace) -> None:
    """Compares the attention function on the longest cache, called through the layer, with the reference."""
    first, module = cache.layers[0], model.model.layers[0].self_attn
    length = int(first.cumulative_length)
    dtype, device = first.keys.dtype, first.keys.device
    q = torch.randn(1, config.num_attention_heads, 1, first.keys.shape[3], device=device, dtype=dtype)
    rows = Rows(1, 1, first.max_cache_len, torch.tensor(length - 1, device=device), device)
    key = first.keys.view(first.keys.shape)
    key.moba_layer = first
    got = moba_attention_forward(module, q, key, first.values, rows)[0]
    keys, values = first.keys[:, :, :length], first.values[:, :, :length]
    check("model", got[0], reference_row(q, keys, values, args))
