"""The choice of blocks: gate scores and top-k in one kernel, never tokens x blocks in memory, for any gate.

Legend: B block size, D head dim, G query heads of a program, K1 scored choices per query, W classes (columns
modulo the tile width), R levels kept per class.

1. A program takes one tile of queries (see `tiling`; all share the own block c) for G heads of one kv head,
   as up to BLOCK_M rows, and scans the candidates [sinks, c - local) of its sequence, W blocks at a time.
2. A score becomes an int32 that sorts like it; the number of the tile replaces its lowest bits (reversed: of
   equal scores the earlier tile is larger). Per class the R largest are kept, by max and min alone. In the
   mean gate, where the first tile already has K1 positive scores for every row, no negative one can be chosen
   then, and the bits of a float sort as they are.
3. K1 times, the largest class head (the lower class of equals) is taken and its class moves up: ties go to
   the lower block index, for negative scores too.
4. A row is exact unless a class had given all its R entries before the last choice was made. Such rows go
   to a list per kv head, and a second kernel scans for them again, below what was already taken, until done.
Scores that differ by less than 2^(bits - 23) relative count as equal; bits is 7 (2^-16) up to 8,192 blocks.
The list is filled by atomics, but its order changes no result. The kernels are in `gate_kernels`; gates
differ in what they know of a block (`Summary`) and in how they score it (`gate_scores`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.gate_kernels import gate_fwd_kernel, gate_rest_kernel
from moba_hf.kernels.launch import device_of, num_processors, padded, rows_contiguous
from moba_hf.kernels.levels import tile_bits
from moba_hf.kernels.mass_summary import mass_summary
from moba_hf.kernels.tiling import Tiling, head_split, make_tiling
from moba_hf.op.numerics import part_size


@dataclass(frozen=True)
class Summary:
    """What a gate knows of blocks, and how it scores them; see `gate_scores`.

    Attributes:
        centers: `(HK, P + 1, NB, D)` in the key dtype. The mean gate: P = 0, the means.
        spreads: `(HK, P, NB, D)`; None: the mean gate.
        softmax_scale: of the mass gate.
        part: keys of a part.
    """

    centers: Tensor
    spreads: Tensor | None = None
    softmax_scale: float = 1.0
    part: int = 1

    @property
    def parts(self) -> int:
        """P."""
        return self.centers.shape[1] - 1

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Factors of `q . center` and `(q * q) . spread`, which turn them into log2 units."""
        if self.spreads is None:
            return None, None
        return self.softmax_scale * math.log2(math.e), self.softmax_scale**2 * math.log2(math.e)


def summarize_means(k: Tensor, tiling: Tiling) -> Summary:
    """What the mean gate knows of the blocks of `k (batch, HK, kv_len, D)`."""
    return Summary(block_mean(k, tiling)[:, None])


def summarize_mass(k: Tensor, tiling: Tiling, softmax_scale: float, rotary_pairs: str = "halves") -> Summary:
    """What the mass gate knows of the blocks of `k (batch, HK, kv_len, D)`."""
    return Summary(*mass_summary(k, tiling, rotary_pairs), softmax_scale, part_size(tiling.block_size))


def select_blocks(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    mass_scale: float | None = None,
    rotary_pairs: str = "halves",
) -> Tensor:
    """Chosen blocks, int32 `(batch, q_len, H, topk)`: own first, -1 last, -1 throughout for padding.

    Args:
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`. table: see `moba_hf.op.sequences`.
        max_seqlen_q, max_seqlen_k: bounds on the queries and keys of one sequence.
        mass_scale: softmax scale of the mass gate; None: the mean gate.
        rotary_pairs: of the mass gate, see `moba_hf.op.gates.MassSummary`.
    """
    q, k = rows_contiguous(q), rows_contiguous(k)
    choice = torch.full((q.shape[0], q.shape[2], q.shape[1], topk), -1, dtype=torch.int32, device=q.device)
    if choice.numel() == 0 or table.shape[0] == 0:
        return choice
    parts = 0 if mass_scale is None else block_size // part_size(block_size)
    tile = gate_tile(q, parts)
    _, tokens = head_split(q.shape[1] // k.shape[1], tile.m)
    tiling = make_tiling(q, k, table, max_seqlen_q, max_seqlen_k, block_size=block_size, tile=tokens)
    if topk <= 1 + sink_blocks + local_blocks:  # nothing is scored
        empty = k.new_empty(k.shape[1], parts + 1, 1, k.shape[3])
        summary = Summary(empty, None if parts == 0 else empty, part=max(1, block_size // max(1, parts)))
    elif mass_scale is None:
        summary = summarize_means(k, tiling)
    else:
        summary = summarize_mass(k, tiling, mass_scale, rotary_pairs)
    gate(q, summary, tiling, choice, sink_blocks, local_blocks)
    return choice


def gate_tile(q: Tensor, parts: int) -> tuning.Tile:
    """The tile of a gate for queries `(batch, H, q_len, D)`; `parts` of a block, 0 for the mean gate."""
    return tuning.gate_tile(padded(q.shape[3]), q.element_size(), parts, tuning.capability(q.device))


def gate(
    q: Tensor, summary: Summary, tiling: Tiling, choice: Tensor, sink_blocks: int, local_blocks: int
) -> None:
    """Writes `choice (batch, q_len, H, topk)`, full of -1 before."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], summary.centers.shape[0]
    topk, group = choice.shape[3], num_heads // num_kv_heads
    tile = gate_tile(q, summary.parts)
    count = topk - 1 - sink_blocks - local_blocks
    levels, exact = tuning.gate_levels(count, tiling.max_blocks, tile.n)
    launch = tuning.gate_launch(tile, levels, summary.parts, tuning.capability(q.device))
    heads, _ = head_split(group, tile.m)
    splits = triton.cdiv(group, heads)
    counter = torch.zeros(num_kv_heads, dtype=torch.int32, device=q.device)
    length = 1 if exact else tiling.num_rows * group
    listed = torch.empty((num_kv_heads, length), dtype=torch.int32, device=q.device)
    shared = (q, summary.centers, summary.spreads, choice, counter, listed, tiling.table, tiling.block_offset)
    sizes = (summary.centers.shape[2], length, q.shape[2], num_heads, group, tiling.block_size)
    constants = {
        "TOPK": topk,
        "SINK": sink_blocks,
        "LOCAL": local_blocks,
        "PARTS": summary.parts,
        "LOG2_SIZE": math.log2(summary.part),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "STAGES": tile.stages,
        "maxnreg": launch.max_registers,
    }
    with device_of(q):
        gate_fwd_kernel[(tiling.max_tiles, num_kv_heads * splits)](
            *shared,
            tiling.tile_offset,
            q.stride()[:3],
            *sizes,
            *summary.scales,
            tiling.num_seqs,
            tiling.num_rows,
            splits,
            TILE=tiling.tile,
            TILES_PER_BLOCK=tiling.tiles_per_block,
            HEADS=heads,
            LEVELS=levels,
            TILE_BITS=tile_bits(triton.cdiv(tiling.max_blocks, tile.n)),
            EXACT=exact,
            num_warps=launch.warps,
            **constants,
        )
        if not exact:
            programs = max(1, launch.rest_programs * num_processors(q) // num_kv_heads)
            gate_rest_kernel[(programs, num_kv_heads)](
                *shared,
                q.stride()[:3],
                *sizes,
                *summary.scales,
                LEVELS=launch.rest_levels,
                TILE_BITS=tile_bits(triton.cdiv(tiling.num_blocks, tile.n)),
                num_warps=launch.rest_warps,
                **constants,
            )
