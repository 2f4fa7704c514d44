"""Packed sequences as transformers passes them: `cu_seq_lens_q`, or position ids that start again."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.ops import check_values
from moba_hf.op.sequences import packed_table

# The dtype of a mask that says where documents begin.
DOCUMENTS = torch.int16
_PACKED_UNDER_COMPILE = (
    "packed sequences under torch.compile: the position ids start again inside a row, which a compiled graph "
    "cannot look at; pass cu_seq_lens_q too (DataCollatorWithFlattening(return_flash_attn_kwargs=True))"
)
# How far above the mask function the forward of a model is looked for.
_FRAMES = 8


@dataclass(frozen=True)
class Packing:
    """Sequences packed in the rows of one call that holds all their keys.

    Attributes:
        table: the sequence table, see `moba_hf.op.sequences`.
        max_seqlen: length of the longest sequence, or a bound on it.
    """

    table: Tensor
    max_seqlen: int

    def spans(self) -> list[list[int]]:
        """`(batch row, begin, end)` of every sequence; waits for the device."""
        return [[row, begin, end] for row, begin, end, _, _ in self.table.tolist()]


def find_packing(
    kwargs: dict[str, Any],
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    padding_given: bool,
    documents: Tensor | None = None,
    asker: tuple[Any, int] | None = None,
) -> Packing | None:
    """The packing of a call, or None when each row is one sequence.

    `cu_seq_lens_q` counts first, then `documents`. Else position ids that do not rise by one mark a new
    sequence, as in transformers: only where no 2-D attention mask is given, and only outside `torch.compile`,
    since looking at them waits for the device (once per forward: the answer is kept for the layers that
    follow). A compiled graph fails at run time on such position ids instead.

    Args:
        documents: mask `(batch, 1, 1, kv_len)` of dtype `DOCUMENTS`, 1 where a document begins.
        asker: config and number of the layer that asks; without it nothing is kept in inference mode.

    Raises:
        ValueError: sequences packed on top of a filled cache or in several batch rows of `cu_seq_lens_q`,
            offsets that do not rise or leave the call.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        _check_no_cache(q_len, kv_len)
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, got a batch of {batch}")
        other = kwargs.get("cu_seq_lens_k")
        if check_values(cu_seqlens):
            _check_offsets(cu_seqlens, q_len)
        bound = kwargs.get("max_length_q")
        table = packed_table(cu_seqlens, cu_seqlens if other is None else other)
        return Packing(table, q_len if bound is None else int(bound))
    if documents is not None:
        return _remembered(documents, batch, asker)
    position_ids = kwargs.get("position_ids")
    if padding_given or position_ids is None or q_len < 2:
        return None
    if position_ids.ndim != 2 or position_ids.shape[1] != q_len:
        return None
    if torch.compiler.is_compiling():
        if torch.compiler.is_dynamo_compiling():
            torch._assert_async((position_ids.diff(dim=1) == 1).all(), _PACKED_UNDER_COMPILE)
        return None
    packing = _remembered(position_ids, batch, asker)
    if packing is not None:
        _check_no_cache(q_len, kv_len)
    return packing


def check_separated(attention_mask: Tensor | None, packing: Packing, what: str) -> None:
    """Raises ValueError unless a stock 4-D mask keeps packed sequences apart.

    Transformers leaves them together as soon as it makes a cache.
    """
    firsts = [(row, begin) for row, begin, end in packing.spans() if 0 < begin < end]
    if not firsts:
        return
    if attention_mask is not None and attention_mask.ndim == 4:
        rows = torch.tensor([row for row, _ in firsts], device=attention_mask.device)
        begins = torch.tensor([begin for _, begin in firsts], device=attention_mask.device)
        rows = rows.clamp(max=attention_mask.shape[0] - 1)
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        # position ids of padding start again too, but a padding query does not see itself
        if not bool((seen[rows, 0, begins, begins - 1] & seen[rows, 0, begins, begins]).any()):
            return
    raise ValueError(
        f"packed sequences reach a layer that keeps the stock implementation ({what}), whose mask does not "
        "separate them: transformers reads position_ids only, so pass them, and use_cache=False"
    )


