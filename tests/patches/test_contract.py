"""check_adapter accepts a third-party adapter, installed or not, and catches faulty ones."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config
from transformers import AutoConfig

from moba_hf.hf import adapter as adapter_module
from moba_hf.hf.adapter import ENTRY_POINTS, Adapter, find_adapter
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.testing import check_adapter

FOREIGN = Path(__file__).parent / "foreign"
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_foreign(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **TINY)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The foreign adapter, as if its wheel were installed."""
    monkeypatch.syspath_prepend(str(FOREIGN))
    entries = metadata.EntryPoints(
        metadata.EntryPoint(name, "moba_olmo2:Olmo2Adapter", ENTRY_POINTS) for name in ("olmo2", "olmo3")
    )
    monkeypatch.setattr(adapter_module.metadata, "entry_points", lambda **query: entries.select(**query))
    find_adapter.cache_clear()
    yield
    find_adapter.cache_clear()


def test_a_foreign_adapter_is_short() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in FOREIGN.iterdir() if file.is_file())
    assert lines < 60


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
def test_a_foreign_adapter_found_by_its_entry_point(model_type: str) -> None:
    config = tiny_foreign(model_type)
    if model_type == "olmo3":
        config.sliding_window = 12
        config.layer_types = ["sliding_attention", "full_attention"]
    report = check_adapter(type(find_adapter(model_type)), config, installed=True)
    assert report.skipped == {}
    assert report.packing == "separate"


@pytest.mark.slow
def test_a_foreign_adapter_in_its_own_wheel(tmp_path: Path) -> None:
    """The wheel is built, installed, and found by a new process."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "moba_olmo2.py"):
        (source / file).write_text((FOREIGN / file).read_text())
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    code = (
        "from transformers import AutoConfig; from moba_hf.hf.adapter import find_adapter;"
        "from moba_hf.testing import check_adapter; import moba_olmo2;"
        f"config = AutoConfig.for_model('olmo2', **{TINY!r});"
        "print(check_adapter(moba_olmo2.Olmo2Adapter, config, installed=True).passed)"
    )
    path = os.pathsep.join([str(target), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "sparse" in result.stdout


class _IgnoresWindows(Adapter):
    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        return None


class _NoLayer(Adapter):
    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        return "not today"


class _FewLayers(Adapter):
    def num_layers(self, config: Any) -> int:
        return 1


class _BlindToOthers(Adapter):
    def attention_layers(self, model: Any) -> Any:
        yield from list(super().attention_layers(model))[:1]


class _NoProjection(Adapter):
    def output_projection(self, module: Any) -> Any:
        return module.out_proj


class _OtherProjection(Adapter):
    def output_projection(self, module: Any) -> Any:
        return module.q_proj


@pytest.mark.parametrize(
    ("wrong", "family", "message"),
    [
        (_NoProjection, "llama", "projection: raised AttributeError: .* no attribute 'out_proj'"),
        (_OtherProjection, "llama", r"projection: output_projection of layer 0 got inputs of widths \[32\]"),
        (_IgnoresWindows, "qwen3-window", "facts: layer 0 has a sliding window of 12"),
        (_NoLayer, "llama", "facts: no layer is eligible"),
        (_FewLayers, "llama", "facts: layer 1 exists, but num_layers says 1"),
        (_BlindToOthers, "llama", r"facts: eligible layers \[1\] are not among"),
    ],
)
def test_wrong_facts_are_caught(wrong: type[Adapter], family: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_adapter(wrong, tiny_config(family))


def test_an_adapter_that_is_not_installed_says_how() -> None:
    with pytest.raises(
        AssertionError, match=r"lookup: 'llama' gives LlamaAdapter; register _NoLayer as 'llama'"
    ):
        check_adapter(_NoLayer, tiny_config("llama"), installed=True)
    with pytest.raises(AssertionError, match="lookup: raised ValueError: no MoBA adapter"):
        check_adapter(Adapter, tiny_foreign("olmo2"), installed=True)


def test_wrong_numbers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention function that counts the own block twice, and one that ignores padding."""
    from moba_hf.hf import attention

    right = attention.attention

    def one_block_less(*args: Any, **kwargs: Any) -> Any:
        *tensors, sequences, rule = args
        return right(*tensors, sequences, dataclasses.replace(rule, topk=rule.topk - 1), **kwargs)

    def no_padding(*args: Any, **kwargs: Any) -> Any:
        q, k, v, _, rule = args
        table = batched_table(q.shape[0], q.shape[2], k.shape[2], q.device)
        return right(q, k, v, Sequences(table, q.shape[2], k.shape[2]), rule, **kwargs)

    monkeypatch.setattr(attention, "attention", one_block_less)
    with pytest.raises(AssertionError, match="sparse: layer 0 differs from the reference"):
        check_adapter(type(find_adapter("llama")), tiny_config("llama"))
    monkeypatch.setattr(attention, "attention", no_padding)
    with pytest.raises(AssertionError, match="padding: a left-padded batch must equal its rows alone"):
        check_adapter(type(find_adapter("llama")), tiny_config("llama"))
