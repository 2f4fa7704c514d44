"""Training with the Triton backend under the interpreter: compile, checkpointing, autocast, whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moba_hf import MobaConfig, patch_model
from moba_hf.op import ops
from moba_hf.training.loss import dense_tail

RULE: dict[str, Any] = {"block_size": 16, "topk": 3, "backend": "triton"}


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((90, 4, 16), (90, 2, 16), (90, 2, 16))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = ops.moba_attention(q * 1.5, k + 0.5, v.sin(), **RULE)
    assert isinstance(out, torch.Tensor)
    return out.tanh()


def gradients(run: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    inputs = tensors()
    return torch.autograd.grad(run(*inputs, **kwargs).square().sum(), inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, *inputs, use_reentrant=reentrant)

    inputs = tensors()
    loss = run(*inputs).square().sum()
    loss.backward()
    for x, expected in zip(inputs, gradients(layer), strict=True):
        assert torch.equal(x.grad, expected)


def test_compiled_training_is_one_graph() -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def model(backend: str) -> Any:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, attn_implementation="moba").train()
    return patch_model(net, MobaConfig(block_size=16, topk=2, backend=backend))


def parameter_gradients(backend: str, dtype: torch.dtype | None, recompute: bool) -> list[torch.Tensor]:
    """Gradients of every parameter for a padded batch of two."""
    net = model(backend)
    if recompute:
        net.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 35:] = 0
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = net(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
    loss.backward()
    return [x.grad for x in net.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_trains_as_with_the_portable_backend(recompute: bool) -> None:
    ours, theirs = (parameter_gradients(x, None, recompute) for x in ("triton", "portable"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_autocast() -> None:
    """bf16 inside, fp32 parameters and gradients; rounding may change choices, so the check is coarse."""
    ours, theirs = (
        torch.cat([x.flatten() for x in parameter_gradients("triton", dtype, True)])
        for dtype in (torch.bfloat16, None)
    )
    assert ours.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(ours, theirs, 0) > 0.98


@pytest.mark.parametrize("shared", [False, True], ids=["moba", "shared"])
def test_a_dense_tail(shared: bool) -> None:
    """The rule then reads views that skip the last rows of the tensors."""
    rule = {"tile": 16, "threshold": 0.9, "gate": "mass"} if shared else {"topk": 2}
    found = []
    for backend in ("triton", "portable"):
        net = patch_model(model(backend), MobaConfig(16, backend=backend, **rule))
        ids = torch.randint(0, 97, (1, 112), generator=torch.Generator().manual_seed(1))
        with dense_tail(net, 32):
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
