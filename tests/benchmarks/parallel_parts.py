"""Parts of bench_parallel other than prefill: equality, one layer at 10M tokens, Ulysses training."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from parallel_model import CUDA, Ranks, alone, llama, random_ids, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

import moba_hf
from moba_hf import MobaConfig, moba_attention, select_blocks
from moba_hf.bench import peers
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.mask import moba_mask

# What the attention functions below record or receive, by layer.
_kept: list[tuple[Tensor, Tensor]] = []
_given: list[Tensor] = []


def _keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """MoBA that records the queries and keys of every layer."""
    _kept.append((query, key))
    return moba_attention_forward(module, query, key, value, *args, **kwargs)


def _told(module: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Any:
    """MoBA with a given choice."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    rule = MobaConfig.from_dict(module.config.moba)
    out = moba_attention(
        q, k, v, block_size=rule.block_size, topk=rule.topk, block_indices=_given[module.layer_idx]
    )
    return out[None], None


@torch.no_grad()
def _logits(model: Any, ids: Tensor, name: str) -> Tensor:
    _kept.clear()
    model.set_attn_implementation(name)
    return model(ids, use_cache=False).logits.float()


def _choices(rule: MobaConfig) -> list[Tensor]:
    """The choice `(tokens, heads, topk)` of each layer in the last forward."""
    sizes = {"block_size": rule.block_size, "topk": rule.topk}
    found = [select_blocks(q[0].transpose(0, 1), k[0].transpose(0, 1), **sizes) for q, k in _kept]
    _kept.clear()
    return found


def _in_common(ours: Tensor, others: Tensor) -> float:
    """Share of the chosen earlier blocks that both chose (slot 0 is the own block)."""
    ours, others = ours[..., 1:], others[..., 1:]
    found = (ours[..., :, None] == others[..., None, :]).any(-1) & (ours >= 0)
    return float(found.sum() / (ours >= 0).sum())


def equality(ranks: Ranks, tiny: bool) -> None:
    """Part a: compares logits and choices of all ranks with those of rank 0 alone, 4 layers of 8B width.

    Also compares dense attention, and MoBA with the choices of rank 0, where only rounding differs.
    """
    for name, function in (("bench_keep", _keeping), ("bench_told", _told)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, moba_mask)
    rule = MobaConfig(16, 3) if tiny else MobaConfig(128, 8)
    length, layers = (512, 2) if tiny else (4096, 4)  # torch's fp32 attention keeps all scores
    for dtype in (torch.float32, torch.bfloat16):
        config = llama("8B", tiny, num_hidden_layers=layers, vocab_size=256 if tiny else 8192)
        config.moba = rule.to_dict()
        ids = random_ids(config, length, ranks.device)
        shape = (length, config.num_attention_heads, rule.topk)
        whole = [torch.empty(shape, dtype=torch.int32, device=ranks.device) for _ in range(layers)]
        expected = {}
        if ranks.rank == 0:
            model = alone(config, ranks, dtype)
            expected = {name: _logits(model, ids, name) for name in ("sdpa", "bench_keep")}
            whole = _choices(rule)
            del model
        for choice in whole:
            dist.broadcast(choice, 0)
        model = spread(config, ranks, dtype)
        found = {name: _logits(model, ids, name) for name in ("sdpa", "bench_keep")}
        joined = [_gathered(x, ranks) for x in _choices(rule)]
        heads = shape[1] // ranks.count
        _given[:] = [x[:, ranks.rank * heads : (ranks.rank + 1) * heads].contiguous() for x in whole]
        found["bench_told"] = _logits(model, ids, "bench_told")
        del model
        if ranks.rank == 0:
            expected["bench_told"] = expected["bench_keep"]
            difference = {
                name: f"{float((x - expected[name]).abs().max() / expected[name].abs().max()):.1e}"
                for name, x in found.items()
            }
            same = [_in_common(a, b) for a, b in zip(joined, whole, strict=True)]
            ranks.row(
                "a",
                f"tensor parallel against one GPU, {str(dtype).split('.')[1]}",
                length,
                largest_difference_of_logits=difference["bench_keep"],
                with_given_blocks=difference["bench_told"],
                dense=difference["sdpa"],
                blocks_in_common_by_layer=", ".join(f"{x:.5f}" for x in same),
            )
        dist.barrier()


def _gathered(choice: Tensor, ranks: Ranks) -> Tensor:
    """The choices of the heads of all ranks."""
    parts = [torch.empty_like(choice) for _ in range(ranks.count)]
    dist.all_gather(parts, choice.contiguous())
    return torch.cat(parts, dim=1)


