"""The loss that sparse decode steps cost a model, and the bytes they read compared with dense steps."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf import MobaCache, MobaConfig, patch_model, prefill
from moba_hf.checkpoints.load import load_checkpoint
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.op import shared_decode
from moba_hf.op.shared_rule import SharedRule

# Steps per call: after the end of a prompt every row is its own step, no matter how many rows a call has.
ROWS = 16


class Reads:
    """How many numbers (of keys, values and summaries) steps read.

    Attributes:
        dense: every key and value once per kv head.
        by_head: the blocks of each query head, read separately, as in the portable path.
        by_group: the blocks of all heads of a group, each read once, as a kernel can.
        summaries: summaries of the candidates, once per kv head.
    """

    def __init__(self) -> None:
        self.dense = self.by_head = self.by_group = self.summaries = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        choose = shared_decode.choose

        def counting(q: Tensor, kept: Tensor, position: Tensor, rule: SharedRule, *rest: Any) -> Tensor:
            chosen = choose(q, kept, position, rule, *rest)
            self._add(chosen, q, kept, position, rule)
            return chosen

        with mock.patch.object(shared_decode, "choose", counting):
            yield

    def _add(self, chosen: Tensor, q: Tensor, kept: Tensor, position: Tensor, rule: SharedRule) -> None:
        heads, dim = kept.shape[1], 2 * q.shape[3]  # a key and a value
        begin = torch.arange(chosen.shape[3]) * rule.block_size
        size = (position[..., None] + 1 - begin).clamp(0, rule.block_size)[:, None]  # (batch, 1, M, C + 1)
        group = chosen.unflatten(1, (heads, -1)).any(2)
        candidates = position // rule.tile * rule.tile // rule.block_size
        self.dense += dim * heads * int((position + 1).sum())
        self.by_head += dim * int((chosen * size).sum())
        self.by_group += dim * int((group * size).sum())
        self.summaries += heads * kept.shape[3] * int(candidates.sum())

    def line(self) -> str:
        parts = (("by head", self.by_head), ("by group", self.by_group))
        shares = ", ".join(f"{name} {(x + self.summaries) / self.dense:.1%}" for name, x in parts)
        return f"bytes read, of dense: {shares} (of which summaries {self.summaries / self.dense:.1%})"


@torch.no_grad()
def step_losses(model: torch.nn.Module, cache: MobaCache, ids: Tensor, begin: int) -> Tensor:
    """Losses of `ids[0, begin:]`, each predicted by a step on a copy of `cache`.

    `cache` contains the tokens before `begin - 1`. It is copied, because cropping the steps away again would
    lose the queries of its open tile, which they hear.
    """
    losses, cache = [], copy.deepcopy(cache)
    for at in range(begin - 1, ids.shape[1] - 1, ROWS):
        rows = ids[:, at : min(at + ROWS, ids.shape[1] - 1)]
        logits = model(rows, **cache_kwargs(model, cache), use_cache=True).logits[0].float()
        targets = ids[0, at + 1 : at + 1 + rows.shape[1]]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses)


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """Token ids `(1, N)` of a text file, or of "FILE.npz:NAME", a text in a file of `shared_texts.py`."""
    path, _, name = text.partition(".npz:")
    if name:
        return torch.from_numpy(np.load(path + ".npz")[name].astype(np.int64))[None]
    return torch.as_tensor(tokenizer(Path(text).read_text(encoding="utf-8")).input_ids)[None]


def bench(args: argparse.Namespace) -> None:
    """Dense and sparse steps after one sparse prefill, on each text."""
    model, tokenizer = load_checkpoint(args.model, "float32", device="cpu")
    moba = MobaConfig.from_preset(args.preset)
    if not isinstance(moba.for_layer(0, int(model.config.num_hidden_layers)), SharedRule):
        raise SystemExit(f"preset {args.preset!r} has no shared choice (tile > 1)")
    print(f"{args.model}, preset {args.preset}, {moba.in_words()}; {args.steps} steps up to {args.tokens}")
    for text in args.text:
        ids = token_ids(text, tokenizer)[:, : args.tokens]
        if ids.shape[1] < args.tokens:
            raise SystemExit(f"{text} has {ids.shape[1]} tokens, but {args.tokens} are needed")
        begin = args.tokens - args.steps
        patch_model(model, dataclasses.replace(moba, decode="sparse"))
        cache = MobaCache(model.config, max_cache_len=args.tokens)
        prefill(model, ids[:, :begin], cache=cache, progress=False)
        patch_model(model, dataclasses.replace(moba, decode="full"))
        dense = step_losses(model, cache, ids, begin)
        print(f"{text}: dense {dense.mean():.4f}", flush=True)
        for threshold in args.threshold or [moba.threshold]:
            patch_model(model, dataclasses.replace(moba, decode="sparse", threshold=threshold))
            reads = Reads()
            with reads.counted():
                rise = step_losses(model, cache, ids, begin) - dense
            error = 1.96 * rise.unflatten(0, (-1, 64)).mean(1).std() / (len(rise) / 64) ** 0.5
            print(
                f"  threshold {threshold}: sparse {rise.mean():+.4f} +- {error:.4f}; {reads.line()}",
                flush=True,
            )
