"""Chunk sizes that keep temporary memory within a budget. They do not affect any result."""

from __future__ import annotations

from torch import Tensor

# Maximum memory for the partial outputs of a chunk of queries, in bytes; more runs a few per cent faster.
WORKSPACE = 4 << 30
# Maximum memory for the pairs and sums of a group of kv heads in the backward, in bytes.
BACKWARD_WORKSPACE = 3 << 30
# Bytes per pair in addition to its partial output: lse, the pair's key, the sort's keys and permutation.
_PAIR_OVERHEAD = 4 + 2 + 2 + 8 + 8
# Bytes per pair for the separate sums of segments; a smaller number makes segments longer.
_SEGMENT_BYTES = 32


def chunk_rows(rows: int, num_heads: int, routed_slots: int, v_dim: int, itemsize: int, budget: int) -> int:
    """Number of query rows per chunk such that partial outputs and pairs stay within `budget` bytes."""
    row_bytes = num_heads * routed_slots * (v_dim * itemsize + _PAIR_OVERHEAD)
    pairs = num_heads * routed_slots  # numbered in int32 within a chunk
    chunk = max(1, min(budget // max(1, row_bytes), (2**31 - 1) // max(1, pairs)))
    if chunk >= rows:
        return max(1, rows)
    even = -(-rows // -(-rows // chunk))  # chunks of equal size
    return min(chunk, -(-even // 64) * 64)


def segment_rows(block_size: int, head_dim: int, v_dim: int, multiple: int) -> int:
    """Number of pairs in a segment, such that its fp32 sums take about `_SEGMENT_BYTES` per pair."""
    rows = max(1024, block_size * (head_dim + v_dim) * 4 // _SEGMENT_BYTES)
    return -(-rows // multiple) * multiple


def backward_split(q: Tensor, k: Tensor, v: Tensor, slots: int, budget: int) -> tuple[int, int]:
    """Kv heads per group and query rows per chunk, such that pairs and sums stay within `budget` bytes."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, rows = k.shape[1], max(1, batch * q_len)
    pairs = num_heads // num_kv_heads * slots  # per row and kv head
    row_bytes = max(1, pairs * (head_dim * q.element_size() + _PAIR_OVERHEAD + _SEGMENT_BYTES))
    sum_bytes = k.shape[0] * k.shape[2] * (head_dim + v.shape[3]) * 4
    fit = min(budget // (rows * row_bytes + sum_bytes), (2**31 - 1) // max(1, pairs * rows))
    if fit >= 1:
        groups = -(-num_kv_heads // min(fit, num_kv_heads))
        return -(-num_kv_heads // groups), rows
    chunk = max(1, min(max(budget - sum_bytes, budget // 4) // row_bytes, (2**31 - 1) // max(1, pairs)))
    if chunk >= rows:
        return 1, rows
    even = -(-rows // -(-rows // chunk))
    return 1, min(chunk, -(-even // 64) * 64)
