"""Checks of the shared choice's kernels for any device, used by the tests and the benchmark.

The choice must equal the reference's, except for blocks whose mass is within 1 % of a decision. Attention and
gradients must equal those of the fp32 reference under the kernel's own choice, measured by
`norm(error) / norm(reference)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from moba_hf.kernels import shared, shared_tuning
from moba_hf.kernels.shared_plan import make_shared_plan
from moba_hf.op.checks import Case
from moba_hf.op.sequences import Attended, Sequences
from moba_hf.op.shared import (
    WORD_BITS,
    SharedRule,
    mask_words,
    num_tiles,
    pack_blocks,
    sequence_tiles,
    tile_table,
    unpack_blocks,
)
from moba_hf.op.shared_reference import attend_shared_ref, select_shared_ref, tile_masses_ref, tiles_ref

ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}


def sequences_of(case: Case) -> Sequences:
    """Where the sequences of `case` lie."""
    return Sequences(case.table, *case.longest, by_row=False)


def each_sequence(case: Case, tile: int) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Tiles, queries and `(length, heads, dim)` tensors of each sequence with queries."""
    at = 0
    for row, q_begin, q_end, k_begin, k_end in case.table.tolist():
        if q_end > q_begin:
            tensors = [case.q[row, :, q_begin:q_end], case.k[row, :, k_begin:k_end]]
            tensors += [case.v[row, :, k_begin:k_end]]
            count = len(tiles_ref(q_end - q_begin, k_end - k_begin, tile))
            yield slice(at, at + count), slice(q_begin, q_end), [x.transpose(0, 1) for x in tensors]
            at += count


def assert_plan(case: Case, rule: SharedRule) -> None:
    """The kernels' tile table equals that of the definition."""
    limits = {"block_size": rule.block_size, "tile": rule.tile}
    plan = make_shared_plan(case.q, case.k, case.table, *case.longest, **limits)
    assert torch.equal(plan.tiles[:, :6], tile_table(case.table, rule.tile, plan.num_tiles))


def checked_choice(case: Case, rule: SharedRule, **kwargs: object) -> Tensor:
    """The kernels' choice, compared with the reference; keywords go to `shared.select`."""
    mask = shared.select(case.q, case.k, sequences_of(case), rule, case.scale, **kwargs)
    last = 0
    for tiles, _, (q, k, _v) in each_sequence(case, rule.tile):
        expected = select_shared_ref(q, k, rule, case.scale)
        got = unpack_blocks(mask[:, tiles], mask.shape[2] * 32)
        assert not got[..., expected.shape[2] :].any(), "bits behind the sequence"
        differ = (got[..., : expected.shape[2]] != expected).nonzero()
        masses = tile_masses_ref(q, k, rule, case.scale) if len(differ) else []
        for head, tile, block in differ.tolist():
            mass = masses[tile][head]
            assert block < len(mass), "a forced block differs"
            assert rule.threshold is not None, (tile, block)
            assert rule.share is None, (tile, block)
            assert rule.topk is None, (tile, block)
            decides = rule.threshold * mass.max()
            assert abs(mass[block] - decides) < 0.01 * decides, (head, tile, block, mass[block], decides)
        last = tiles.stop
    assert (mask[:, last:] == 0).all(), "tiles that are not needed"
    return mask


def listed_choice(case: Case, rule: SharedRule, most: int) -> Tensor:
    """A random choice whose tiles list 0 to `most` blocks besides those that they overlap, head by head."""
    sequences = sequences_of(case)
    chosen = torch.zeros(
        case.num_heads,
        num_tiles(sequences, case.q, rule.tile),
        mask_words(sequences.max_seqlen_k, rule.block_size) * WORD_BITS,
        dtype=torch.bool,
    )
    for tiles, rows in sequence_tiles(sequences, case.q, rule.tile):
        for tile, (_, q_begin, q_end, position, *_keys) in zip(
            range(tiles.start, tiles.stop), rows, strict=True
        ):
            candidates = position // rule.tile * rule.tile // rule.block_size
            end = -(-(position + q_end - q_begin) // rule.block_size)
            chosen[:, tile, candidates:end] = True
            for head in range(case.num_heads):
                listed = torch.randperm(candidates)[: (tile + head) % (most + 1)]
                chosen[head, tile, listed] = True
    return pack_blocks(chosen, chosen.shape[2] // WORD_BITS).to(case.q.device)


def assert_attention(
    case: Case, rule: SharedRule, mask: Tensor, workspace: int | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """The kernels' `(out, lse)` under `mask`, compared with the reference; keywords go to `shared.attend`.

    Args:
        workspace: maximum bytes for lists.
    """
    limits = (sequences_of(case), rule.block_size, rule.tile, case.scale)
    budget = shared_tuning.LIST_WORKSPACE if workspace is None else workspace
    with mock.patch.object(shared_tuning, "LIST_WORKSPACE", budget):
        out, lse = shared.attend(case.q, case.k, case.v, mask, *limits, **kwargs)
    error = size = 0.0
    covered = torch.zeros(case.q.shape[2], dtype=torch.bool)
    for tiles, queries, (q, k, v) in each_sequence(case, rule.tile):
        chosen = unpack_blocks(mask[:, tiles], -(-len(k) // rule.block_size))
        rest = {"block_size": rule.block_size, "tile": rule.tile, "softmax_scale": case.scale}
        truth, truth_lse = attend_shared_ref(q.float(), k.float(), v.float(), chosen, **rest)
        error += (out[0, queries].float() - truth).square().sum().item()
        size += truth.square().sum().item()
        assert (lse[0, :, queries] - truth_lse).abs().max() < 1e-4
        covered[queries] = True
    assert (error / size) ** 0.5 < ERROR[case.dtype], (error / size) ** 0.5
    assert (out[0, ~covered] == 0).all()
    assert (lse[0, :, ~covered] == -torch.inf).all()
    return out, lse


def assert_gradients(case: Case, rule: SharedRule, mask: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
    """The kernels' gradients under `mask`, compared; keywords go to `shared.attend_backward`."""
    limits = (sequences_of(case), rule.block_size, rule.tile, case.scale)
    out, lse = shared.attend(case.q, case.k, case.v, mask, *limits)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    saved = Attended(case.q, case.k, case.v, out, lse, mask)
    grads = shared.attend_backward(grad_out, grad_lse, saved, *limits, **kwargs)
    truth = Case.__new__(Case)
    truth.__dict__.update(case.__dict__)
    leaves = [x.detach().float().requires_grad_() for x in (case.q, case.k, case.v)]
    truth.q, truth.k, truth.v = leaves
    total = torch.zeros((), device=out.device)
    for tiles, queries, (q, k, v) in each_sequence(truth, rule.tile):
        chosen = unpack_blocks(mask[:, tiles], -(-len(k) // rule.block_size))
        rest = {"block_size": rule.block_size, "tile": rule.tile, "softmax_scale": case.scale}
        truth_out, truth_lse = attend_shared_ref(q, k, v, chosen, **rest)
        total = total + (truth_out * grad_out[0, queries].float()).sum()
        total = total + (truth_lse * grad_lse[0, :, queries]).sum()
    total.backward()
    for grad, leaf in zip(grads, leaves, strict=True):
        assert leaf.grad is not None
        error = (grad.float() - leaf.grad).norm() / leaf.grad.norm()
        assert error < 2 * ERROR[case.dtype], error
    return grads
