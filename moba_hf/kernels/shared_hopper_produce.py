"""The producer of `shared_hopper_attend`: draws items from the queue and streams their keys into the ring.

Legend: as in `shared_hopper_attend`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moba_hf.kernels.hopper.common import barrier, load_tile, reinterpret
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    PLAN_BATCH,
    PLAN_K_BEGIN,
    PLAN_POSITION,
    PLAN_Q_BEGIN,
    PLAN_Q_END,
)


@gluon.jit
def place_of(item, tiles, G: gl.constexpr):
    """Tile, kv head and head within the group of an item: kv heads outermost, the last tiles first."""
    rest = item % (tiles * G)
    return tiles - 1 - rest // G, item // (tiles * G), rest % G


@gluon.jit
def steps_of(position, rows, count, TILE: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Number of steps with listed keys only, of all steps (0 if the tile is skipped), first own position.

    If a step has two blocks, the tile's own blocks follow the listed ones without a gap, and one half of the
    last step may be left over.
    """
    UNIT: gl.constexpr = BLOCK_SIZE if BLOCK_SIZE < BLOCK_N else BLOCK_N
    PER_STEP: gl.constexpr = BLOCK_N // UNIT
    first = position // TILE * TILE // BLOCK_SIZE * BLOCK_SIZE
    own = position + rows - first
    listed = count * (BLOCK_SIZE // UNIT)
    whole = (rows > 0) & (own % UNIT == 0)
    total = (listed + own // UNIT + (PER_STEP - 1)) // PER_STEP
    return listed // PER_STEP, gl.where(whole, total, 0), first


@gluon.jit
def _copy(desc, tiles, ready, stage, batch, head, key, second, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Copies a step to `tiles[stage]`: the rows from slot `key` on, or the blocks at `key` and `second`.

    Shared memory holds 64 columns of all rows of a stage, then the next 64 columns. So the rows of one block
    do not lie together: blocks are copied in pieces of 64 columns.
    """
    PIECE: gl.constexpr = desc.block_type.shape
    if PIECE[2] == BLOCK_N:
        mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
        load_tile(desc, [batch, head, key, 0], ready.index(stage), tiles.index(stage))
    else:
        ACROSS: gl.constexpr = tiles.shape[4] // PIECE[3]
        pieces = reinterpret(tiles, tiles.dtype, [STAGES * ACROSS * 2] + PIECE, desc.layout)
        mbarrier.expect(ready.index(stage), ACROSS * 2 * desc.block_type.nbytes)
        for i in gl.static_range(ACROSS):
            at = (stage * ACROSS + i) * 2
            load_tile(desc, [batch, head, key, i * PIECE[3]], ready.index(stage), pieces.index(at))
            load_tile(desc, [batch, head, second, i * PIECE[3]], ready.index(stage), pieces.index(at + 1))


@gluon.jit
def _fill(k_desc, v_desc, ring, batch, head, key, second, step, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Copies the keys and values of a step into the ring; see `_copy`."""
    keys, values, k_ready, v_ready, k_free, v_free = ring
    stage = step % STAGES
    phase = (step // STAGES & 1) ^ 1
    mbarrier.wait(k_free.index(stage), phase)
    _copy(k_desc, keys, k_ready, stage, batch, head, key, second, BLOCK_N, STAGES)
    mbarrier.wait(v_free.index(stage), phase)
    _copy(v_desc, values, v_ready, stage, batch, head, key, second, BLOCK_N, STAGES)


@gluon.jit
def _stream(
    k_desc,
    v_desc,
    ring,
    place,
    entries,
    sizes,
    step,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the ring with an item's listed blocks, then its own ones, a part of a block per step."""
    batch, head, k_begin, first = place
    count, listed, total, own = sizes
    PER_BLOCK: gl.constexpr = BLOCK_SIZE // BLOCK_N
    block = gl.load(entries, mask=listed > 0, other=0).to(gl.int32)
    for i in range(listed):
        begin = k_begin + block * BLOCK_SIZE + i % PER_BLOCK * BLOCK_N
        more = gl.minimum(i + 1, listed - 1) // PER_BLOCK
        block = gl.load(entries + more).to(gl.int32)
        _fill(k_desc, v_desc, ring, batch, head, begin, begin, step, BLOCK_N, STAGES)
        step += 1
    for i in range(listed, total):
        begin = k_begin + first + (i - listed) * BLOCK_N
        _fill(k_desc, v_desc, ring, batch, head, begin, begin, step, BLOCK_N, STAGES)
        step += 1
    return step


@gluon.jit
def _stream_pairs(
    k_desc,
    v_desc,
    ring,
    place,
    entries,
    sizes,
    step,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `_stream`, with two blocks per step.

    If the number of blocks is odd, the last one is copied twice. The copy lies behind the last key that any
    row sees, so it is masked like the own keys behind a row.
    """
    batch, head, k_begin, first = place
    count, listed, total, own = sizes
    last = count + own // BLOCK_SIZE - 1
    block = gl.load(entries, mask=count > 0, other=0).to(gl.int32)
    second = gl.load(entries + 1, mask=count > 1, other=0).to(gl.int32)
    for i in range(total):
        at = 2 * i
        key = gl.where(at < count, block * BLOCK_SIZE, first + (at - count) * BLOCK_SIZE)
        beside = first + (gl.minimum(at + 1, last) - count) * BLOCK_SIZE
        beside = gl.where(at + 1 < count, second * BLOCK_SIZE, beside)
        block = gl.load(entries + at + 2, mask=at + 2 < count, other=0).to(gl.int32)
        second = gl.load(entries + at + 3, mask=at + 3 < count, other=0).to(gl.int32)
        _fill(k_desc, v_desc, ring, batch, head, k_begin + key, k_begin + beside, step, BLOCK_N, STAGES)
        step += 1
    return step


@gluon.jit
def produce(
    k_desc,
    v_desc,
    ring,
    queue,
    pointers,
    first_tile,
    tiles,
    work,
    list_length,
    num_heads,
    G: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Draws items, announces them to the consumers, and fills the ring with the keys of each item."""
    items, drawn, taken = queue
    tile_ptr, list_ptr, count_ptr, counter_ptr = pointers
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    item = gl.program_id(0)
    following = item + gl.num_programs(0)
    step = 0
    turn = 0
    while item < work:
        later = gl.atomic_add(counter_ptr, 1) + 2 * gl.num_programs(0)
        slot = turn % 2
        mbarrier.wait(taken.index(slot), (turn // 2 & 1) ^ 1)
        items.index(slot).store(gl.full([1], 0, gl.int32, one) + later)
        barrier()
        mbarrier.arrive(drawn.index(slot), count=1)
        tile, kv_head, in_group = place_of(item, tiles, G)
        info = tile_ptr + (first_tile + tile) * INFO_COLUMNS
        at = tile.to(gl.int64) * num_heads + kv_head * G + in_group
        count = gl.load(count_ptr + at)
        position = gl.load(info + PLAN_POSITION)
        rows = gl.load(info + PLAN_Q_END) - gl.load(info + PLAN_Q_BEGIN)
        listed, total, first = steps_of(position, rows, count, TILE, BLOCK_SIZE, BLOCK_N)
        batch = gl.load(info + PLAN_BATCH)
        k_begin = gl.load(info + PLAN_K_BEGIN)
        entries = list_ptr + at * list_length
        if total > 0:
            place = (batch, kv_head, k_begin, first)
            sizes = (count, listed, total, position + rows - first)
            if BLOCK_SIZE < BLOCK_N:
                step = _stream_pairs(
                    k_desc, v_desc, ring, place, entries, sizes, step, BLOCK_SIZE, BLOCK_N, STAGES
                )
            else:
                step = _stream(k_desc, v_desc, ring, place, entries, sizes, step, BLOCK_SIZE, BLOCK_N, STAGES)
        item = following
        following = later
        turn += 1
