"""Where each sequence lies inside strided `(batch, heads, length, dim)` tensors.

Packed sequences, padded batches, chunks of a prefill and decode steps are all the same thing to the
operator: a *sequence table*, int32 `(num_seqs, 5)`, one row `(batch, q_begin, q_end, k_begin, k_end)` per
sequence. Queries `[q_begin, q_end)` and keys `[k_begin, k_end)` of that batch row form one sequence, the
last query standing at the last key; blocks are counted from `k_begin`. Query `i` therefore stands at
position `(k_end - k_begin) - (q_end - i)`. A query that no row covers is padding: its output is zero, its
`block_indices` -1, its `lse` -inf. Everything here is tensor arithmetic: nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = ("batch", "q_begin", "q_end", "k_begin", "k_end")


def packed_table(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """The table of sequences packed one after the other in batch row 0.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 `(num_seqs + 1,)`, running totals of lengths, from 0.
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
    """The table of one sequence per batch row.

    Args:
        batch, q_len, kv_len: sizes of the query and key tensors.
        device: where the table lives.
        kv_start: int `(batch,)`, slot of a row's first real key; None: 0.
        kv_end: int `(batch,)`, slot after a row's last real key; None: `kv_len`.
        q_offset: int `(batch,)` or `(1,)`, slot at which the first query stands; None: `kv_len - q_len`.
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


@dataclass(frozen=True)
class Sequences:
    """Where each sequence lies inside `(batch, heads, length, dim)` tensors; made once per forward.

    Attributes:
        table: int32 `(num_seqs, 5)`, the sequence table of this module.
        max_seqlen_q, max_seqlen_k: host bounds on the queries and keys of one sequence.
        by_row: row r of the table is batch row r, for every r.
        kv_start: int `(batch,)`, slot of each row's first real key; None: 0 in every row.
    """

    table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    by_row: bool = True
    kv_start: Tensor | None = None


def each_query(sequences: Sequences, q_len: int) -> Sequences:
    """The same queries, one sequence each: query `i` over the keys up to its own. One sequence per row."""
    assert sequences.by_row
    batch, q_begin, q_end, k_begin, k_end = sequences.table[:, :, None].unbind(1)
    query = torch.arange(q_len, dtype=torch.int32, device=sequences.table.device)
    real = (query >= q_begin) & (query < q_end)
    end = torch.where(real, k_end - (q_end - 1 - query), k_begin)
    columns = [batch, query, query + real, k_begin, end]
    table = torch.stack([x.expand_as(real) for x in columns], 2).flatten(0, 1).to(torch.int32)
    return Sequences(table, 1, sequences.max_seqlen_k, by_row=False)


class Attended(NamedTuple):
    """What attention over chosen blocks took and gave, as its backward needs it.

    Attributes:
        q, k, v: `(batch, heads, length, dim)`.
        out: `(batch, q_len, num_heads, v_dim)`. lse: `(batch, num_heads, q_len)`.
        block_indices: int32 `(batch, q_len, num_heads, topk)`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    block_indices: Tensor
