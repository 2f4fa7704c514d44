"""The cache on disk: reuse gives the same logits, changes are noticed, and other files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import close, tiny_model, tokens
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moba_hf import MobaConfig, unpatch_model
from moba_hf.hf import saved_cache
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.patching import suspend_moba
from moba_hf.hf.saved_cache import read_with_saved_cache

RULE = MobaConfig(block_size=8, topk=2)
SHARED = MobaConfig(8, tile=8, threshold=0.1, gate="mass")


def model(rule: MobaConfig = RULE, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tiny_model("llama", rule)


def asked(model: Any, cache: Any, question: Tensor) -> Tensor:
    return model(question, **cache_kwargs(model, cache)).logits


@pytest.mark.parametrize("length", [64, 77, 81])
@pytest.mark.parametrize("rule", [RULE, SHARED], ids=["per query", "shared"])
def test_reuse_gives_the_same_logits(rule: MobaConfig, length: int, tmp_path: Path) -> None:
    one, ids, question = model(rule), tokens(1, length), tokens(1, 5)
    cache, reused = read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16, progress=False)
    assert (reused, cache.get_seq_length()) == (0, length)
    first = asked(one, cache, question)
    if rule == RULE or length == 64:  # otherwise text and question share a tile, which differs from one call
        assert close(first, one(torch.cat([ids, question], dim=1)).logits[:, -5:])
    again, reused = read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16, progress=False)
    assert reused == again.get_seq_length() == length
    torch.testing.assert_close(asked(one, again, question), first, rtol=0, atol=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x"]


@pytest.mark.parametrize(("at", "kept"), [(0, 0), (20, 16), (47, 32), (79, 64)])
def test_a_changed_text_is_read_from_its_first_changed_chunk_on(at: int, kept: int, tmp_path: Path) -> None:
    one, ids, question = model(), tokens(1, 80), tokens(1, 5)
    read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16)
    changed = ids.clone()
    changed[0, at] = (changed[0, at] + 1) % 97
    for text, expected in ((changed, kept), (changed, 80)):
        cache, reused = read_with_saved_cache(one, text, tmp_path / "x", chunk_size=16)
        assert reused == expected
        assert close(asked(one, cache, question), one(torch.cat([text, question], dim=1)).logits[:, -5:])


@pytest.mark.parametrize(
    ("before", "after", "kept"), [(40, 80, 32), (80, 40, 40), (80, 48, 48), (48, 80, 48)]
)
def test_a_longer_and_a_shorter_text(before: int, after: int, kept: int, tmp_path: Path) -> None:
    one, ids, question = model(), tokens(1, 80), tokens(1, 5)
    read_with_saved_cache(one, ids[:, :before], tmp_path / "x", chunk_size=16)
    cache, reused = read_with_saved_cache(one, ids[:, :after], tmp_path / "x", chunk_size=16)
    assert reused <= kept
    assert reused >= kept - 16
    expected = one(torch.cat([ids[:, :after], question], dim=1)).logits[:, -5:]
    assert close(asked(one, cache, question), expected)


def test_other_files_are_refused(tmp_path: Path) -> None:
    one, ids, file = model(), tokens(1, 48), tmp_path / "x"
    read_with_saved_cache(one, ids, file, chunk_size=16)
    whole = file.read_bytes()
    changed = model()
    changed.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="made by another model"):
        read_with_saved_cache(changed, ids, file, chunk_size=16)
    with pytest.raises(ValueError, match="made with other settings"):
        read_with_saved_cache(model(MobaConfig(block_size=8, topk=3)), ids, file, chunk_size=16)
    with pytest.raises(ValueError, match="made with other settings"):
        read_with_saved_cache(one, ids, file, chunk_size=32)
    for damaged in (whole[:-8], whole[: len(whole) // 3], b"", b"no cache"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged, or not a saved cache"):
            read_with_saved_cache(one, ids, file, chunk_size=16)
    save_file({"keys.0": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a cache that this release can read"):
        read_with_saved_cache(one, ids, file, chunk_size=16)
    with pytest.raises(ValueError, match="chunk_size=12 must be a multiple of tile=8"):
        read_with_saved_cache(model(SHARED), ids, tmp_path / "z", chunk_size=12)
    with pytest.raises(ValueError, match=r"must be \(1, length\)"):
        read_with_saved_cache(one, ids[0], file)


def test_a_model_that_does_not_follow_its_settings_saves_nothing(tmp_path: Path) -> None:
    """Otherwise its dense keys would later be taken for keys read by the rule."""
    one, ids = model(), tokens(1, 48)
    suspend_moba(one)
    with pytest.raises(ValueError, match="runs full attention"):
        read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16)
    suspend_moba(one, False)
    unpatch_model(one)
    with pytest.raises(ValueError, match="does not use MoBA but 'sdpa'"):
        read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.update(tokens="40"),
        lambda header, tensors: header.update(tokens="999"),
        lambda header, tensors: header.update(tokens="-5"),
        lambda header, tensors: header.update(tokens="many"),
        lambda header, tensors: header.update(chunks="5"),
        lambda header, tensors: header.update(chunks=json.dumps(json.loads(header["chunks"])[:2])),
        lambda header, tensors: tensors.update({n: x[:, :, :20].clone() for n, x in tensors.items()}),
        lambda header, tensors: tensors.update({"values.2": tensors["values.2"][:, :, :20].clone()}),
    ],
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(
    change: Callable[[dict[str, str], dict[str, Tensor]], None], tmp_path: Path
) -> None:
    one, ids, file = model(), tokens(1, 48), tmp_path / "x"
    read_with_saved_cache(one, ids, file, chunk_size=16)
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, file, header)
    with pytest.raises(ValueError, match="damaged, or not a saved cache"):
        read_with_saved_cache(one, ids, file, chunk_size=16)


def test_a_place_that_cannot_hold_a_file_is_refused_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ids = model(), tokens(1, 48)
    monkeypatch.setattr(saved_cache, "prefill", None)  # reading would fail
    with pytest.raises(ValueError, match=r"the folder .*missing does not exist"):
        read_with_saved_cache(one, ids, tmp_path / "missing" / "x", chunk_size=16)
    with pytest.raises(ValueError, match="is not a file"):
        read_with_saved_cache(one, ids, tmp_path, chunk_size=16)
    with monkeypatch.context() as patched:
        patched.setattr(saved_cache.os, "access", lambda path, mode: False)
        with pytest.raises(ValueError, match="cannot be written to"):
            read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16)


def test_a_full_disk_does_not_lose_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    one, ids, warnings = model(), tokens(1, 48), list[str]()
    monkeypatch.setattr(saved_cache, "save_file", full)
    monkeypatch.setattr(saved_cache.logger, "warning", warnings.append)
    cache, _ = read_with_saved_cache(one, ids, tmp_path / "x", chunk_size=16)
    assert cache.get_seq_length() == 48
    assert "could not be saved" in warnings[0]
    assert not any(tmp_path.iterdir())


def test_two_processes_that_save_at_once_do_not_share_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ids, file = model(), tokens(1, 48), tmp_path / "x"

    def save(tensors: Any, path: Path, about: Any) -> None:
        save_file(tensors, path, about)
        monkeypatch.setattr(saved_cache, "save_file", save_file)
        read_with_saved_cache(one, ids, file, chunk_size=16)  # the other process starts and ends in between

    monkeypatch.setattr(saved_cache, "save_file", save)
    read_with_saved_cache(one, ids, file, chunk_size=16)
    assert read_with_saved_cache(one, ids, file, chunk_size=16)[1] == 48
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
def test_another_active_adapter_is_another_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    low = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    one, ids, file = peft.get_peft_model(model(), low), tokens(1, 48), tmp_path / "x"
    one.add_adapter("other", low)
    read_with_saved_cache(one, ids, file, chunk_size=16)
    with one.disable_adapter(), pytest.raises(ValueError, match="made by another model"):
        read_with_saved_cache(one, ids, file, chunk_size=16)
    assert read_with_saved_cache(one, ids, file, chunk_size=16)[1] == 48
    one.set_adapter("other")
    with pytest.raises(ValueError, match="made by another model"):
        read_with_saved_cache(one, ids, file, chunk_size=16)
