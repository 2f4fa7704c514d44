"""The location of each sequence inside strided `(batch, heads, length, dim)` tensors.

Packed sequences, padded batches, chunks of a prefill and decode steps all have the same form for the
operators: a *sequence table*, int32 `(num_seqs, 5)`, with one row `(batch, q_begin, q_end, k_begin, k_end)`
per sequence. Queries `[q_begin, q_end)` and keys `[k_begin, k_end)` of that batch row form one sequence. The
last query is at the position of the last key, so query `i` is at position `(k_end - k_begin) - (q_end - i)`.
Blocks are counted from `k_begin`. A query that belongs to no sequence is padding: its output is zero, its
`block_indices` are -1, its `lse` is -inf. Everything here is tensor arithmetic, so nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

COLUMNS = ("batch", "q_begin", "q_end", "k_begin", "k_end")


def packed_table(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """The table of sequences packed one after another in batch row 0.

    Args:
        cu_seqlens_q: int32 `(num_seqs + 1,)`, cumulative numbers of queries, from 0.
        cu_seqlens_k: int32 `(num_seqs + 1,)`, cumulative numbers of keys, from 0.
    """
    zeros = torch.zeros_like(cu_seqlens_q[1:])
    columns = [zeros, cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]]
    return torch.stack(columns, dim=1).to(torch.int32)


def batched_table(
    batch: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_offset: Tensor | None = None,
) -> Tensor:
    """The table with one sequence per batch row.

    Args:
        batch: rows of the tensors.
        q_len: queries per row.
        kv_len: keys per row.
        device: device of the table.
        kv_start: int `(batch,)`, slot of a row's first real key; None: 0.
        kv_end: int `(batch,)`, slot after a row's last real key; None: `kv_len`.
        q_offset: int `(batch,)` or `(1,)`, slot of the first query; None: `kv_len - q_len`.
    """

    def column(value: Tensor | None, default: int) -> Tensor:
        if value is None:
            return torch.full((batch,), default, dtype=torch.int32, device=device)
        return value.to(torch.int32).expand(batch)

    start, end = column(kv_start, 0), column(kv_end, kv_len)
    offset = column(q_offset, kv_len - q_len)
    q_begin = (start - offset).clamp(0, q_len)
    q_end = torch.maximum((end - offset).clamp(0, q_len), q_begin)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    return torch.stack([rows, q_begin, q_end, start, end], dim=1)


def rows_of(table: Tensor) -> list[list[int]]:
    """The rows of a sequence table, for backends that work sequence by sequence; waits for the device.

    Raises:
        ValueError: a sequence has more queries than keys. Graphs and GPUs check nothing before this point.
    """
    rows: list[list[int]] = table.tolist()
    for number, (_, q_begin, q_end, k_begin, k_end) in enumerate(rows):
        if q_end - q_begin > k_end - k_begin:
            raise more_queries(number, q_end - q_begin, k_end - k_begin)
    return rows


def more_queries(number: int, queries: int, keys: int) -> ValueError:
    """The error for a sequence with more queries than keys."""
    return ValueError(f"sequence {number} has more queries ({queries}) than keys ({keys})")


@dataclass(frozen=True)
class Sequences:
    """The location of each sequence in `(batch, heads, length, dim)` tensors; created once per forward.

    Attributes:
        table: int32 `(num_seqs, 5)`, see the module docstring.
        max_seqlen_q: bound on the queries of one sequence, known on the host.
        max_seqlen_k: bound on the keys of one sequence, known on the host.
        by_row: row r of the table describes batch row r, for every r.
        kv_start: int `(batch,)`, slot of each row's first real key; None: 0 in every row.
    """

    table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    by_row: bool = True
    kv_start: Tensor | None = None


def each_query(sequences: Sequences, q_len: int) -> Sequences:
    """Makes each query a sequence of its own, with the keys up to its position.

    `sequences` must have one sequence per batch row.
    """
    assert sequences.by_row
    batch, q_begin, q_end, k_begin, k_end = sequences.table[:, :, None].unbind(1)
    query = torch.arange(q_len, dtype=torch.int32, device=sequences.table.device)
    real = (query >= q_begin) & (query < q_end)
    end = torch.where(real, k_end - (q_end - 1 - query), k_begin)
    columns = [batch, query, query + real, k_begin, end]
    table = torch.stack([x.expand_as(real) for x in columns], 2).flatten(0, 1).to(torch.int32)
    return Sequences(table, 1, sequences.max_seqlen_k, by_row=False)


class Attended(NamedTuple):
    """Inputs and outputs of attention over chosen blocks, saved for its backward.

    Attributes:
        q: `(batch, num_heads, q_len, head_dim)`.
        k: `(batch, num_kv_heads, kv_len, head_dim)`.
        v: `(batch, num_kv_heads, kv_len, v_dim)`.
        out: `(batch, q_len, num_heads, v_dim)`.
        lse: `(batch, num_heads, q_len)`.
        block_indices: int32 `(batch, q_len, num_heads, topk)`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    block_indices: Tensor


# What backends have computed from sequence tables, by table; only tables that are never written to again.
_derived: Any = WeakTensorKeyDictionary()
_COVERS = "covers"


def constant_table(table: Tensor, *, covers: bool = False) -> Tensor:
    """`table` itself, remembered as one that is never written to again, see `derived`.

    Args:
        covers: each sequence has all keys of its batch row, and every query belongs to a sequence, or its
            result is never read.
    """
    _derived[table] = {_COVERS: covers}
    return table


def covers_queries(table: Tensor) -> bool:
    """Whether the sequences cover their batch rows, see `constant_table`."""
    return bool(_derived.get(table, {}).get(_COVERS, False))


def constant_like(table: Tensor, made: Tensor) -> Tensor:
    """`made` itself, the sequences of `table` or parts of them elsewhere; constant if `table` is."""
    if made is table or table not in _derived:
        return made
    return constant_table(made, covers=covers_queries(table))


def derived(table: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, computed once per `table` and `key` if the table is constant, for all layers of a forward.

    Other tables, such as those of compiled graphs, whose memory may be written to again, get a new result.
    The result is kept as long as the table, so it must not refer to it: neither of them would ever be freed.
    """
    kept = _derived.get(table)
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    found: T = kept[key]
    return found
