"""The backend named by a model is the one that runs everywhere, for caches too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_checks import tiny_model, tokens
from torch import Tensor

from moba_hf import MobaCache, MobaConfig, patch_model
from moba_hf.hf import rows as rows_module
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.op import backends
from moba_hf.op.backend_table import BACKENDS
from moba_hf.op.backends import PortableBackend
from moba_hf.op.dense import dense_attention
from moba_hf.op.gates import Kept, KeptMeans, block_mean
from moba_hf.op.registry import Registry
from moba_hf.op.sequences import Sequences, batched_table

ENTERED: list[str] = []
EVERYTHING = {
    "select",
    "forward",
    "backward",
    "decode",
    "append",
    "update_means",
    "dense_decode",
    "row_bounds",
}


class SpyKernels:
    """Cache kernels in torch that record that they ran."""

    max_append_rows, max_dense_queries = 1 << 20, 16

    def append(
        self, keys: Tensor, values: Tensor, length: Tensor, key_states: Tensor, value_states: Tensor
    ) -> None:
        ENTERED.append("append")
        begin, count = int(length), key_states.shape[2]
        keys[:, :, begin : begin + count], values[:, :, begin : begin + count] = key_states, value_states
        length += count

    def update_means(
        self,
        means: Tensor,
        keys: Tensor,
        kv_start: Tensor | None,
        length: int | Tensor,
        behind: int,
        block_size: int,
    ) -> None:
        ENTERED.append("update_means")
        for row in range(len(keys)):
            begin = 0 if kv_start is None else int(kv_start[row])
            taken = block_mean(keys[row, :, begin : int(length)], block_size)
            means[row, :, : taken.shape[1]] = taken

    def summarizes(self, kept: Kept, head_dim: int, block_size: int) -> bool:
        return isinstance(kept, KeptMeans)

    def takes(self, device: torch.device) -> bool:
        return True

    def row_bounds(self, given: Tensor, q_offset: int, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
        ENTERED.append("row_bounds")
        start, count = given.int().argmax(1), given.sum(1)
        table = batched_table(len(given), q_len, q_offset + q_len, given.device, start, start + count)
        return table, start, torch.ones_like(start, dtype=torch.bool)

    def dense_decode(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        ENTERED.append("dense_decode")
        sequences = Sequences(table, q.shape[2], k.shape[2], kv_start=table[:, 3])
        out = dense_attention(q, k, v, softmax_scale, sequences, "portable")
        return out, q.new_zeros(q.shape[:3])


class SpyBackend(PortableBackend):
    """The portable backend, recording which of its methods ran."""

    cache = SpyKernels()

    def select(self, *args: Any) -> Tensor:
        ENTERED.append("select")
        return super().select(*args)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        ENTERED.append("forward")
        return super().forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        ENTERED.append("backward")
        return super().backward(*args)

    def decode(self, *args: Any) -> tuple[Tensor, Tensor]:
        ENTERED.append("decode")
        return super().decode(*args)


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that "auto" prefers on the CPU, as it prefers Triton on a GPU, where no step reads a mask."""
    monkeypatch.setattr(rows_module, "check_values", lambda x: False)
    monkeypatch.setattr(backends, "_loaded", Registry())
    monkeypatch.setitem(BACKENDS, "spy", f"{__name__}:SpyBackend")
    monkeypatch.setitem(backends._AUTO, "cpu", ("spy",))
    ENTERED.clear()


def everything(backend: str) -> list[Tensor]:
    """Training, packing, chunks, sparse and full decode steps, padded and not, with both kinds of cache."""
    results = []
    for decode in ("sparse", "full"):
        config = MobaConfig(4, 2, full_attention_layers=(0,), decode=decode, backend=backend)
        model = patch_model(tiny_model(), config)
        ids = tokens(2, 40)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results += [loss.detach(), model.model.layers[1].self_attn.k_proj.weight.grad]
        with torch.no_grad():
            documents = torch.cat([torch.arange(17), torch.arange(23)])[None]
            results.append(model(ids[:1], position_ids=documents, use_cache=False).logits)
            for static, first in ((False, 0), (True, 0), (False, 5), (True, 5)):
                cache = MobaCache(model.config, max_cache_len=40, static=static)
                mask = torch.ones_like(ids)
                mask[0, :first] = 0
                for begin, end in ((0, 20), (20, 37), (37, 38), (38, 39), (39, 40)):
                    out = model(
                        ids[:, begin:end],
                        attention_mask=mask[:, :end],
                        **cache_kwargs(model, cache),
                        use_cache=True,
                    )
                results.append(out.logits)
    return results


def test_a_named_backend_runs_alone() -> None:
    portable = everything("portable")
    assert ENTERED == []
    automatic = everything("auto")
    assert set(ENTERED) == EVERYTHING
    for ours, theirs in zip(portable, automatic, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_config_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; known are auto, reference, portable"):
        MobaConfig(4, 2, backend="cuda")
    with pytest.raises(TypeError, match="backend must be a string, got 3"):
        MobaConfig(4, 2, backend=3)  # type: ignore[arg-type]
