"""The Triton kernels as a backend; importing this needs triton."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf import kernels
from moba_hf.kernels import shared, shared_steps
from moba_hf.kernels.shared_summary import update_kept_mass
from moba_hf.op import shared_decode
from moba_hf.op.gates import Kept, KeptMass, KeptMeans
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.sequences import Attended, Sequences
from moba_hf.op.shared import SharedRule


class TritonCacheKernels:
    """The Triton kernels for caches."""

    max_append_rows = kernels.MAX_APPENDED_ROWS
    max_dense_queries = kernels.MAX_DECODE_QUERIES

    def append(
        self, keys: Tensor, values: Tensor, length: Tensor, key_states: Tensor, value_states: Tensor
    ) -> None:
        kernels.append(keys, values, length, key_states, value_states)

    def update_means(
        self,
        means: Tensor,
        keys: Tensor,
        kv_start: Tensor | None,
        length: int | Tensor,
        behind: int,
        block_size: int,
    ) -> None:
        kernels.update_block_means(means, keys, kv_start, length, behind, block_size)

    def update_mass(
        self,
        kept: Tensor,
        keys: Tensor,
        kv_start: Tensor | None,
        length: int | Tensor,
        behind: int,
        block_size: int,
        rotary_pairs: str,
    ) -> None:
        update_kept_mass(kept, keys, kv_start, length, behind, block_size, rotary_pairs)

    def summarizes(self, kept: Kept, head_dim: int, block_size: int) -> bool:
        if isinstance(kept, KeptMass):
            return shared.unsupported_blocks(block_size, head_dim) is None
        return isinstance(kept, KeptMeans) and block_size >= kernels.MIN_BLOCK_SIZE

    def takes(self, device: torch.device) -> bool:
        return kernels.unsupported_device(device) is None

    def row_bounds(self, given: Tensor, q_offset: int, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.row_bounds(given, q_offset, q_len)

    def dense_decode(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        return kernels.dense_decode_attention(q, k, v, table, softmax_scale)


class TritonShared:
    """The Triton kernels for the shared choice."""

    differentiable = False
    decodes = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str | None:
        reason = kernels.unsupported(q, k, v, rule.block_size)
        return shared.unsupported_rule(rule, q.shape[3]) if reason is None else reason

    def select(
        self, q: Tensor, k: Tensor, sequences: Sequences, rule: SharedRule, softmax_scale: float
    ) -> Tensor:
        return shared.select(q, k, sequences, rule, softmax_scale)

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
        return shared.attend(q, k, v, block_mask, sequences, block_size, tile, softmax_scale)

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
        return shared.attend_backward(grad_out, grad_lse, saved, sequences, block_size, tile, softmax_scale)

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
        if q.shape[2] > kernels.MAX_DECODE_QUERIES:
            return shared_decode.decode(q, k, v, kept, sequences.table, rule, softmax_scale, heard)
        return shared_steps.decode(q, k, v, kept, sequences.table, rule, softmax_scale, heard)


class TritonBackend:
    """The Triton kernels. A prefill recomputes block means, in the layout that the gate kernels need."""

    max_decode_queries = kernels.MAX_DECODE_QUERIES
    decode_gates = ("mean",)
    differentiable = False
    cache = TritonCacheKernels()
    shared = TritonShared()

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | None) -> str | None:
        if rule is not None and rule.gate not in ("mean", "mass"):
            return f"there is no kernel for gate={rule.gate!r}"
        return kernels.unsupported(q, k, v, kernels.MIN_BLOCK_SIZE if rule is None else rule.block_size)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
        block_means: Tensor | None,
    ) -> Tensor:
        return kernels.select_blocks(q, k, sequences, rule, softmax_scale)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        sequences: Sequences,
        block_size: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        return kernels.attend(q, k, v, block_indices, sequences, block_size, softmax_scale)

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        saved: Attended,
        sequences: Sequences,
        block_size: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.attend_backward(grad_out, grad_lse, saved, sequences, block_size, softmax_scale)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_means: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        numbers = (rule.block_size, rule.topk, rule.sink_blocks, rule.local_blocks)
        choice = kernels.choose_blocks(q, block_means, sequences.table, k.shape[2], *numbers)
        return kernels.attend(q, k, v, choice, sequences, rule.block_size, softmax_scale, by_row=True)
