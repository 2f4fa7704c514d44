"""A model of Llama-3.1-8B's shape with random weights, and the time to its first token."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_hf import MobaConfig
from moba_hf.bench.timing import GIB
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.layer_plan import layer_plan
from moba_hf.hf.mask import moba_mask

CUDA = torch.cuda.is_available()
# Peak bytes per token of a forward without a cache, mostly for the projections of the MLP.
ACTIVATIONS = 170 << 10
_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []


def no_attention(module: Any, query: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    """The queries as the output."""
    return query.transpose(1, 2), None


def timed(function: Any) -> Any:
    """`function`, timed by two CUDA events."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not CUDA:
            return function(*args, **kwargs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function(*args, **kwargs)
        end.record()
        _events.append((begin, end))
        return result

    return wrapped


def register() -> None:
    """Registers the three attention functions under separate names, each with its own kind of mask."""
    no_mask = lambda *_args, **_kwargs: None  # noqa: E731
    for name, function, mask in (
        ("timed_moba", moba_attention_forward, moba_mask),
        ("timed_sdpa", sdpa_attention_forward, no_mask),
        ("timed_none", no_attention, no_mask),
    ):
        AttentionInterface.register(name, timed(function))
        AttentionMaskInterface.register(name, mask)


def build(tiny: bool) -> Any:
    """A model with random weights on the GPU."""
    config = LlamaConfig(
        vocab_size=1000 if tiny else 128_256,
        hidden_size=256 if tiny else 4096,
        intermediate_size=512 if tiny else 14_336,
        num_hidden_layers=2 if tiny else 32,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        head_dim=64 if tiny else 128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
    )
    config.moba = MobaConfig(128, 8).to_dict()
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def cache_fits(model: Any, length: int) -> bool:
    """Whether weights, cache and activations of a prompt fit into nine tenths of the GPU's memory."""
    config = model.config
    if not CUDA:
        return True
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    return bool(weights + cache + ACTIVATIONS * length < 0.9 * total)


def reserve() -> None:
    """Makes torch allocate the GPU's memory once, so that no run pays for growing the pool."""
    if CUDA:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(max(0, free - 6 * GIB), dtype=torch.uint8, device="cuda")


class FirstToken(NamedTuple):
    """Seconds until the first new token is on the host.

    Attributes:
        seconds: in all.
        attention: inside the attention functions, by CUDA events.
        host: until the host has launched everything; the rest is waiting for the GPU.
    """

    seconds: float
    attention: float
    host: float


def cudnn(active: bool) -> AbstractContextManager[Any]:
    """Restricts torch's attention to cuDNN if `active`."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if active and CUDA else nullcontext()


@torch.no_grad()
def first_token(
    model: Any, ids: Tensor, name: str, use_cache: bool, *, dense_by_cudnn: bool | None = None
) -> FirstToken:
    """Times one forward.

    Args:
        name: "moba", "sdpa" or "none".
        dense_by_cudnn: restrict torch's attention to cuDNN; None: for "sdpa" only.
    """
    model.set_attn_implementation(f"timed_{name}")
    for layer in model.model.layers:
        layer_plan(layer.self_attn)  # resolves new settings before the time starts
    _events.clear()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with cudnn(name == "sdpa" if dense_by_cudnn is None else dense_by_cudnn):
        logits = model(ids, use_cache=use_cache, logits_to_keep=1).logits
    host = time.perf_counter() - start
    int(logits[0, -1].argmax())
    seconds = time.perf_counter() - start
    return FirstToken(seconds, sum(begin.elapsed_time(end) for begin, end in _events) / 1e3, host)


@torch.no_grad()
def attention_alone(model: Any, length: int, name: str) -> None:
    """Runs the attention of one layer at `length`, which selects and compiles its kernels."""
    config, layer = model.config, model.model.layers[0].self_attn
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    views = [
        torch.randn(1, length, h, config.head_dim, dtype=torch.bfloat16, device=model.device).transpose(1, 2)
        for h in heads
    ]
    function = {"moba": moba_attention_forward, "sdpa": sdpa_attention_forward}[name]
    with cudnn(name == "sdpa"):
        function(layer, *views, None, scaling=layer.scaling)
