"""Rules that choose key blocks, and attention under their masks, for `bench_shared_quality.py`.

Written independently of the package, as masked dense attention, so that it can check the package. All
functions take one sequence: `q (heads, N, D)`, `k` and `v (kv heads, N, D)`, on one device, fp32. Rows are
processed in chunks so that a score matrix fits into memory; the choice does not depend on the chunks.

A block is a candidate for a tile of queries if it ends before the tile begins. The first blocks, the blocks
before the tile and the blocks that the tile overlaps are always attended. The mass of a candidate is the
mean, over the sampled rows of the tile, of its softmax weight among the candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ROWS = 2048  # query rows scored at once, a multiple of every tile
INF = float("inf")


@dataclass(frozen=True)
class Rule:
    """The rule that decides which blocks a tile of queries attends.

    Attributes:
        kind: "dense"; "shared" (a tile of 1 is a choice per query); or a published tile rule: "antidiagonal"
            (XAttention), "pooled" (FlexPrefill's query-aware part), "relative" (FlashPrefill V2).
        tile: number of queries that share a list.
        block: keys in a block.
        gate: "mass", "unpaired" (the mass with one variance per dimension), "mean", or "true".
        part: keys in a part of a block, for the mass gate.
        alpha: take blocks with at least `alpha` times the largest mass; 0: off.
        share: take blocks by decreasing mass until this share of the mass is reached; 0: off.
        both: with `alpha` and `share`, "or" takes blocks that either takes, "and" blocks that both take.
        topk: number of blocks, kept ones included; 0: no limit.
        cap: maximum number of candidates in addition to the kept blocks; 0: no limit.
        stride: the mass comes from rows 0, stride, 2 stride, ... of a tile.
        hears_itself: the sampled rows are the last of each run of `stride`, and with causal lists a row also
            hears itself, as in the package.
        pool: use means of this many queries instead of sampled rows.
        before: weight of the previous tile's mass relative to the tile's own.
        strongest: the mass is the larger of the mean over rows and `strongest` times the maximum over rows.
        own: a row's softmax includes the keys of its own tile, whose mass needs no block.
        floor: take blocks with at least this mass; 0: off.
        true_every: rows 0, true_every, ... of a tile use their true mass; 0: none does.
        means: add each dropped candidate through its mean key and value, weighted by its number of keys.
        sink, local: number of first blocks, and of blocks before the tile, that are always attended.
        dense_below: rows before this one attend everything.
        dense_last: this many last rows, rounded up to whole tiles, attend everything.
        causal: each row's list depends only on the rows of its tile up to itself.
        antidiagonal: stride of the antidiagonals.
    """

    kind: str = "shared"
    tile: int = 64
    block: int = 64
    gate: str = "mass"
    part: int = 16
    alpha: float = 0.0
    share: float = 0.0
    both: str = "or"
    topk: int = 0
    cap: int = 0
    stride: int = 1
    hears_itself: bool = False
    pool: int = 1
    before: float = 0.0
    strongest: float = 0.0
    own: bool = False
    floor: float = 0.0
    true_every: int = 0
    means: bool = False
    sink: int = 1
    local: int = 1
    dense_below: int = 0
    dense_last: int = 0
    causal: bool = False
    antidiagonal: int = 8

    def read_causally(self) -> Rule:
        """The same rule with lists that each row could have computed from earlier rows."""
        return replace(self, causal=True)

    def label(self) -> str:
        """A short name made of the values that differ from the defaults."""
        if self.kind == "dense":
            return "dense"
        differing = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        parts = [f"{self.kind} {self.tile}/{self.block}"]
        parts += [str(getattr(self, name)) for name in ("gate", "both") if name in differing]
        shown = ("part", "alpha", "share", "topk", "cap", "stride", "pool", "before", "strongest", "floor")
        shown += ("true_every", "sink", "local", "dense_below", "dense_last", "antidiagonal")
        parts += [f"{name} {getattr(self, name):g}" for name in shown if name in differing]
        flags = [f" +{name}" for name in ("own", "means", "hears_itself") if getattr(self, name)]
        return " ".join(parts) + "".join(flags) + (" causal" if self.causal else "")


class Keys:
    """What a rule needs from one sequence's keys and values."""

    def __init__(self, k: Tensor, v: Tensor, rule: Rule, scale: float):
        self.k, self.v, self.scale = k, v, scale
        count, size = k.shape[1] // rule.block, rule.block
        blocks = k[:, : count * size].unflatten(1, (count, size))
        self.mean = blocks.mean(2)
        self.value = v[:, : count * size].unflatten(1, (count, size)).mean(2)
        if rule.gate in ("mass", "unpaired"):
            part = min(rule.part, size)
            parts = blocks.unflatten(2, (size // part, part))
            self.part_mean = parts.mean(3).transpose(1, 2)
            var = parts.var(3, unbiased=False).transpose(1, 2)
            if rule.gate == "mass":  # the rotary embedding rotates the pairs (d, d + D/2)
                half = var.shape[-1] // 2
                var = ((var[..., :half] + var[..., half:]) / 2).repeat(1, 1, 1, 2)
            self.part_var = var
            least = blocks.square().sum(3).argmin(2)[..., None, None].expand(-1, -1, 1, k.shape[2])
            self.smallest = blocks.gather(2, least)[:, :, 0]
            self.log_part = math.log(part)


def grouped(x: Tensor, heads: int) -> Tensor:
    """`(heads, rows, D)` as `(kv heads, group * rows, D)`."""
    return x.reshape(heads, -1, x.shape[2])


def row_scores(q: Tensor, keys: Keys, rule: Rule, columns: int) -> Tensor:
    """Scores `(heads, rows, columns)` of the first complete blocks."""
    heads = keys.k.shape[0]
    queries = grouped(q, heads) * keys.scale
    if rule.gate == "mean":
        scores = queries @ keys.mean[:, :columns].transpose(1, 2)
        return scores.view(q.shape[0], q.shape[1], columns)
    squares = queries.square()
    total = queries @ keys.smallest[:, :columns].transpose(1, 2)
    for part in range(keys.part_mean.shape[1]):
        score = queries @ keys.part_mean[:, part, :columns].transpose(1, 2)
        spread = squares @ keys.part_var[:, part, :columns].transpose(1, 2)
        far = (2 * keys.log_part * spread).sqrt() - keys.log_part
        score += torch.where(spread <= 2 * keys.log_part, spread / 2, far) + keys.log_part
        total = torch.logaddexp(total, score)
    return total.view(q.shape[0], q.shape[1], columns)


def true_scores(q: Tensor, keys: Keys, rule: Rule, columns: int) -> Tensor:
    """The same, computed from all keys: the logarithm of a block's true mass."""
    logits = grouped(q, keys.k.shape[0]) * keys.scale @ keys.k[:, : columns * rule.block].transpose(1, 2)
    return logits.unflatten(2, (columns, rule.block)).logsumexp(3).view(q.shape[0], q.shape[1], columns)


def own_scores(q: Tensor, keys: Keys, rule: Rule, first: int) -> Tensor:
    """Logarithm `(heads, rows)` of a row's mass on the blocks that its tile overlaps, up to its own key."""
    size = max(rule.tile, rule.block)
    begin = first // size * size
    rows = torch.arange(first, first + q.shape[1], device=q.device)
    at = torch.arange(begin, rows[-1] + 1, device=q.device)
    logits = grouped(q, keys.k.shape[0]) * keys.scale @ keys.k[:, begin : rows[-1] + 1].transpose(1, 2)
    begins = rows // rule.tile * rule.tile // rule.block * rule.block
    hidden = (at > rows[:, None]) | (at < begins[:, None])
    return logits.view(q.shape[0], q.shape[1], -1).masked_fill_(hidden, -INF).logsumexp(2)


def by_share(mass: Tensor, share: float, whole: bool = False) -> Tensor:
    """Marks entries by decreasing mass until `share` of the sum, or of 1 if `whole`, is reached."""
    ordered, index = mass.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    total = ordered.sum(-1, keepdim=True)
    kept = before + (1 - total).clamp(min=0) < share if whole else before < share * total
    return torch.zeros_like(kept).scatter_(-1, index, kept)


def largest(mass: Tensor, count: int) -> Tensor:
    """Marks the `count` largest entries."""
    index = mass.topk(min(count, mass.shape[-1]), -1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, True)


def tile_mass(weights: Tensor, rule: Rule) -> Tensor:
    """Mass `(heads, tiles, blocks)`, or `(heads, rows, blocks)` if lists are causal, from rows' weights."""
    heads, rows, columns = weights.shape
    tiles = weights.view(heads, rows // rule.tile, rule.tile, columns)
    first = rule.stride - 1 if rule.hears_itself else rule.pool - 1
    sampled = tiles[:, :, first :: rule.stride * rule.pool]
    votes = sampled.sum(2)
    earlier = torch.cat([votes[:, :1] * 0, votes[:, :-1]], 1) * rule.before
    if not rule.causal or rule.tile == 1:
        mass = (votes + earlier) / (sampled.shape[2] * (1 + rule.before))
        if rule.strongest:
            mass = torch.maximum(mass, rule.strongest * sampled.amax(2))
        return mass
    at = torch.arange(rule.tile, device=weights.device)
    if rule.stride > 1 and not rule.hears_itself:
        tiles = tiles.clone()
        tiles[:, :, at % rule.stride > 0] = 0
    heard = tiles.cumsum(2)
    if rule.hears_itself:
        silent = tiles.masked_fill((at % rule.stride == rule.stride - 1)[:, None], 0.0)
        heard = (tiles - silent).cumsum(2) + silent
    if rule.pool > 1:  # whole groups, and the partial group that ends at a row
        whole = tiles.masked_fill((at % rule.pool < rule.pool - 1)[:, None], 0.0)
        heard = whole.cumsum(2) - whole + tiles
    count = at // (rule.stride * rule.pool) + 1
    count = count + rule.before * sampled.shape[2]
    mass = (heard + earlier[:, :, None]) / count[:, None]
    if rule.strongest:
        mass = torch.maximum(mass, rule.strongest * tiles.cummax(2).values)
    return mass.view(heads, rows, columns)


def running_means(q: Tensor, size: int) -> Tensor:
    """For each row, the mean of the queries in its group of `size` rows, up to itself."""
    count = torch.arange(1, size + 1, device=q.device)[:, None]
    return (q.unflatten(1, (-1, size)).cumsum(2) / count).flatten(1, 2)


def shared(q: Tensor, keys: Keys, rule: Rule, first: int, columns: int) -> Tensor:
    """The choice of a chunk of rows, `(heads, rows or tiles, columns)`; `first`: its first row."""
    begins = torch.arange(first, first + q.shape[1], device=q.device) // rule.tile * rule.tile
    blocks = torch.arange(columns, device=q.device)
    outside = (blocks + 1) * rule.block > begins[:, None]
    complete = min(columns, keys.mean.shape[1])
    scores = q.new_full((q.shape[0], q.shape[1], columns), -INF)
    estimate = true_scores if rule.gate == "true" else row_scores
    voters = running_means(q, rule.pool) if rule.pool > 1 else q
    scores[:, :, :complete] = estimate(voters, keys, rule, complete)
    if rule.true_every:
        rows = torch.arange(0, q.shape[1], rule.true_every, device=q.device)
        scores[:, rows, :complete] = true_scores(q[:, rows], keys, rule, complete)
    scores.masked_fill_(outside, -INF)
    if rule.own:
        total = torch.logaddexp(scores.logsumexp(-1), own_scores(q, keys, rule, first))
        weights = (scores - total[..., None]).exp_()
    else:
        weights = scores.softmax(-1).nan_to_num_(0.0)
    mass = tile_mass(weights, rule)
    each = begins if mass.shape[1] == q.shape[1] else begins[:: rule.tile]
    forced = (blocks < rule.sink) | (blocks >= (each // rule.block - rule.local)[:, None])
    forced &= blocks * rule.block < each[:, None] + rule.tile
    if rule.topk:
        kept = largest(mass.masked_fill(forced, INF), rule.topk)
    else:
        kept = torch.zeros_like(mass, dtype=torch.bool)
        if rule.share:
            kept = by_share(mass, rule.share, rule.own)
        if rule.alpha:
            above = mass >= rule.alpha * mass.amax(-1, keepdim=True)
            kept = above & kept if rule.both == "and" else above | kept
        if rule.floor:
            kept = kept | (mass >= rule.floor)
        kept &= mass > 0
        if rule.cap:
            kept &= largest(mass.masked_fill(forced, 0.0), rule.cap)
    return kept | forced


def antidiagonal(q: Tensor, keys: Keys, rule: Rule, first: int, columns: int) -> Tensor:
    """XAttention: queries and keys folded by the stride, one of them reversed; then a share of the mass."""
    step, heads = rule.antidiagonal, keys.k.shape[0]
    fold = torch.arange(step - 1, -1, -1, device=q.device)
    folded = q.unflatten(1, (-1, step))[:, :, fold].flatten(2)
    k = keys.k[:, : columns * rule.block].unflatten(1, (-1, step)).flatten(2)
    logits = grouped(folded, heads) @ k.transpose(1, 2) * (keys.scale / step)
    logits = logits.view(q.shape[0], -1, k.shape[1])
    at = torch.arange(logits.shape[1], device=q.device) + first // step
    logits.masked_fill_(torch.arange(k.shape[1], device=q.device) > at[:, None], -INF)
    weights = logits.softmax(-1).unflatten(2, (columns, -1)).sum(3)
    mass = weights.unflatten(1, (-1, rule.tile // step)).sum(2)
    blocks = torch.arange(columns, device=q.device)
    own = torch.arange(mass.shape[1], device=q.device) + first // rule.tile
    forced = (blocks == 0) | (blocks == own[:, None])
    left = rule.share * mass.sum(-1, keepdim=True) - (mass * forced).sum(-1, keepdim=True)
    ordered, index = mass.masked_fill(forced, 0.0).sort(-1, descending=True)
    kept = (ordered.cumsum(-1) - ordered < left) & (ordered > 0)
    return torch.zeros_like(kept).scatter_(-1, index, kept) | forced


def pooled(q: Tensor, keys: Keys, rule: Rule) -> Tensor:
    """FlexPrefill's query-aware part: tile means against block means, then a share of the whole map."""
    means = q.unflatten(1, (-1, rule.tile)).mean(2)
    logits = grouped(means, keys.k.shape[0]) * keys.scale @ keys.mean.transpose(1, 2)
    logits = logits.view(q.shape[0], means.shape[1], -1)
    blocks = torch.arange(logits.shape[2], device=q.device)
    tiles = torch.arange(logits.shape[1], device=q.device)[:, None]
    weights = logits.masked_fill(blocks > tiles, -INF).softmax(-1)
    kept = by_share(weights.flatten(1), rule.share).view_as(weights)
    return (kept & (blocks <= tiles)) | (blocks == 0) | (blocks == tiles)


def relative(q: Tensor, keys: Keys, rule: Rule, first: int, columns: int) -> Tensor:
    """FlashPrefill V2: the energy of a tile summed over all heads of a group, relative to the largest."""
    heads, tile = keys.k.shape[0], rule.tile
    complete = min(columns, keys.mean.shape[1])
    scores = q.new_full((q.shape[0], q.shape[1], columns), -INF)
    scores[:, :, :complete] = row_scores(q, keys, replace(rule, gate="mean"), complete)
    begins = torch.arange(first, first + q.shape[1], device=q.device) // tile * tile
    blocks = torch.arange(columns, device=q.device)
    scores.masked_fill_((blocks + 1) * rule.block > begins[:, None], -INF)
    energy = scores.view(heads, -1, q.shape[1] // tile, tile, columns).logsumexp(1)
    energy = energy.logcumsumexp(2).flatten(1, 2) if rule.causal else energy.logsumexp(2)
    each = begins if rule.causal else begins[::tile]
    forced = (blocks < rule.sink) | (blocks >= (each // rule.block - rule.local)[:, None])
    kept = (energy >= energy.amax(-1, keepdim=True) + math.log(rule.alpha)) & (energy > -INF)
    return (kept | forced).repeat_interleave(q.shape[0] // heads, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(heads, N, v_dim)` under a rule, and the causal pairs attended, `(heads,)` in fp64."""
    heads, length, _ = q.shape
    keys = Keys(k, v, rule, scale)
    out = q.new_empty(heads, length, v.shape[2])
    pairs = torch.zeros(heads, dtype=torch.float64, device=q.device)
    whole = pooled(q, keys, rule) if rule.kind == "pooled" else None
    last = (length - rule.dense_last) // rule.tile * rule.tile if rule.dense_last else length
    for first in range(0, length, ROWS):
        end = min(first + ROWS, length)
        columns = -(-end // rule.block)
        rows = torch.arange(first, end, device=q.device)
        chunk = q[:, first:end]
        if rule.kind == "dense":
            keep = chunk.new_ones(heads, end - first, columns, dtype=torch.bool)
        elif whole is not None:
            keep = whole[:, first // rule.tile : end // rule.tile, :columns]
        else:
            choose = {"shared": shared, "antidiagonal": antidiagonal, "relative": relative}[rule.kind]
            lead = rule.tile if rule.before and first else 0  # the previous tile counts too
            keep = choose(q[:, first - lead : end], keys, rule, first - lead, columns)
            rows_of_tile = 1 if rule.causal else rule.tile
            keep = keep[:, lead // rows_of_tile :]
        if keep.shape[1] != end - first:
            keep = keep.repeat_interleave(rule.tile, 1)
        keep = keep | ((rows < rule.dense_below) | (rows >= last))[:, None]
        seen = (rows[:, None] + 1 - torch.arange(columns, device=q.device) * rule.block).clamp(0, rule.block)
        pairs += (keep * seen).sum((1, 2), dtype=torch.float64)
        out[:, first:end] = masked(chunk, keys, rule, keep, rows)
    return out, pairs


def masked(q: Tensor, keys: Keys, rule: Rule, keep: Tensor, rows: Tensor) -> Tensor:
    """Attention of a chunk over the blocks marked in `keep (heads, rows, blocks)`."""
    heads, columns = keys.k.shape[0], keep.shape[2]
    end = min(columns * rule.block, keys.k.shape[1])
    queries = grouped(q, heads) * keys.scale
    logits = queries.new_full((q.shape[0], q.shape[1], columns * rule.block), -INF)
    logits[:, :, :end] = (queries @ keys.k[:, :end].transpose(1, 2)).view(q.shape[0], q.shape[1], end)
    logits.unflatten(2, (columns, rule.block)).masked_fill_(~keep[..., None], -INF)
    first = int(rows[0]) // rule.block * rule.block
    later = torch.arange(first, columns * rule.block, device=q.device) > rows[:, None]
    logits[:, :, first:].masked_fill_(later, -INF)
    if rule.means:
        complete = min(columns, keys.mean.shape[1])
        extra = (queries @ keys.mean[:, :complete].transpose(1, 2)).view(q.shape[0], q.shape[1], complete)
        ends = (torch.arange(complete, device=q.device) + 1) * rule.block
        extra = (extra + math.log(rule.block)).masked_fill(keep[:, :, :complete], -INF)
        extra = extra.masked_fill(ends > rows[:, None], -INF)
        logits = torch.cat([logits, extra], 2)
    weights = logits.softmax(-1)
    out = grouped(weights[:, :, :end], heads) @ keys.v[:, :end]
    if rule.means:
        out += grouped(weights[:, :, columns * rule.block :], heads) @ keys.value[:, :complete]
    return out.view(q.shape[0], q.shape[1], -1)


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention over the last `window` keys, as in sliding-window layers."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for first in range(0, q.shape[1], ROWS):
        end, begin = min(first + ROWS, q.shape[1]), max(0, first - window + 1)
        logits = grouped(q[:, first:end], k.shape[0]) * scale @ k[:, begin:end].transpose(1, 2)
        logits = logits.view(q.shape[0], end - first, -1)
        rows = torch.arange(first, end, device=q.device)[:, None]
        at = torch.arange(begin, end, device=q.device)
        weights = logits.masked_fill_((at > rows) | (at <= rows - window), -INF).softmax(-1)
        out[:, first:end] = (grouped(weights, k.shape[0]) @ v[:, begin:end]).view(q.shape[0], end - first, -1)
    return out
