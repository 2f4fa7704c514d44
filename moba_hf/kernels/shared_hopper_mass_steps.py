"""One step of the mass kernel for Hopper, `shared_hopper_mass`: products, exponentials, stores.

Legend: D head dim, P parts of a block, N blocks of a step, S stages of the ring.

Issuing instructions bounds the kernel, so `mass_step` does without running maxima. Exponentials are relative
to a `reference` of the row, found in its first step, and each step is stored in a unit of its own. This holds
while a row's total stays far from the limits of fp32; `checked_step` finds the maximum of each step first and
takes any inputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from moba_hf.kernels.hopper.common import barrier, product_layout
from moba_hf.kernels.layout import LOWEST

# A reference is this many powers of two above the largest estimate among the first blocks, which leaves more
# than 2^80 below that estimate and 2^140 above it.
_ABOVE = gl.constexpr(40.0)


@gluon.constexpr_function
def _slot_layout(n):
    """The layout in which a thread holds 8 contiguous slots of every 32, of two rows, as of products."""
    slots = [[0, 1], [0, 2], [0, 4], *([0, 1 << i] for i in range(5, n.bit_length() - 1)), [8, 0]]
    return gl.DistributedLinearLayout(
        slots, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, n]
    )


@gluon.jit
def _products(operands, ring, step, P: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Issues the products of a step: for each part with its variances and its mean, then the smallest key."""
    q, squares = operands
    centers, spreads, ready, free = ring
    D: gl.constexpr = q.shape[1]
    zeros = gl.full([64, N], 0.0, gl.float32, product_layout(N))
    stage = step % S
    mbarrier.wait(ready.index(stage), step // S & 1)
    products = ()
    for part in gl.static_range(P):
        spread = spreads.index(stage * P + part).reshape([N, D // 2]).permute((1, 0))
        center = centers.index(stage * (P + 1) + part).reshape([N, D]).permute((1, 0))
        moved = warpgroup_mma(squares, spread, zeros, use_acc=False, is_async=True)
        both = (moved, warpgroup_mma(q, center, zeros, use_acc=False, is_async=True))
        products = products + both  # type: ignore[assignment]
    center = centers.index(stage * (P + 1) + P).reshape([N, D]).permute((1, 0))
    return products, warpgroup_mma(q, center, zeros, use_acc=False, is_async=True)


@gluon.jit
def reference_of(q, ring, scale, columns, LOG2_SIZE: gl.constexpr, N: gl.constexpr):
    """log2 `(64,)` of the unit in which a row's exponentials are computed, from its first step."""
    centers, spreads, ready, free = ring
    layout: gl.constexpr = product_layout(N)
    zeros = gl.full([64, N], 0.0, gl.float32, layout)
    mbarrier.wait(ready.index(0), 0)
    center = centers.index(0).reshape([N, q.shape[1]]).permute((1, 0))
    product = warpgroup_mma(q, center, zeros, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    inside = (gl.arange(0, N, gl.SliceLayout(0, layout)) < columns)[None, :]
    return gl.max(gl.where(inside, product * scale, LOWEST), 1) + (LOG2_SIZE + _ABOVE)


@gluon.jit
def mass_step(
    operands,
    ring,
    step,
    scales,
    state,
    places,
    columns,
    LOG2_SIZE: gl.constexpr,
    P: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Stores the masses of a step and their unit; returns the new `total` of the rows."""
    reference, total = state
    scale, square_scale, limit, root = scales
    free = ring[3]
    near = (LOG2_SIZE - reference)[:, None]
    products, least = _products(operands, ring, step, P, N, S)
    mass = ()
    for part in gl.static_range(P):
        pair = [products[2 * part], products[2 * part + 1]]
        moved, center = warpgroup_mma_wait(2 * (P - part) - 1, deps=pair)
        far = gl.sqrt(moved) * root - reference[:, None]
        term = center * scale + gl.where(moved <= limit, moved * (0.5 * square_scale) + near, far)
        mass = gl.exp2(term) if part == 0 else mass + gl.exp2(term)
    least = warpgroup_mma_wait(0, deps=[least])
    barrier()
    mbarrier.arrive(free.index(step % S), count=1)
    mass += gl.exp2(least * scale - reference[:, None])
    if MASKED:
        inside = step * N + gl.arange(0, N, gl.SliceLayout(0, product_layout(N))) < columns
        mass = gl.where(inside[None, :], mass, 0.0)
    # the exponent of the step's largest mass in a row; the bounds keep both powers of two normal numbers
    exponent = (gl.max(mass, 1).to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.minimum(gl.maximum(exponent, -126), 126)
    factor = ((127 - exponent) << 23).to(gl.float32, bitcast=True)
    _store(mass * factor[:, None], reference + exponent.to(gl.float32), step, places)
    return total + gl.sum(mass, 1)


@gluon.jit
def checked_step(
    operands,
    ring,
    step,
    first,
    scales,
    state,
    places,
    columns,
    LOG2_SIZE: gl.constexpr,
    P: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """`mass_step` for any inputs, at `first + step` of the ring; returns the new `high` and `total`."""
    high, total = state
    scale, square_scale, limit, root = scales
    free = ring[3]
    layout: gl.constexpr = product_layout(N)
    products, least = _products(operands, ring, first + step, P, N, S)
    inside = (step * N + gl.arange(0, N, gl.SliceLayout(0, layout)) < columns)[None, :]
    least = warpgroup_mma_wait(0, deps=[least])
    least = gl.where(inside, least * scale, LOWEST)
    top = least
    terms = ()
    for part in gl.static_range(P):
        moved, center = warpgroup_mma_wait(0, deps=[products[2 * part], products[2 * part + 1]])
        far = gl.sqrt(moved * (2 * LOG2_SIZE * square_scale))
        near = moved * (0.5 * square_scale) + LOG2_SIZE
        term = gl.where(inside, center * scale + gl.where(moved <= limit, near, far), LOWEST)
        terms = terms + (term,)  # type: ignore[assignment]
        top = gl.maximum(top, term)
    barrier()
    mbarrier.arrive(free.index((first + step) % S), count=1)
    new_high = gl.maximum(high, gl.max(top, 1))
    mass = gl.exp2(least - new_high[:, None])
    for part in gl.static_range(P):
        mass += gl.exp2(terms[part] - new_high[:, None])
    _store(mass, new_high, step, places)
    return new_high, total * gl.exp2(high - new_high) + gl.sum(mass, 1)


@gluon.jit
def _store(mass, unit, step, places):
    """Stores the masses `(64, N)` of a step, and log2 of their `unit (64,)`."""
    mass_ptr, high_ptr, mass_blocks, item = places
    N: gl.constexpr = mass.shape[1]
    slots = gl.reshape(mass.to(gl.float16), [64, N // 32, 4, 4, 2])
    slots = gl.reshape(gl.permute(slots, (0, 1, 3, 2, 4)), [64, N])
    layout: gl.constexpr = _slot_layout(N)
    slots = gl.convert_layout(slots, layout)
    column = step * N + gl.arange(0, N, gl.SliceLayout(0, layout))
    row = gl.convert_layout(item, gl.SliceLayout(1, layout))
    at = mass_ptr + row.to(gl.int64) * mass_blocks
    gl.store(at[:, None] + column[None, :], slots, mask=(row >= 0)[:, None])
    gl.store(high_ptr + item.to(gl.int64) * (mass_blocks // N) + step, unit, mask=item >= 0)
