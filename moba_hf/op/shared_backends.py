"""The protocol for the shared choice of blocks, and its two implementations in plain torch.

A backend of `moba_hf.op.backends` that supports it has a `shared` attribute that implements `SharedKernels`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype, full_precision
from moba_hf.op.sequences import Attended, Sequences
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, sequence_tiles, unpack_blocks


class SharedKernels(Protocol):
    """One way to compute the shared choice over strided `(batch, heads, length, dim)` tensors.

    Attributes:
        differentiable: autograd can differentiate `attend`, so `backward` is not needed.
        decodes: there is a `decode`, whose steps read only the chosen blocks.
    """

    differentiable: bool
    decodes: bool

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str | None:
        """Why these inputs are not supported, or None."""

    def select(
        self, q: Tensor, k: Tensor, sequences: Sequences, rule: SharedRule, softmax_scale: float
    ) -> Tensor:
        """The choice, `block_mask` int32 `(num_heads, num_tiles, words)`; see `moba_hf.op.shared`."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: Tensor,
        sequences: Sequences,
        block_size: int,
        tile: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """`out (batch, q_len, num_heads, v_dim)`, `lse (batch, num_heads, q_len)` fp32 (fp64)."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        saved: Attended,
        sequences: Sequences,
        block_size: int,
        tile: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous gradients of q, k, v for a fixed choice; `saved.block_indices` is the block mask."""
        ...

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Tensor,
        sequences: Sequences,
        rule: SharedRule,
        softmax_scale: float,
        heard: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`out` and `lse` as `attend`; decode steps, and every batch row is one sequence.

        Does not wait for the device.

        Args:
            kept: `(batch, num_kv_heads, blocks, width)`, the summaries `gates.KeptMass(rule.rotary_pairs)` of
                each row's complete blocks, followed by arbitrary finite values.
            heard: `(batch, num_heads, rows, head_dim)`, the queries just before `q`, with which the steps
                choose too (step 8 of `moba_hf.op.shared`); None: each step chooses by its own query alone.
        """
        ...


class SharedReference:
    """`moba_hf.op.shared_reference`, sequence by sequence."""

    differentiable = True
    decodes = False

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str | None:
        return None

    def select(
        self, q: Tensor, k: Tensor, sequences: Sequences, rule: SharedRule, softmax_scale: float
    ) -> Tensor:
        from moba_hf.op.shared_reference import select_shared_ref

        words = mask_words(sequences.max_seqlen_k, rule.block_size)
        shape = (q.shape[1], num_tiles(sequences, q, rule.tile), words)
        result = torch.zeros(shape, dtype=torch.int32, device=q.device)
        with full_precision(q.device):
            for numbers, rows in sequence_tiles(sequences, q, rule.tile):
                _, _, (queries, keys) = _parts(rows, q, k)
                result[:, numbers] = pack_blocks(select_shared_ref(queries, keys, rule, softmax_scale), words)
        return result

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: Tensor,
        sequences: Sequences,
        block_size: int,
        tile: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        from moba_hf.op.shared_reference import attend_shared_ref

        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
        settings: dict[str, Any] = {"block_size": block_size, "tile": tile, "softmax_scale": softmax_scale}
        with full_precision(q.device):
            for numbers, rows in sequence_tiles(sequences, q, tile):
                batch, at, (queries, keys, values) = _parts(rows, q, k, v)
                chosen = unpack_blocks(block_mask[:, numbers], -(-len(keys) // block_size))
                out[batch, at], lse[batch, :, at] = attend_shared_ref(
                    queries, keys, values, chosen, **settings
                )
        return out, lse

    def backward(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the reference is differentiated by autograd")

    def decode(self, *_: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("the reference has no decode")


def _parts(rows: list[list[int]], q: Tensor, *kv: Tensor) -> tuple[int, slice, list[Tensor]]:
    """Batch row, query slice, and tensors `(length, heads, dim)` of the sequence with the tiles `rows`."""
    batch, queries, keys = rows[0][0], slice(rows[0][1], rows[-1][2]), slice(rows[0][4], rows[0][5])
    parts = [q[batch, :, queries], *(x[batch, :, keys] for x in kv)]
    return batch, queries, [x.transpose(0, 1) for x in parts]


class SharedPortable:
    """`moba_hf.op.shared_portable` and `shared_decode`: pure torch on any device."""

    differentiable = False
    decodes = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str | None:
        return None

    def select(
        self, q: Tensor, k: Tensor, sequences: Sequences, rule: SharedRule, softmax_scale: float
    ) -> Tensor:
        from moba_hf.op import shared_portable

        return shared_portable.select(q, k, sequences, rule, softmax_scale)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: Tensor,
        sequences: Sequences,
        block_size: int,
        tile: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        from moba_hf.op import shared_portable

        settings: dict[str, Any] = {"block_size": block_size, "tile": tile, "softmax_scale": softmax_scale}
        return shared_portable.attend(q, k, v, block_mask, sequences, **settings)

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        saved: Attended,
        sequences: Sequences,
        block_size: int,
        tile: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from moba_hf.op import shared_portable_backward

        settings: dict[str, Any] = {"block_size": block_size, "tile": tile, "softmax_scale": softmax_scale}
        return shared_portable_backward.attend_backward(grad_out, grad_lse, saved, sequences, **settings)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Tensor,
        sequences: Sequences,
        rule: SharedRule,
        softmax_scale: float,
        heard: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from moba_hf.op import shared_decode

        return shared_decode.decode(q, k, v, kept, sequences.table, rule, softmax_scale, heard)
