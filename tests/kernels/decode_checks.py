"""Checks of the decode kernels for any device: they give prefill's choice and means bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moba_hf.config import LayerConfig
from moba_hf.kernels import append, choose_blocks, dense_decode_attention, select_blocks, update_block_means
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.tiling import make_tiling
from moba_hf.kernels.tuning import Tile
from moba_hf.op.dense import causal_mask
from moba_hf.op.sequences import Sequences, batched_table

Result = TypeVar("Result")


def in_graph(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of `step` and its result, after a run in which waiting for the device is an error."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def means_of(k: Tensor, starts: Tensor, block_size: int, steps: list[int]) -> Tensor:
    """Means `(batch, HK, blocks, D)` of `k` in a cache that grows by `steps`; NaN elsewhere."""
    batch, heads, length, dim = k.shape
    means = torch.full(
        (batch, heads, length // block_size + 1, dim), torch.nan, dtype=k.dtype, device=k.device
    )
    written = 0
    for i, count in enumerate(steps):
        written += count
        at = torch.tensor(written, device=k.device) if i % 2 else written
        update_block_means(means, k, starts, at, count, block_size)
    assert written == length
    return means


def assert_means_are_prefill_means(k: Tensor, starts: Tensor, block_size: int, steps: list[int]) -> None:
    """Bit for bit, for the complete blocks that a later query can choose; others stay unwritten."""
    batch, _, length, _ = k.shape
    means = means_of(k, starts, block_size, steps)
    table = batched_table(batch, length, length, k.device, kv_start=starts)
    layouts = [k, k.transpose(1, 2).contiguous().transpose(1, 2)]
    for keys in layouts:
        q = keys[:, :1]
        tiling = make_tiling(q, keys, table, length, length, block_size=block_size, tile=16)
        flat, offset = block_mean(keys, tiling), tiling.block_offset.tolist()
        for row in range(batch):
            complete = (length - int(starts[row])) // block_size
            assert torch.isfinite(means[row, :, :complete]).all()
            assert means[row, :, complete:].isnan().all()
            prefill = flat[:, offset[row] : offset[row + 1]]
            assert complete >= prefill.shape[1] >= complete - 1
            assert torch.equal(means[row, :, : prefill.shape[1]], prefill)


def assert_choice_is_prefill_choice(
    q: Tensor, k: Tensor, starts: Tensor, rule: tuple[int, int, int, int], count: int
) -> None:
    """With cached means, the last `count` queries choose the same blocks as in a prefill of everything."""
    batch, _, q_len, _ = q.shape
    length = k.shape[2]
    table = batched_table(batch, q_len, length, k.device, kv_start=starts)
    whole = select_blocks(q, k, Sequences(table, q_len, length), LayerConfig(*rule))[:, -count:]
    means = means_of(k, starts, rule[0], [length]).nan_to_num(3.0)
    table = batched_table(batch, count, length, k.device, kv_start=starts)
    choice = choose_blocks(q[:, :, -count:], means, table, length, *rule)
    assert torch.equal(choice[..., 0], whole[..., 0])
    assert torch.equal(choice.sort(3).values, whole.sort(3).values)
    assert not ((choice[..., 1:] >= 0) & (choice[..., :-1] < 0)).any(), "-1 last"


def assert_dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, tile: Tile | None = None) -> None:
    """Error at most twice that of plain attention in the same precision; slots out of bounds are not read."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5
    mask = causal_mask(Sequences(table, q.shape[2], k.shape[2]), 0, q.shape[2], k.shape[2])
    slot = torch.arange(k.shape[2], device=k.device)
    real = (slot >= table[:, 3, None]) & (slot < table[:, 4, None])
    query = torch.arange(q.shape[2], device=q.device)
    real_queries = ((query >= table[:, 1, None]) & (query < table[:, 2, None]))[:, None]
    k, v = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (k, v))

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
        scores = (q.to(dtype) @ keys.transpose(2, 3) * scale).masked_fill(
            ~mask, torch.finfo(dtype).min if dtype != torch.float32 else -torch.inf
        )
        out = scores.float().softmax(3).to(dtype) @ values
        return out.masked_fill(~real_queries[..., None], 0.0).transpose(1, 2), scores.float().logsumexp(3)

    truth, truth_lse = plain(torch.float32)
    low = (plain(q.dtype)[0].float() - truth).abs().max()
    k, v = (x.masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v))
    out, lse = dense_decode_attention(q, k, v, table, scale, tile)
    assert (out.shape, out.dtype) == (truth.shape, q.dtype)
    eps = torch.finfo(q.dtype).eps * (8 if q.dtype == torch.float32 else 0.5)
    error = (out.float() - truth).abs().max()
    assert error <= 2 * low + eps * truth.abs().max(), (float(error), float(low))
    queries = real_queries.expand(lse.shape)
    assert torch.allclose(lse[queries], truth_lse[queries], rtol=1e-5, atol=2e-5)
    assert (lse[~queries] == -torch.inf).all()
    assert (out.transpose(1, 2)[~queries] == 0).all()


def assert_append(dtype: torch.dtype, device: str, batch: int, count: int, dims: tuple[int, int]) -> None:
    """Writes the same as torch's operators, from strided states, and nothing else; the length increases."""
    heads, slots, before = 3, 40, 17
    states = [torch.randn(batch, count, heads, d, device=device).to(dtype).transpose(1, 2) for d in dims]
    expected = [torch.randn(batch, heads, slots, d, device=device).to(dtype) for d in dims]
    got, length = [x.clone() for x in expected], torch.tensor(before, device=device)
    for step in range(2):
        append(*got, length, *states)
        begin = before + step * count
        for x, new in zip(expected, states, strict=True):
            x[:, :, begin : begin + count] = new
        assert int(length) == begin + count
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