def document_begins(
    mask_function: Callable[..., Tensor], batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """Where documents begin after the first in `batch` packed rows, bool `(batch, length)`.

    Args:
        mask_function: transformers' rule of who may attend whom, `(batch, head, query, key) -> bool`.

    Returns:
        None where the rule is not causal: something else than packing lies over it.
    """
    row, index = torch.arange(batch, device=device)[:, None], torch.arange(1, length, device=device)
    if bool(mask_function(row, 0, index - 1, index).any()):
        return None
    begins = ~mask_function(row, 0, index, index - 1).expand(batch, -1)
    return torch.nn.functional.pad(begins, (1, 0))


def begins_in_forward(batch: int, length: int) -> Tensor | None:
    """As `document_begins`, from the position ids of the model that asks for a mask; None: not packed.

    With a cache transformers does not look for packing, and some models give their attention layers no
    position ids, so only the model's `forward` knows: its frame is looked at.

    Raises:
        ValueError: ids of three M-RoPE axes that start again. Vision-language models keep such ids to
            themselves, so their stock layers would mix the documents.
    """
    known = _forward_locals()
    position_ids, given = known.get("position_ids"), known.get("kwargs") or {}
    if not isinstance(position_ids, Tensor) or given.get("cu_seq_lens_q") is not None:
        return None
    if known.get("text_position_ids") is None and position_ids.ndim == 3 and position_ids.shape[0] == 3:
        step = position_ids.diff(dim=2)
        # inside a document time never goes back, and no two tokens stand at the same place
        if bool(((step[0] < 0) | (step == 0).all(dim=0)).any()):
            raise ValueError(
                "packed sequences: the position ids start again inside a row, but this model gives its "
                "attention layers no text positions, so the documents would be mixed; pass position ids of "
                "four axes (text first) and use_cache=False, or one document per row"
            )
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    begins = (position_ids.diff(dim=1) != 1).expand(batch, -1)
    return torch.nn.functional.pad(begins, (1, 0)) if bool(begins.any()) else None


def _forward_locals() -> dict[str, Any]:
    """Variables of the transformers model whose `forward` asks for a mask; empty: another function asks."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame.f_code.co_name == "forward" and "inputs_embeds" in frame.f_locals:
            return frame.f_locals
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}


def _check_offsets(cu_seqlens: Tensor, q_len: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > q_len:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to at most the {q_len} tokens of the call, got {ends}"
        )


def _check_no_cache(q_len: int, kv_len: int) -> None:
    if q_len != kv_len:
        raise ValueError(
            f"packed sequences need all their keys in the call, got {q_len} queries over {kv_len} keys: "
            "start from an empty dynamic cache or pass use_cache=False"
        )


@dataclass(frozen=True)
class _Seen:
    """The last position ids or mask looked at; nothing is kept alive but the answer.

    Attributes:
        source: a weak reference, which cannot be mistaken for a later tensor at the same address.
        version: changes with every edit in place; None: an inference tensor, which counts none.
        asker, layer: whose layer asked last. In inference mode the answer is good for later layers of that
            model only: its next forward begins at an earlier one.
    """

    source: weakref.ref[Tensor]
    version: int | None
    batch: int
    asker: weakref.ref[Any] | None
    layer: int
    answer: Packing | None

    def covers(self, source: Tensor, version: int | None, batch: int, asker: tuple[Any, int] | None) -> bool:
        """Whether the answer is that of this call."""
        if self.source() is not source or (self.version, self.batch) != (version, batch):
            return False
        if version is not None:
            return True
        if asker is None or self.asker is None:
            return False
        return self.asker() is asker[0] and asker[1] > self.layer


_last: _Seen | None = None


def _remembered(source: Tensor, batch: int, asker: tuple[Any, int] | None) -> Packing | None:
    """The packing that position ids or a mask say; looking at them waits for the device."""
    global _last
    version = None if source.is_inference() else source._version
    known = _last
    if known is not None and known.covers(source, version, batch, asker):
        answer = known.answer
    else:
        answer = _from_mask(source) if source.dtype == DOCUMENTS else _from_position_ids(source, batch)
    config, layer = (None, -1) if asker is None or version is not None else (weakref.ref(asker[0]), asker[1])
    _last = _Seen(weakref.ref(source), version, batch, config, layer, answer)
    return answer


def _from_mask(mask: Tensor) -> Packing:
    starts = mask[:, 0, 0].bool()
    starts[:, 0] = True
    return _from_starts(starts)


def _from_position_ids(position_ids: Tensor, batch: int) -> Packing | None:
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return None if int(starts.sum()) == position_ids.shape[0] else _from_starts(starts.expand(batch, -1))


def _from_starts(starts: Tensor) -> Packing:
    """The packing of rows whose sequences begin where `starts (batch, length)`, bool, is set."""
    length = starts.shape[1]
    row, begin = starts.nonzero().unbind(1)
    end = torch.full_like(begin, length)
    end[:-1] = torch.where(row[1:] == row[:-1], begin[1:], length)
    table = torch.stack([row, begin, end, begin, end], dim=1).to(torch.int32)
    return Packing(table, int((end - begin).max()))
