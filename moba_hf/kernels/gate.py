"""The choice of blocks: gate scores and top-k in one kernel, without a tokens x blocks matrix in memory.

Legend: B block size, D head dim, G query heads of a program, K1 scored choices per query, W classes (columns
modulo the tile width), R levels kept per class.

1. A program takes one tile of queries (see `tiling`; all share the own block c) for G heads of one kv head,
   as up to BLOCK_M rows, and scans the candidates [sinks, c - local) of its sequence, W blocks at a time.
2. A score becomes an int32 that sorts like it, with the tile number in its lowest bits (reversed, so that of
   equal scores the earlier tile is larger). The R largest per class are kept, using max and min alone. In the
   mean gate, if the first tile already has K1 positive scores for every row, no negative score can be chosen,
   and the bits of the floats sort as they are.
3. K1 times, the largest class head is taken (among equals, that of the lower class), and its class moves up.
   So ties go to the lower block index, for negative scores too.
4. A row is exact unless one of its classes ran out of its R entries before the last choice. Inexact rows go
   to a list per kv head; a second kernel scans again for them, below what was taken, until they are done.
Scores whose relative difference is below 2^(bits - 23) count as equal; bits is 7 (2^-16) up to 8,192 blocks.
Atomics fill the list, but its order does not affect the result. The kernels are in `gate_kernels`. Gates
differ in what they keep of a block (`Summary`) and in how they score it (`gate_scores`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_hf.kernels import tuning, tuning_gate
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.gate_kernels import gate_fwd_kernel, gate_rest_kernel
from moba_hf.kernels.launch import cdiv, device_of, num_processors, padded, rows_contiguous
from moba_hf.kernels.levels import tile_bits
from moba_hf.kernels.mass_summary import mass_summary
from moba_hf.kernels.tiling import Tiling, head_split, make_tiling
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import part_size
from moba_hf.op.sequences import Sequences


@dataclass(frozen=True)
class Summary:
    """What a gate keeps of each block, and how it scores blocks; see `gate_scores`.

    Attributes:
        centers: `(HK, P + 1, NB, D)` in the key dtype; for the mean gate, P = 0 and these are the means.
        spreads: `(HK, P, NB, D)`; None for the mean gate.
        softmax_scale: softmax scale, used by the mass gate.
        part: number of keys in a part.
    """

    centers: Tensor
    spreads: Tensor | None = None
    softmax_scale: float = 1.0
    part: int = 1

    @property
    def parts(self) -> int:
        """Number of parts in a block, P; 0 for the mean gate."""
        return self.centers.shape[1] - 1

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Factors that turn `q . center` and `(q * q) . spread` into log2 units; None for the mean gate."""
        if self.spreads is None:
            return None, None
        return self.softmax_scale * math.log2(math.e), self.softmax_scale**2 * math.log2(math.e)


def summarize_means(k: Tensor, tiling: Tiling) -> Summary:
    """The mean gate's summary of the blocks of `k (batch, HK, kv_len, D)`."""
    return Summary(block_mean(k, tiling)[:, None])


def summarize_mass(k: Tensor, tiling: Tiling, softmax_scale: float, rotary_pairs: str = "halves") -> Summary:
    """The mass gate's summary of the blocks of `k (batch, HK, kv_len, D)`."""
    return Summary(*mass_summary(k, tiling, rotary_pairs), softmax_scale, part_size(tiling.block_size))


def select_blocks(
    q: Tensor, k: Tensor, sequences: Sequences, rule: LayerConfig, softmax_scale: float | None = None
) -> Tensor:
    """Chosen blocks, int32 `(batch, q_len, H, topk)`: the own block first, -1 for empty slots and padding.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        softmax_scale: used by the mass gate only.
    """
    assert rule.gate in ("mean", "mass")
    q, k = rows_contiguous(q), rows_contiguous(k)
    choice = torch.full(
        (q.shape[0], q.shape[2], q.shape[1], rule.topk), -1, dtype=torch.int32, device=q.device
    )
    if choice.numel() == 0 or sequences.table.shape[0] == 0:
        return choice
    block_size = rule.block_size
    parts = 0 if rule.gate == "mean" else block_size // part_size(block_size)
    tile = gate_tile(q, parts)
    _, tokens = head_split(q.shape[1] // k.shape[1], tile.m)
    limits = sequences.max_seqlen_q, sequences.max_seqlen_k
    tiling = make_tiling(q, k, sequences.table, *limits, block_size=block_size, tile=tokens)
    if rule.topk <= 1 + rule.sink_blocks + rule.local_blocks:  # nothing is scored
        empty = k.new_empty(k.shape[1], parts + 1, 1, k.shape[3])
        summary = Summary(empty, None if parts == 0 else empty, part=max(1, block_size // max(1, parts)))
    elif rule.gate == "mean":
        summary = summarize_means(k, tiling)
    else:
        assert softmax_scale is not None
        summary = summarize_mass(k, tiling, softmax_scale, rule.rotary_pairs)
    gate(q, summary, tiling, choice, rule.sink_blocks, rule.local_blocks)
    return choice


def gate_tile(q: Tensor, parts: int) -> tuning.Tile:
    """The gate's tile for queries `(batch, H, q_len, D)`; `parts`: parts of a block, 0 for the mean gate."""
    return tuning_gate.gate_tile(padded(q.shape[3]), q.element_size(), parts, tuning.capability(q.device))


def gate(
    q: Tensor, summary: Summary, tiling: Tiling, choice: Tensor, sink_blocks: int, local_blocks: int
) -> None:
    """Writes `choice (batch, q_len, H, topk)`, which must be filled with -1."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], summary.centers.shape[0]
    topk, group = choice.shape[3], num_heads // num_kv_heads
    tile = gate_tile(q, summary.parts)
    count = topk - 1 - sink_blocks - local_blocks
    levels, exact = tuning_gate.gate_levels(count, tiling.max_blocks, tile.n)
    launch = tuning_gate.gate_launch(tile, levels, summary.parts, tuning.capability(q.device))
    heads, _ = head_split(group, tile.m)
    splits = cdiv(group, heads)
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
            TILE_BITS=tile_bits(cdiv(tiling.max_blocks, tile.n)),
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
                TILE_BITS=tile_bits(cdiv(tiling.num_blocks, tile.n)),
                num_warps=launch.rest_warps,
                **constants,
            )
