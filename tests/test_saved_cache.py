"""The cache on disk: reuse gives the same logits, changes are noticed, and other files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import close, tiny_model, tokens
from torch import Tensor

from moba_hf import MobaConfig
from moba_hf.hf.cache_names import cache_kwargs
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
    from safetensors.torch import save_file

    save_file({"keys.0": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a cache that this release can read"):
        read_with_saved_cache(one, ids, file, chunk_size=16)
    with pytest.raises(ValueError, match="chunk_size=12 must be a multiple of tile=8"):
        read_with_saved_cache(model(SHARED), ids, tmp_path / "z", chunk_size=12)
    with pytest.raises(ValueError, match=r"must be \(1, length\)"):
        read_with_saved_cache(one, ids[0], file)
