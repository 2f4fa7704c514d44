"""The mask function that transformers calls for "moba", and what its compact masks mean.

A compact mask is `(batch, 1, 1, kv_len)`: 0 not written yet, 1 a real token, 2 padding; int8 from a 2-D mask,
uint8 where none was given. Its shape depends on nothing but the cache, so it works for static caches, under
compile, and costs `kv_len` bytes. Where the mask function learns of packed rows, it gives int16 of that shape
instead: 1 where a document begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moba_hf.hf.packing import DOCUMENTS, begins_in_forward, document_begins
from moba_hf.op.dense import causal_mask
from moba_hf.op.ops import check_values
from moba_hf.op.sequences import RowBounds

UNWRITTEN, REAL, PADDING = 0, 1, 2
COMPACT = (torch.int8, torch.uint8)
# Attribute by which a compact mask names its bounds.
_BOUNDS = "_moba_bounds"


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The compact mask `(batch_size, 1, 1, kv_length)`; None when nothing is padded, packed or unwritten.

    Window and chunk layers (`local_size`), custom overlays and bidirectional models get transformers' own
    dense mask. Called by transformers with keywords only, once per forward.
    """
    bidirectional = kwargs.get("allow_is_bidirectional_skip") or not getattr(config, "is_causal", True)
    stock = local_size is not None or use_vmap or bidirectional
    if not stock and mask_function not in (None, causal_mask_function) and not torch.compiler.is_compiling():
        begins = document_begins(mask_function, batch_size, kv_length, device)
        stock = begins is None or attention_mask is not None
        if not stock and begins is not None and begins.any():
            return _documents(begins)
    if stock:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            config=config,
            use_vmap=use_vmap,
            **kwargs,
        )
    if attention_mask is None and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
        if q_length < 2 or q_offset > 0 or torch.compiler.is_compiling():
            return None
        begins = begins_in_forward(batch_size, q_length)  # not deeper: it counts frames
        return None if begins is None else _documents(begins)
    return _compact(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)


def _documents(begins: Tensor) -> Tensor:
    """The mask of packed rows, from where documents begin, bool `(batch, kv_len)`."""
    return begins[:, None, None, :].to(DOCUMENTS)


def _compact(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """The compact mask; it keeps its bounds where they are known already, or are taken inside a graph."""
    slot = torch.arange(kv_length, device=device) + kv_offset
    real = written = (slot < q_offset + q_length)[None].expand(batch_size, -1)
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        given = nn.functional.pad(attention_mask.to(torch.bool), (0, max(0, missing)))
        real = written & given[:, kv_offset : kv_offset + kv_length]
    dtype = torch.uint8 if attention_mask is None else torch.int8
    mask = (written.to(dtype) * PADDING - real.to(dtype))[:, None, None, :]
    if attention_mask is None:
        begin = torch.zeros(batch_size, dtype=torch.int64, device=device)
        first = begin + (q_offset - kv_offset)
        _keep_bounds(mask, RowBounds.of(begin, first + q_length, first, q_length))
    elif torch.compiler.is_compiling():
        _keep_bounds(mask, row_bounds(mask, q_length))
    return mask


def row_bounds(mask: Tensor, q_len: int) -> RowBounds:
    """Where each row's real tokens lie, from a compact mask.

    Raises:
        ValueError: a row whose real tokens are not contiguous (read on the CPU, see `ops.check_values`).
    """
    flat = mask[:, 0, 0]
    real = flat == REAL
    kv_start = real.int().argmax(dim=1)
    kv_end = torch.where(real.any(dim=1), flat.shape[1] - real.flip(1).int().argmax(dim=1), 0)
    if check_values(mask):
        holes = (real.sum(dim=1) != kv_end - kv_start).nonzero()
        if len(holes):
            raise ValueError(
                f"the attention mask of batch row {int(holes[0])} has holes: MoBA takes padding before and "
                "after a row's tokens, not between them"
            )
    return RowBounds.of(kv_start, kv_end, (flat != UNWRITTEN).sum(dim=1) - q_len, q_len)


def bounds_of(mask: Tensor, q_len: int) -> RowBounds:
    """`row_bounds` of a compact mask, taken once for all layers that get the same mask."""
    known: tuple[int, RowBounds] | None = getattr(mask, _BOUNDS, None)
    if known is not None and known[0] == _version(mask) and known[1].q_len == q_len:
        return known[1]
    bounds = row_bounds(mask, q_len)
    if not torch.compiler.is_compiling():  # a graph would have to put the attribute on its input
        _keep_bounds(mask, bounds)
    return bounds


def _keep_bounds(mask: Tensor, bounds: RowBounds) -> None:
    setattr(mask, _BOUNDS, (_version(mask), bounds))


def _version(mask: Tensor) -> int:
    """Changes when `mask` is written to, as far as that can be told."""
    return 0 if torch.compiler.is_compiling() or mask.is_inference() else mask._version


def stock_mask(mask: Tensor | None, q_len: int) -> Tensor | None:
    """A mask that the stock implementation understands: a compact one is written out."""
    if mask is None or mask.dtype not in COMPACT:
        return mask
    return causal_mask(bounds_of(mask, q_len).sequences(mask.shape[3]), 0, q_len, mask.shape[3])
