"""The loader of all commands: incomplete checkpoints, checkpoints with code, and names that do not exist."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, save_tiny, save_tokenizer, write_tiny_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from moba_hf import MobaConfig, convert_checkpoint
from moba_hf.checkpoints.inspection import inspect_checkpoint
from moba_hf.checkpoints.load import find_source, load_checkpoint, load_tokenizer
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.testing import build_model

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded llama with a tokenizer."""
    return save_tokenizer(save_tiny(tmp_path / "model", max_shard_size="20KB"))


def headless(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    AutoModel.from_config(AutoModelForCausalLM.from_config(_config(folder)).config).save_pretrained(folder)
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"])


def _config(folder: Path) -> object:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def without_a_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    gone = max(index["weight_map"].values())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone}
    (folder / INDEX).write_text(json.dumps(index))


INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "headless": (headless, "1 weights are missing.*LlamaForCausalLM.*lm_head.weight"),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=4), r"missing.*layers\.3\."),
    "fewer layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=2),
        r"does not name.*layers\.2",
    ),
    "an index without a shard": (without_a_shard, "missing"),
    "other shapes": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        "do not have the shapes that config.json gives",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_refuses_incomplete_weights(name: str, folder: Path) -> None:
    load_checkpoint(folder)
    damage, message = INCOMPLETE[name]
    damage(folder)
    with pytest.raises(ValueError, match=rf"model: .*{message}"):
        load_checkpoint(folder)


def test_runs_no_code_of_a_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast as Evil\n"
    )
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
        tokenizer_class="Evil",
    )
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match=r"model: its tokenizer does not load.*custom code"):
        load_tokenizer(folder)
    assert not questions  # transformers would ask, and wait 15 s for an answer
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_panics_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    with pytest.raises(ValueError, match="model: its tokenizer does not load"):
        load_checkpoint(folder)


def test_refuses_names_that_do_not_exist_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(host: str, *args: object, **kwargs: object) -> None:
        asked.append(host)
        raise socket.gaierror

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for name, message in (
        ("ownr/model", "no such file or folder, and no model of that name in the Hugging Face cache"),
        ("./ownr/model", "no such file or folder$"),
        (str(tmp_path / "x"), "no such file or folder$"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(name)
    assert not asked


def test_finds_a_model_of_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "hub" / "models--owner--tiny"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    folder.rename(place / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_source("owner/tiny") == place / "snapshots" / ("a" * 40)
    assert type(load_checkpoint("owner/tiny")[0]).__name__ == "LlamaForCausalLM"
    made = convert_checkpoint("owner/tiny", tmp_path / "dst", MobaConfig(8, 2))
    assert verify_checkpoint(made, "owner/tiny").passed
    assert inspect_checkpoint("owner/tiny", MobaConfig(8, 2)).layers == inspect_checkpoint(made).layers


def test_refuses_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: neither a file nor a folder"):
        load_checkpoint(folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "special_tokens_map.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: neither a file nor a folder"):
        load_checkpoint(folder)


@torch.no_grad()
def test_loads_a_vision_language_checkpoint_whole(tmp_path: Path) -> None:
    model = build_model(tiny_config("qwen2_5_vl"))
    model.save_pretrained(tmp_path / "vl")
    save_tokenizer(tmp_path / "vl")
    loaded, _ = load_checkpoint(tmp_path / "vl")
    ids = torch.randint(1, 90, (1, 20))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_loads_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "m.gguf")
    model, tokenizer = load_checkpoint(tmp_path / "m.gguf")
    assert model.dtype == torch.float32
    assert tokenizer("!").input_ids


def test_old_weights_without_safetensors_load(folder: Path) -> None:
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load_checkpoint(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_checkpoint(folder)
