"""The shared choice of blocks on the GPU: choose, attend, gradients. The rule is in `moba_hf.op.shared`.

Legend: H query heads, HK kv heads, D and DV head dims, T tile, B block size.

1. choose: vectors per block (`shared_summary`), masses of sampled rows (`shared_mass`, or
   `shared_hopper_mass` if the GPU supports it and a tile has enough rows), then masses of tiles
   and their choice as a bit mask (`shared_choose`), with as many tiles at a time as fit a memory budget.
2. attend: turn the mask into lists (`shared_lists`), again in chunks, and loop over each list, in
   `shared_hopper` if the GPU supports it, otherwise in `shared_attend`.
3. gradients: `shared_backward`.
Results depend neither on the budgets nor on the batch, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba_hf.kernels import shared_hopper, shared_tuning, tuning
from moba_hf.kernels.backward_routed import Rows
from moba_hf.kernels.backward_rows import row_stats
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.launch import padded, rows_contiguous
from moba_hf.kernels.shared_attend import attend_lists, fill_outside
from moba_hf.kernels.shared_backward import dkv_of_lists, dq_of_lists
from moba_hf.kernels.shared_choose import choose
from moba_hf.kernels.shared_lists import Lists, block_lists, tile_lists
from moba_hf.kernels.shared_mass import Masses, row_masses
from moba_hf.kernels.shared_plan import SharedPlan, make_shared_plan
from moba_hf.kernels.shared_summary import shared_summary
from moba_hf.op.numerics import part_size, with_positive_scale
from moba_hf.op.sequences import Attended, Sequences, covers_queries, derived
from moba_hf.op.shared import SharedRule

MAX_BLOCK_SIZE = 256  # loops over the parts of a block are unrolled


def unsupported_rule(rule: SharedRule, head_dim: int) -> str | None:
    """Why the kernels do not support a rule, or None if they do."""
    if rule.tile < 16 or rule.tile & (rule.tile - 1):
        return f"tile={rule.tile} is not a power of two of at least 16"
    if rule.sample & (rule.sample - 1):
        return f"sample={rule.sample} is not a power of two"
    return unsupported_blocks(rule.block_size, head_dim)


def unsupported_blocks(block_size: int, head_dim: int) -> str | None:
    """Why the kernels do not summarise such blocks, or None if they do."""
    if block_size < 16 or block_size & (block_size - 1):
        return f"block_size={block_size} is not a power of two of at least 16"
    if block_size > MAX_BLOCK_SIZE:
        return f"block_size={block_size} is more than {MAX_BLOCK_SIZE}"
    if head_dim % 2:
        return f"head_dim={head_dim} is odd"
    return None


def select(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    softmax_scale: float,
    *,
    workspace: int | None = None,
    mass_tile: shared_tuning.MassTile | None = None,
) -> Tensor:
    """The choice, `block_mask` int32 `(H, num_tiles, words)`; see `moba_hf.op.shared`.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        workspace: maximum bytes for the masses; None: `shared_tuning.MASS_WORKSPACE`.
        mass_tile: tile of the mass kernel; None: by `shared_tuning.mass_tile`.
    """
    q, softmax_scale = with_positive_scale(q, softmax_scale)  # the mass kernels divide by its square
    q, k = rows_contiguous(q), rows_contiguous(k)
    plan = _plan(q, k, sequences, rule.block_size, rule.tile)
    num_heads = q.shape[1]
    block_mask = torch.empty(num_heads, plan.num_tiles, plan.words, dtype=torch.int32, device=q.device)
    if block_mask.numel() == 0:
        return block_mask
    if mass_tile is None:
        mass_tile = tile_of_masses(q, k, rule)
    summary = shared_summary(k, plan, rule.rotary_pairs)
    rows = rule.tile // rule.sample
    budget = shared_tuning.MASS_WORKSPACE if workspace is None else workspace
    each = Masses.tile_bytes(num_heads, rows, plan.max_blocks, mass_tile.n) + num_heads * plan.max_blocks * 4
    chunk = _even_chunk(plan.num_tiles, budget // each, 16)
    masses = Masses.empty(chunk, num_heads, rows, plan.max_blocks, mass_tile.n, q, mass_tile.hopper)
    scratch = torch.empty(chunk, num_heads, masses.mass.shape[3], dtype=torch.float32, device=q.device)
    for first in range(0, plan.num_tiles, chunk):
        row_masses(q, summary, plan, rule, softmax_scale, masses, first, mass_tile)
        choose(masses, scratch, plan, rule, first, block_mask)
    return block_mask


def tile_of_masses(q: Tensor, k: Tensor, rule: SharedRule) -> shared_tuning.MassTile:
    """The tile of the mass kernel for `q (batch, H, q_len, D)` and `k (batch, HK, kv_len, D)`."""
    parts = rule.block_size // part_size(rule.block_size)
    tile = shared_hopper.mass_tile(q, k, rule, parts)
    if tile is not None:
        return tile
    return shared_tuning.mass_tile(padded(q.shape[3]), q.element_size(), parts, tuning.capability(q.device))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    sequences: Sequences,
    block_size: int,
    tile: int,
    softmax_scale: float,
    *,
    use_hopper: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, H, DV)` in q's dtype and `lse (batch, H, q_len)`, fp32, natural logarithm.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, DV)`.
        block_mask: int32 `(H, num_tiles, words)`, the result of `select`.
        use_hopper: run the Gluon kernel; None: if it supports these inputs.
    """
    q, k, v, block_mask = (
        rows_contiguous(q),
        rows_contiguous(k),
        rows_contiguous(v),
        rows_contiguous(block_mask),
    )
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    plan = _plan(q, k, sequences, block_size, tile)
    if plan.num_tiles == 0 or q.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    covered = covers_queries(sequences.table)
    if not covered:
        fill_outside(out, lse, plan.table)
    dims, capability = (padded(q.shape[3]), padded(v.shape[3])), tuning.capability(q.device)
    shape = shared_tuning.attend_tile(dims, q.element_size(), tile, block_size, capability)
    if use_hopper is None:
        use_hopper = shared_hopper.takes(q, k, v, block_size, tile)
    left_by = shared_hopper.whole_keys(block_size) if use_hopper else 0
    leaves_none = use_hopper and covered and k.shape[2] % left_by == 0
    inputs = SharedInputs(q, k, v, plan, softmax_scale)
    for first, lists in _chunks_of_lists(block_mask, plan, None):
        if use_hopper:
            shared_hopper.attend_lists(inputs, out, lse, lists, first)
        if not leaves_none:
            attend_lists(inputs, out, lse, lists, first, shape, left_by)
    return out, lse


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    saved: Attended,
    sequences: Sequences,
    block_size: int,
    tile: int,
    softmax_scale: float,
    *,
    workspace: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v with the choice held fixed, contiguous, in their dtypes; 0 where nothing attends.

    Args:
        grad_out: `(batch, q_len, H, DV)`, any strides.
        grad_lse: fp32 `(batch, H, q_len)`, any strides.
        saved: the inputs and results of `attend`; the choice is the block mask.
        workspace: maximum bytes for the lists; None: `shared_tuning.LIST_WORKSPACE`.
    """
    q, k, v, out, grad_out, block_mask = (
        rows_contiguous(x) for x in (*saved[:4], grad_out, saved.block_indices)
    )
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    plan = _plan(q, k, sequences, block_size, tile)
    if plan.num_tiles == 0 or q.numel() == 0:
        return grad_q, grad_k, grad_v
    dims, capability = (padded(q.shape[3]), padded(v.shape[3])), tuning.capability(q.device)
    shapes = shared_tuning.backward_tiles(dims, q.element_size(), tile, block_size, capability)
    rows = Rows(q, k, v, grad_out, row_stats(out, grad_out, saved.lse, grad_lse), softmax_scale)
    for first, lists in _chunks_of_lists(block_mask, plan, workspace):
        dq_of_lists(rows, plan, lists, first, grad_q, shapes.dq)
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    tiles = group * (1 + (min(sequences.max_seqlen_q, q.shape[2]) + tile - 2) // tile)
    blocks = plan.num_blocks + plan.num_seqs
    budget = shared_tuning.LIST_WORKSPACE if workspace is None else workspace
    chunk = _even_chunk(blocks, budget // Lists.tile_bytes(num_kv_heads, tiles), 1)
    lists = Lists.empty(chunk, num_kv_heads, tiles, q)
    for first in range(0, blocks, chunk):
        tile_lists(block_mask, plan, group, first, lists)
        dkv_of_lists(rows, plan, lists, first, grad_k, grad_v, shapes.held)
    return grad_q, grad_k, grad_v


def _plan(q: Tensor, k: Tensor, sequences: Sequences, block_size: int, tile: int) -> SharedPlan:
    table, limits = sequences.table, (sequences.max_seqlen_q, sequences.max_seqlen_k)
    sizes = {"block_size": block_size, "tile": tile}
    key = ("shared plan", q.shape[0], q.shape[2], k.shape[0], k.shape[2], *limits, block_size, tile)
    return derived(table, key, lambda: make_shared_plan(q, k, table, *limits, **sizes))


def _chunks_of_lists(
    block_mask: Tensor, plan: SharedPlan, workspace: int | None
) -> Iterator[tuple[int, Lists]]:
    """Yields the first tile and the lists of each chunk of tiles; all chunks reuse the same memory."""
    num_heads = block_mask.shape[0]
    budget = shared_tuning.LIST_WORKSPACE if workspace is None else workspace
    chunk = _even_chunk(plan.num_tiles, budget // Lists.tile_bytes(num_heads, plan.max_blocks), 1)
    lists = Lists.empty(chunk, num_heads, plan.max_blocks, block_mask)
    for first in range(0, plan.num_tiles, chunk):
        block_lists(block_mask, plan, first, lists)
        yield first, lists


def _even_chunk(tiles: int, most: int, multiple: int) -> int:
    """Number of tiles per chunk: at most about `most`, even across chunks, rounded up to `multiple`."""
    chunks = -(-tiles // max(1, most))
    multiple = multiple if most >= multiple else 1
    return min(tiles, -(-tiles // (chunks * multiple)) * multiple)
