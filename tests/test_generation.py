"""Generation for the command line: chunks, streaming, and comparison with dense attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import moba_hf
from moba_hf import MobaConfig
from moba_hf.checkpoints import load
from moba_hf.hf import generation
from moba_hf.hf.generation import (
    common_tokens,
    generate,
    generate_dense,
    read_prompt,
)
from moba_hf.testing import SMALL, build_model

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", ["llama", "qwen3-window", "qwen3_next", "qwen2_5_vl", "qwen3_vl"])
def test_chunks_give_the_tokens_of_one_call(family: str) -> None:
    model = build_model(tiny_config(family))
    ids = torch.randint(1, 90, (1, 75))
    read: list[int] = []
    streamer = Collected()
    with moba_hf.use_moba(model, SMALL):
        # decode attends every key, and the last token of the prompt is read by the first decode step
        expected = generate(model, ids, 8, chunk=1000, dense_tail=0)
        result = generate(model, ids, 8, chunk=17, dense_tail=0, streamer=streamer, on_prefill=read.append)
        dense = generate_dense(model, ids, 8)
        again = generate(model, ids, 8, dense_tail=0)
    assert result.tokens == expected.tokens == again.tokens
    assert sum(read) == 74
    assert len(read) == 5
    assert [token for part in streamer.parts[1:] for token in part] == result.tokens
    assert streamer.ended
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert dense.tokens == stock[0, 75:].tolist()


def test_covering_equals_dense() -> None:
    model = build_model(tiny_config("llama"))
    ids = torch.randint(1, 90, (1, 75))
    with moba_hf.use_moba(model, MobaConfig(block_size=8, topk=64)):
        assert (
            generate(model, ids, 6, chunk=20, dense_tail=0).tokens
            == generate_dense(model, ids, 6, chunk=20).tokens
        )


def test_a_prompt_of_one_token() -> None:
    model, ids = build_model(tiny_config("llama")), torch.tensor([[5]])
    with moba_hf.use_moba(model, SMALL):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert generate(model, ids, 3, dense_tail=0).tokens == expected[0, 1:].tolist()


def test_no_chunk_counts_as_decoding() -> None:
    model = build_model(tiny_config("llama"))
    for length in range(8, 40):
        read: list[int] = []
        with moba_hf.use_moba(model, MobaConfig(block_size=8, topk=2, decode_max_len=4)):
            generate(
                model, torch.randint(1, 90, (1, length)), 1, chunk=9, dense_tail=0, on_prefill=read.append
            )
        assert sum(read) == length - 1
        assert 4 < min(read) <= max(read) <= 9


def test_where_continuations_diverge() -> None:
    assert common_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2
    assert common_tokens([], [1]) == 0


def test_prompts(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("once")
    assert read_prompt(file, None) == "once"
    assert read_prompt(file, "What?") == "once\n\nWhat?"
    assert read_prompt(None, "What?") == "What?"
    with pytest.raises(ValueError, match="empty"):
        read_prompt(None, None)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompt(tmp_path / "none.txt", None)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompt(file, None)


def test_bad_numbers() -> None:
    model = build_model(tiny_config("llama"))
    ids = torch.randint(1, 90, (1, 5))
    for arguments, message in [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1, "chunk": 2}, "chunk_size=2 is too small"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, ids, **arguments)
    with pytest.raises(ValueError, match="not empty"):
        generate(model, ids[:, :0], 1)
    with pytest.raises(TypeError, match=r"ids must be a torch tensor, got list: pass torch.as_tensor"):
        generate(model, ids.tolist(), 1)


@pytest.mark.parametrize("gpus", [False, True])
def test_loading_uses_the_available_gpus(gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    seen: dict[str, object] = {}

    def record(folder: Path, model_class: object, **kwargs: object) -> object:
        seen.update(kwargs)
        return model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(load, "check_complete", lambda *_: None)
    monkeypatch.setattr(load, "load_model", record)
    monkeypatch.setattr(load, "load_tokenizer", lambda folder, **kwargs: "tokenizer")
    loaded, tokenizer = generation.load(tmp_path, "bfloat16", SMALL)
    assert seen.pop("device_map", None) == ("auto" if gpus else None)
    assert seen == {"attn_implementation": "sdpa", "dtype": "bfloat16"}
    assert tokenizer == "tokenizer"
    assert MobaConfig.from_dict(loaded.config.moba) == SMALL
    assert loaded.config._attn_implementation == "moba"
