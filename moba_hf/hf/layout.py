"""Where the sequences of a forward lie: what every layer of it is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moba_hf.op.sequences import Sequences


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a forward lie.

    Attributes:
        sequences: for the operator.
        whole: each batch row is one sequence of all keys and nothing is padding, so no mask is needed.
        spans: `(batch row, begin, end)` of packed sequences; None: not packed, or not read to the host.
        starts: slot of each row's first real key; None: packed, or not read to the host.
    """

    sequences: Sequences
    whole: bool = False
    spans: list[list[int]] | None = None
    starts: tuple[int, ...] | None = None

    @property
    def packed(self) -> bool:
        """Whether a batch row may hold several sequences."""
        return not self.sequences.by_row

    def between(self, begin: int, end: int) -> Layout:
        """The same of queries `[begin, end)` alone, and the keys up to the last of them; not packed."""
        sequences = self.sequences
        row, q_begin, q_end, k_begin, k_end = sequences.table.unbind(1)
        k_end = torch.maximum(k_end - (q_end - end).clamp(min=0), k_begin)
        columns = [row, q_begin.clamp(begin, end) - begin, q_end.clamp(begin, end) - begin, k_begin, k_end]
        left_out = sequences.max_seqlen_q - end
        part = replace(
            sequences,
            table=torch.stack(columns, 1),
            max_seqlen_q=end - begin,
            max_seqlen_k=sequences.max_seqlen_k - left_out,
        )
        return replace(self, sequences=part)

    def to(self, device: torch.device) -> Layout:
        """The same for layers that lie on another device."""
        table, start = self.sequences.table.to(device), self.sequences.kv_start
        start = None if start is None else start.to(device)
        return replace(self, sequences=replace(self.sequences, table=table, kv_start=start))
