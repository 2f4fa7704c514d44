"""The work of one rank: it loads a tiny checkpoint in parallel and alone, and compares. Run by `ranks.py`.

Each step is `job=folder`: a job of this file and an fp32 checkpoint. Results agree up to rounding, since sums
over ranks have another order.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_checks import tokens
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_kwargs

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("MOBA_TEST_DEVICE") == "cuda" else "cpu"
LENGTH = 61


def alone(folder: str, **kwargs: Any) -> Any:
    """The model loaded by one process alone."""
    return (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba", **kwargs).to(DEVICE).eval()
    )


def in_parallel(folder: str, **sizes: Any) -> Any:
    """The model sharded over the ranks by transformers."""
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="moba", distributed_config=config
    ).eval()


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises AssertionError unless two tensors are equal to fp32 rounding."""
    if hasattr(actual, "full_tensor"):
        actual = actual.full_tensor()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def gradients(model: Any, ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Parameter name -> gradient of the loss on `ids`."""
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


@torch.no_grad()
def tensor_parallel(folder: str) -> None:
    """Logits, chunked prefill into one cache per rank, dense and sparse decode, generated tokens."""
    ids = tokens(2, LENGTH).to(DEVICE)
    model, expected = in_parallel(folder, tp_size=dist.get_world_size()), alone(folder)
    close(model(ids).logits, expected(ids).logits, "logits")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    close(model(ids, attention_mask=mask).logits[0], expected(ids, attention_mask=mask).logits[0], "padded")
    for decode in ("full", "sparse"):
        moba = MobaConfig.from_dict({**expected.config.moba, "decode": decode})
        for each in (model, expected):
            moba_hf.patch_model(each, moba)
        caches = [
            moba_hf.prefill(each, ids, chunk_size=16, dense_tail=0, progress=False)
            for each in (model, expected)
        ]
        rank, heads = dist.get_rank(), caches[0].layers[0].keys.shape[1]
        assert heads * dist.get_world_size() == caches[1].layers[0].keys.shape[1]
        for ours, whole in zip(caches[0].layers, caches[1].layers, strict=True):
            close(ours.keys, whole.keys[:, rank * heads : (rank + 1) * heads], f"{decode}: cached keys")
        made = [
            each.generate(
                ids,
                **cache_kwargs(each.generate, cache),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
            )
            for each, cache in zip((model, expected), caches, strict=True)
        ]
        assert torch.equal(*made), f"{decode}: tokens {made}"
        fresh = [
            each.generate(
                ids,
                **cache_kwargs(each.generate, MobaCache(each.config)),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
            )
            for each in (model, expected)
        ]
        assert torch.equal(*fresh), f"{decode}: tokens without prefill {fresh}"


def tensor_parallel_gradients(folder: str) -> None:
    ids = tokens(1, LENGTH).to(DEVICE)
    found = gradients(in_parallel(folder, tp_size=dist.get_world_size()), ids)
    for name, gradient in gradients(alone(folder), ids).items():
        close(found[name], gradient, name)


def fsdp(folder: str) -> None:
    """The batch and the parameters are sharded over the ranks; gradients are means over the ranks."""
    ids = tokens(dist.get_world_size(), LENGTH).to(DEVICE)
    mine = ids[dist.get_rank()][None]
    model, expected = in_parallel(folder, fsdp_size=dist.get_world_size()), alone(folder)
    with torch.no_grad():
        close(model(mine).logits, expected(mine).logits, "logits")
    found = gradients(model, mine)
    for name, gradient in gradients(expected, ids).items():
        close(found[name], gradient, name)


def without_shared_memory() -> None:
    """Lets DeepSpeed communicate over gloo alone, so that it does not compile C++ for a minute on a CPU."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def ulysses(folder: str) -> None:
    """Each rank holds a part of every sequence; attention sees whole sequences for a part of the heads."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    without_shared_memory()
    deepspeed.init_distributed(dist.get_backend())
    ranks, rank = dist.get_world_size(), dist.get_rank()
    length = LENGTH // (2 * ranks) * 2 * ranks
    ids = tokens(1, length).to(DEVICE)
    documents = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None].to(DEVICE)
    expected = alone(folder)
    part = slice(rank * length // ranks, (rank + 1) * length // ranks)
    plain = torch.arange(length, device=DEVICE)[None]
    before = {
        name: (
            expected(ids, position_ids=p, use_cache=False).logits.detach(),
            gradients(expected, ids, position_ids=p),
        )
        for name, p in (("one document", plain), ("packed", documents))
    }
    model = alone(folder)
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="moba", sequence_parallel_size=ranks, micro_batch_size=1
    )
    for name, positions in (("one document", plain), ("packed", documents)):
        logits, grads = before[name]
        got = model(ids[:, part], position_ids=positions[:, part], use_cache=False).logits
        close(got.detach(), logits[:, part], name)
        # the loss of a row is the sum of the ranks' parts
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)[:, part]
        model.zero_grad()
        model.train()
        out = model(ids[:, part], position_ids=positions[:, part], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") / (
            length - 1
        )
        loss.backward()
        model.eval()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                close(parameter.grad, grads[key], f"{name}: {key}")
    mask = torch.ones_like(ids)
    mask[:, -9:] = 0
    got = model(ids[:, part], attention_mask=mask[:, part], position_ids=plain[:, part], use_cache=False)
    real = mask[0, part].bool()
    close(got.logits[:, real].detach(), before["one document"][0][:, part][:, real], "padding on the right")
    mask = mask.flip(1)
    mask[:, : length // ranks + 3] = 0  # rank 0 has only padding, rank 1 begins with some
    if rank < 2:
        with pytest.raises(ValueError, match="padding on the left of rows"):
            model(ids[:, part], attention_mask=mask[:, part], position_ids=plain[:, part], use_cache=False)


def through_accelerate(folder: str) -> None:
    """Ulysses as used through accelerate: its data loader splits the rows, DeepSpeed holds the weights."""
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig

    without_shared_memory()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    with pytest.raises(ValueError, match="sp_attn_implementation"):
        DeepSpeedSequenceParallelConfig(
            sp_attn_implementation="moba"
        )  # once this is accepted, the docs can be simpler
    handler = DeepSpeedSequenceParallelConfig()
    handler.sp_attn_implementation = "moba"
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 1e9,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
            }
        ),
        parallelism_config=ParallelismConfig(sp_size=ranks, sp_handler=handler),
    )
    length = LENGTH // (2 * ranks) * 2 * ranks
    ids = tokens(1, length).to(DEVICE)
    expected = alone(folder)
    grads = gradients(expected, ids)
    with torch.no_grad():
        logits = expected(ids).logits
        for name, parameter in expected.named_parameters():
            parameter -= 0.1 * grads[name]
    rows = [{"input_ids": ids[0].cpu(), "labels": ids[0].cpu(), "position_ids": torch.arange(length)}]
    model = alone(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(rows * ranks, batch_size=1)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    batch = next(iter(loader))
    labels = batch.pop("shift_labels").flatten()
    out = model(**batch, use_cache=False).logits
    part = slice(rank * length // ranks, (rank + 1) * length // ranks)
    close(out.detach(), logits[:, part], "logits")
    # gradients are summed over the ranks that share a row
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels, reduction="sum")
    accelerator.backward(loss / (length - 1))
    optimizer.step()
    for (name, ours), whole in zip(model.module.named_parameters(), expected.parameters(), strict=True):
        close(ours.detach(), whole.detach(), f"after a step: {name}")


def fails(folder: str) -> None:
    """Rank 1 fails while the others wait for it."""
    if dist.get_rank() == 1:
        raise ValueError("the error of rank 1")
    dist.barrier()


def uneven_heads(folder: str) -> None:
    """A number of key-value heads not divisible by the ranks is refused before the weights are read."""
    ranks = dist.get_world_size()
    for sizes in ({"tp_size": ranks}, {"tp_plan": "auto"}):
        with pytest.raises(ValueError, match=f"3 key-value heads cannot be divided among {ranks} ranks"):
            in_parallel(folder, **sizes)


JOBS = (tensor_parallel, tensor_parallel_gradients, fsdp, ulysses, through_accelerate, fails, uneven_heads)


def main(*steps: str) -> None:
    if DEVICE == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    for step in steps:
        name, folder = step.split("=", 1)
        {job.__name__: job for job in JOBS}[name](folder)
        dist.barrier()
        print(f"done: {name} on rank {dist.get_rank()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