@torch.no_grad()
def one_layer(ranks: Ranks, tiny: bool) -> None:
    """Part c-layer: attention of one layer with 32/8 heads, sharded over the ranks, 64 blocks and top-3."""
    length = 4096 if tiny else 10 << 20
    block, parts = length // 64, 64 if tiny else 512
    heads, kv_heads = 32 // ranks.count, max(1, 8 // ranks.count)
    per_head = length * 128 * 2
    # all heads at once if they fit together with the workspaces, else one group of heads, scaled
    groups = 1 if ranks.free() > 4 * heads * per_head else kv_heads
    shape = (length, heads // groups, kv_heads // groups)
    dtype = torch.bfloat16 if CUDA else torch.float32
    torch.manual_seed(ranks.rank)
    q, k, v = (
        torch.randn(length, count, 128, device=ranks.device, dtype=dtype)
        for count in (shape[1], shape[2], shape[2])
    )
    moba_attention(q[: 5 * block], k[: 5 * block], v[: 5 * block], block_size=block, topk=3)  # compiles

    once, peak = ranks.timed(lambda: moba_attention(q, k, v, block_size=block, topk=3))
    seconds = groups * once
    cells = {"seconds": f"{seconds:.2f}", "peak_GiB_per_GPU": f"{peak:.1f}"}
    measured = "" if groups == 1 else f", one of {groups} groups of heads, times {groups}"
    ranks.row("c-layer", f"one layer, MoBA {block}/3{measured}", length, **cells)
    if not CUDA:
        return
    dense = {"cudnn": peers.implementations(False)["cudnn"]}
    ms = peers.sliced_times(q, k, v, dense, 1, parts)["cudnn"]
    if ms is not None:
        whole = ranks.agreed(ms / 1e3 * groups)
        cells = {"seconds": f"{whole:.1f}", "times_MoBA": f"{whole / seconds:.2f}"}
        ranks.row("c-layer", f"dense cuDNN, last 1/{parts} of the queries scaled by pairs", length, **cells)


def _loss(model: Any, hidden: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sum of the loss over this rank's tokens, divided by `count`; computed in pieces."""

    def piece(part: Tensor, wanted: Tensor) -> Tensor:
        logits = model.lm_head(part).float()
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)

    total = hidden.new_zeros((), dtype=torch.float32)
    for at in range(0, hidden.shape[1], 4096):
        rows = slice(at, at + 4096)
        total = total + checkpoint(piece, hidden[0, rows], labels[0, rows], use_reentrant=False)
    return total / count


def training(ranks: Ranks, tiny: bool, lengths: list[int]) -> None:
    """Part d: a step of Ulysses training of the 1B shape: forward, backward, gradient reduction, AdamW."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(dist.get_backend())
    config = llama("1B", tiny, tie_word_embeddings=True)
    model = alone(config, ranks)
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="moba", sequence_parallel_size=ranks.count, micro_batch_size=1
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
    fine = MobaConfig(16, 3) if tiny else MobaConfig(128, 8)
    before = {"MoBA fine": 0.0, "dense cuDNN": 0.0}

    def step(length: int) -> None:
        local = length // ranks.count
        mine = slice(ranks.rank * local, (ranks.rank + 1) * local)
        ids = random_ids(config, length, ranks.device)
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)[:, mine]
        positions = torch.arange(length, device=ranks.device)[None, mine]
        hidden = model.model(
            input_ids=ids[:, mine], position_ids=positions, use_cache=False
        ).last_hidden_state
        _loss(model, hidden, labels, length - 1).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    for length in lengths:
        for name in before:
            # a single block that covers everything is full attention, computed by torch's own function
            rule = fine if name == "MoBA fine" else MobaConfig(length, 1)
            needed = before[name] * (4.4 if rule is fine else 4.0) + 2
            if not ranks.room(needed, f"d, {name}, {length:,}"):
                continue
            moba_hf.patch_model(model, rule)
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if CUDA else nullcontext():
                if before[name] == 0.0 or rule is fine:  # large tensors have kernels of their own
                    step(length)  # compiles
                seconds, peak = ranks.timed(partial(step, length))
            before[name] = seconds
            cells = {"tokens/s": f"{length / seconds:,.0f}", "peak_GiB_per_GPU": f"{peak:.1f}"}
            ranks.row("d", f"Ulysses step, 1B, {name}", length, seconds=f"{seconds:.2f}", **cells)
