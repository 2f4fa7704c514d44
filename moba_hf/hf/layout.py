"""The location of the sequences of a forward, the same for all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moba_hf.op.sequences import Sequences, constant_like, derived


def may_look(device: torch.device) -> bool:
    """Whether values on `device` can be read: not in a traced or captured graph."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Layout:
    """The location of the sequences of a forward.

    Attributes:
        sequences: the sequences, as the operator needs them.
        whole: each batch row is one sequence with all keys and no padding, so no mask is needed.
        spans: `(batch row, begin, end)` of packed sequences; None: not packed, or not known on the host.
        starts: slot of each row's first real key; None: packed, or not known on the host.
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
        """The layout of queries `[begin, end)` and the keys up to the last of them; not for packed rows.

        It is made once for all layers of a forward, except in graphs.
        """
        table = self.sequences.table
        if not may_look(table.device):
            return self._between(begin, end)

        def make() -> Layout:
            part = self._between(begin, end)
            constant_like(table, part.sequences.table)
            return part

        return derived(table, ("between", begin, end), make)

    def _between(self, begin: int, end: int) -> Layout:
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
        """The layout for layers on another device; not in graphs."""
        table, start = self.sequences.table.to(device), self.sequences.kv_start
        table = constant_like(self.sequences.table, table)
        start = None if start is None else start.to(device)
        return replace(self, sequences=replace(self.sequences, table=table, kv_start=start))
