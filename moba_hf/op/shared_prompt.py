"""The output of whole prompts under a shared choice, without gradients and without lse.

Rows before `dense_below` attend to every key. Torch's fused attention computes them faster than kernels that
loop over full lists, so only the tiles from there on go through the shared choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.dense import dense_attention
from moba_hf.op.inputs import refuse_tangents
from moba_hf.op.sequences import Sequences, batched_table, constant_table, derived
from moba_hf.op.shared_ops import CHOICE_WATCHERS, select_shared, shared_attention
from moba_hf.op.shared_rule import SharedRule


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    *,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """The `out` of `shared_attention`, `(batch, q_len, num_heads, v_dim)`; differentiable.

    Arguments as for `shared_attention`, except:

    Args:
        q, k, v: each batch row is one sequence from its first token on, without padding.
        backend: a name in `moba_hf.op.backend_table.BACKENDS`.

    Raises:
        NotImplementedError: a forward-mode derivative, which only backend "reference" supports.
    """
    if backend != "reference":
        refuse_tangents(q, k, v)
    dense = rule.dense_below
    if not _splits(q, k, v, rule, backend):
        return shared_attention(q, k, v, sequences, rule, softmax_scale=softmax_scale, backend=backend)[0]
    later = derived(sequences.table, ("rows from", dense), lambda: _rows_from(sequences, dense))
    out, _ = shared_attention(q, k, v, later, rule, softmax_scale=softmax_scale, backend=backend)
    q, k, v = (x[:, :, :dense] for x in (q, k, v))
    if CHOICE_WATCHERS:
        below = Sequences(batched_table(q.shape[0], dense, dense, q.device), dense, dense)
        mask = select_shared(q, k, below, rule, softmax_scale=softmax_scale, backend=backend)
        for watch in CHOICE_WATCHERS:
            watch(mask, q, below, rule)
    out[:, :dense] = dense_attention(q, k, v, softmax_scale, backend=backend)
    return out


def _splits(q: Tensor, k: Tensor, v: Tensor, rule: SharedRule, backend: str) -> bool:
    """Whether torch's attention computes the rows before `dense_below`."""
    if not 0 < rule.dense_below < q.shape[2]:
        return False
    if backend == "reference" or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def _rows_from(sequences: Sequences, first: int) -> Sequences:
    """Those queries of each row that are at position `first` or later, with all keys."""
    table = sequences.table.clone()
    table[:, 1] = first
    table = constant_table(table, covers=True)  # the earlier rows are overwritten
    return Sequences(table, sequences.max_seqlen_q - first, sequences.max_seqlen_k)
