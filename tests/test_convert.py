"""Conversion of checkpoints: what is written, what is refused, and that no temporary files remain."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, MOBA, edit_json, save_tiny, snapshot
from fuzz.races import is_whole
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moba_hf import MobaConfig, patch_model
from moba_hf.checkpoints import convert, folders
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.inspection import inspect_checkpoint
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.testing import build_model

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config

INDEX = "model.safetensors.index.json"
OTHER = MobaConfig(block_size=16, topk=3)
MOBA_2 = MobaConfig(block_size=8, topk=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded llama."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "src", max_shard_size="20KB")


@pytest.fixture
def src(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "src"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The parent folder of all targets, where leftover files would be."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def first_shard(src: Path) -> Path:
    return min(src.glob("*.safetensors"))


# What is written


def test_copies_bytes_and_changes_only_the_config(src: Path, out: Path) -> None:
    (src / "sub").mkdir()
    (src / "sub" / "notes.bin").write_bytes(b"\0\1")
    for skipped in (".git", ".cache"):
        (src / skipped).mkdir()
        (src / skipped / "x").write_text("about the source")
    edit_json(src / "config.json", note="é", odd=1e-30, nested={"b": [1, None], "a": {}})
    made = convert_checkpoint(src, out / "dst", MOBA)
    assert made == out / "dst"
    before, after = snapshot(src), snapshot(made)
    config, converted = json.loads(before.pop("config.json")), json.loads(after.pop("config.json"))
    record = json.loads(after.pop("moba_hf.json"))
    assert "import moba_hf" in record["about"]
    assert set(record["files"]) == {*after, "config.json", "moba_hf.json"}
    assert after.pop("README.md")
    assert record["left_out"] == [".cache", ".git"]
    assert after == {name: data for name, data in before.items() if not name.startswith((".git", ".cache"))}
    assert len(list(made.glob("*.safetensors"))) > 1
    assert converted == {**config, "moba": MOBA.to_dict(), "attn_implementation": "moba"}
    assert list(converted)[: len(config)] == list(config)
    assert "backend" not in converted["moba"]
    assert os.listdir(out) == ["dst"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reloads_as_the_patched_model(family: str, tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src", family)
    made = convert_checkpoint(src, tmp_path / "dst", MOBA)
    ids = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(1))
    original = AutoModelForCausalLM.from_pretrained(src)
    reloaded = AutoModelForCausalLM.from_pretrained(made)
    assert reloaded.config._attn_implementation == "moba"
    assert MobaConfig.from_dict(reloaded.config.moba) == MOBA
    assert reloaded.dtype == torch.bfloat16
    with torch.inference_mode():
        dense = original(ids).logits
        sparse = patch_model(original, MOBA)(ids).logits
        assert torch.equal(reloaded(ids).logits, sparse)
        assert not torch.equal(sparse, dense)
        reloaded.set_attn_implementation("sdpa")
        assert torch.equal(reloaded(ids).logits, dense)


def test_makes_parents(src: Path, out: Path) -> None:
    made = convert_checkpoint(src, out / "a" / "b" / "dst", MOBA)
    assert [str(path.relative_to(out)) for path in sorted(out.glob("**"))] == [".", "a", "a/b", "a/b/dst"]
    assert (made / "config.json").is_file()


def test_single_file_and_second_conversion(tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src")
    once = convert_checkpoint(src, tmp_path / "once", MOBA)
    twice = convert_checkpoint(once, tmp_path / "twice", OTHER)
    assert (twice / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    assert AutoConfig.from_pretrained(twice).moba == OTHER.to_dict()


def test_a_private_choice_of_attention_does_not_win(src: Path, out: Path) -> None:
    edit_json(src / "config.json", _attn_implementation="eager")
    made = convert_checkpoint(src, out / "dst", MOBA)
    assert AutoModelForCausalLM.from_pretrained(made).config._attn_implementation == "moba"


def test_named_weights_file(src: Path, out: Path) -> None:
    (src / INDEX).rename(src / "mine.safetensors.index.json")
    edit_json(src / "config.json", transformers_weights="mine.safetensors.index.json")
    made = convert_checkpoint(src, out / "dst", MOBA)
    assert AutoModelForCausalLM.from_pretrained(made).config._attn_implementation == "moba"


def test_nested_text_config(tmp_path: Path) -> None:
    src = tmp_path / "src"
    build_model(tiny_config("qwen2_5_vl")).save_pretrained(src)
    edit_json(src / "config.json", attn_implementation={"vision_config": "eager"})
    text = json.loads((src / "config.json").read_text())["text_config"]
    made = convert_checkpoint(src, tmp_path / "dst", MOBA_2)
    converted = json.loads((made / "config.json").read_text())
    assert converted["text_config"] == {**text, "moba": MOBA_2.to_dict()}
    assert converted["attn_implementation"] == {"vision_config": "eager", "text_config": "moba"}
    assert "moba" not in converted
    config = AutoConfig.from_pretrained(made)
    assert config.text_config._attn_implementation == "moba"
    assert config.vision_config._attn_implementation == "eager"


def test_a_flat_vision_language_config_stays_flat(tmp_path: Path) -> None:
    src = tmp_path / "src"
    build_model(tiny_config("qwen2_5_vl")).save_pretrained(src)
    values = json.loads((src / "config.json").read_text())
    text = values.pop("text_config")
    text.pop("model_type")
    (src / "config.json").write_text(json.dumps({**text, **values}))
    made = convert_checkpoint(src, tmp_path / "dst", MOBA_2)
    switch = {"moba": MOBA_2.to_dict(), "attn_implementation": {"text_config": "moba"}}
    assert json.loads((made / "config.json").read_text()) == {**text, **values, **switch}
    for path in (made, tmp_path / "again"):
        loaded = AutoModelForImageTextToText.from_pretrained(path)
        assert loaded.config.text_config._attn_implementation == "moba"
        assert loaded.config.text_config.moba == MOBA_2.to_dict()
        loaded.save_pretrained(tmp_path / "again")
    assert verify_checkpoint(made, src).passed
    assert inspect_checkpoint(made).moba == MOBA_2


def test_leaves_out_the_state_of_a_training_run(src: Path, out: Path) -> None:
    for name in ("checkpoint-10", "global_step10"):
        (src / name).mkdir()
        (src / name / "config.json").write_text("{}")
    names = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin")
    for name in names:
        (src / name).write_bytes(b"state")
    made = convert_checkpoint(src, out / "dst", MOBA)
    assert not {"checkpoint-10", "global_step10", *names} & set(os.listdir(made))
    assert verify_checkpoint(made, src).passed


def test_keeps_permissions_and_empty_folders(src: Path, out: Path) -> None:
    (src / "empty").mkdir(mode=0o750)
    (src / "private").mkdir(mode=0o700)
    (src / "private" / "key").touch(mode=0o600)
    first_shard(src).chmod(0o400)
    (src / "config.json").chmod(0o640)
    src.chmod(0o700)
    made = convert_checkpoint(src, out / "dst", MOBA)

    def modes(folder: Path) -> dict[str, int]:
        return {str(p.relative_to(folder)): p.stat().st_mode for p in [folder, *folder.rglob("*")]}

    after = modes(made)
    del after["moba_hf.json"], after["README.md"]
    assert after == modes(src)


def test_names_that_are_long_or_not_utf8(src: Path, out: Path) -> None:
    (src / os.fsdecode(b"caf\xe9.txt")).touch()
    for name in ("n" * 255, os.fsdecode(b"d\xff\x1b[31m")):
        assert is_whole(convert_checkpoint(src, out / name, MOBA), src)
    with pytest.raises(OSError, match="name too long"):
        convert_checkpoint(src, out / ("n" * 256), MOBA)


def test_links_of_a_hub_cache_become_files(src: Path, out: Path, tmp_path: Path) -> None:
    blobs, cache = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    cache.mkdir()
    for i, path in enumerate(sorted(src.iterdir())):
        path.rename(blobs / str(i))
        (cache / path.name).symlink_to(os.path.relpath(blobs / str(i), cache))
    for link in (False, True):
        made = convert_checkpoint(cache, out / f"dst{link}", MOBA, link=link)
        assert not any(path.is_symlink() for path in made.iterdir())
        before, after = snapshot(cache), snapshot(made)
        assert after.keys() == {*before, "moba_hf.json", "README.md"}
        assert all(after[name] == before[name] for name in before if name != "config.json")


def test_link_shares_weights_only(src: Path, out: Path) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA, link=True)
    for path in src.iterdir():
        assert path.samefile(made / path.name) == (path.suffix == ".safetensors"), path.name
    assert "moba" not in json.loads((src / "config.json").read_text())


def test_link_falls_back_to_a_copy(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    made = convert_checkpoint(src, out / "dst", MOBA, link=True)
    shard = first_shard(src)
    assert not shard.samefile(made / shard.name)
    assert shard.read_bytes() == (made / shard.name).read_bytes()


@pytest.mark.parametrize("able", [0, 7, 1 << 20])
def test_copies_also_where_the_system_does_only_a_part(
    able: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def part(reader: int, writer: int, _count: int) -> int:
        if sum(copied) >= able:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        copied.append(os.write(writer, os.read(reader, 7)))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", part)
    (tmp_path / "a").write_bytes(b"some bytes to copy")
    folders.copy_file(tmp_path / "a", tmp_path / "b", (tmp_path / "a").stat())
    assert (tmp_path / "b").read_bytes() == b"some bytes to copy"


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "replaced": replace,
    "a pipe": into_pipe,
    "gone": lambda path: path.unlink(),
    "a new file": lambda path: (path.parent / "new").touch(),
}


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_refuses_a_source_that_changes_meanwhile(
    name: str, when: str, link: bool, src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard or the index changes before or after it is copied."""
    copy = folders.copy_file
    for victim in (max(src.glob("*.safetensors")), src / INDEX):
        kept = victim.read_bytes()

        def change(source: Path, *args: Any, victim: Path = victim, **kwargs: Any) -> None:
            if source != victim:
                return copy(source, *args, **kwargs)
            if when == "before":
                CHANGES[name](victim)
            copy(source, *args, **kwargs)
            if when == "after":
                CHANGES[name](victim)

        monkeypatch.setattr(folders, "copy_file", change)
        with pytest.raises((ValueError, OSError)):
            convert_checkpoint(src, out / "dst", MOBA, link=link)
        assert os.listdir(out) == []
        for path in (victim, src / "new"):
            path.unlink(missing_ok=True)
        victim.write_bytes(kept)


# What is refused


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def only(src: Path, name: str) -> None:
    """Leaves only the config and an empty file with this name."""
    for path in [*src.glob("*.safetensors"), src / INDEX]:
        path.unlink()
    (src / name).touch()


def redirect(src: Path, shard: str) -> None:
    index = json.loads((src / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (src / INDEX).write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda s: (s / "config.json").unlink(), r"src: contains no config\.json"),
    "config not json": (lambda s: (s / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config not utf-8": (
        lambda s: (s / "config.json").write_bytes(b"{\xff}"),
        r"config\.json: not valid JSON",
    ),
    "config a list": (lambda s: (s / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
    "no model_type": (
        lambda s: edit_json(s / "config.json", model_type=None),
        r"config\.json: has no model_type",
    ),
    "unknown model_type": (lambda s: edit_json(s / "config.json", model_type="hal9000"), r"'hal9000'.*llama"),
    "wrong value": (
        lambda s: edit_json(s / "config.json", num_hidden_layers="many"),
        r"config\.json: not a config of model_type 'llama'",
    ),
    "shard cut": (lambda s: cut(first_shard(s), -1), r"model-00001-of-\d+\.safetensors: damaged"),
    "shard longer": (lambda s: cut(first_shard(s), 999999), r"model-00001-of-\d+\.safetensors: damaged"),
    "header cut": (lambda s: cut(first_shard(s), 20), r"model-00001-of-\d+\.safetensors: damaged"),
    "length cut": (lambda s: cut(first_shard(s), 5), r"model-00001-of-\d+\.safetensors: damaged"),
    "shard empty": (lambda s: cut(first_shard(s), 0), r"model-00001-of-\d+\.safetensors: damaged"),
    "shard not safetensors": (
        lambda s: first_shard(s).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3),
        r"model-00001-of-\d+\.safetensors: damaged",
    ),
    "last shard cut": (lambda s: cut(max(s.glob("*.safetensors")), -1), r"safetensors: damaged"),
    "shard missing": (lambda s: first_shard(s).unlink(), r"model-00001-of-\d+\.safetensors: missing shard"),
    "index not json": (lambda s: (s / INDEX).write_text("?"), r"index\.json: not valid JSON"),
    "index empty": (lambda s: (s / INDEX).write_text("{}"), r"index\.json: has no weight_map"),
    "index up": (
        lambda s: redirect(s, "../x.safetensors"),
        r"index\.json: names '\.\./x\.safetensors', .*outside",
    ),
    "index up later": (lambda s: redirect(s, "a/../../x"), r"index\.json: names 'a/\.\./\.\./x', .*outside"),
    "index absolute": (lambda s: redirect(s, "/etc/passwd"), r"index\.json: names '/etc/passwd', .*outside"),
    "index windows": (lambda s: redirect(s, "..\\x"), r"index\.json: names .*outside"),
    "index drive": (lambda s: redirect(s, "C:x"), r"index\.json: names 'C:x', .*outside"),
    "index wrong": (
        lambda s: redirect(s, first_shard(s).name),
        r"model-00001-of-\d+\.safetensors: contains no tensor 'lm_head\.weight'",
    ),
    "weights file outside": (
        lambda s: edit_json(s / "config.json", transformers_weights="../x.safetensors"),
        r"config\.json: names '\.\./x\.safetensors', .*outside",
    ),
    "no index": (
        lambda s: (s / INDEX).unlink(),
        r"src: contains model-00001.*no model.safetensors or model\.safetensors\.index\.json",
    ),
    "pytorch weights": (
        lambda s: only(s, "pytorch_model.bin"),
        r"contains pytorch_model\.bin.*save_pretrained",
    ),
    "gguf inside": (lambda s: only(s, "m.gguf"), r"pass its path: .*m\.gguf"),
    "no weights": (lambda s: only(s, "README.md"), r"src: contains no weights"),
    "broken link": (lambda s: (s / "gone").symlink_to("nowhere"), r"gone: is a broken link"),
    "link to a folder": (lambda s: (s / "loop").symlink_to(s), r"loop: is a link to a folder"),
    "pipe": (lambda s: os.mkfifo(s / "pipe"), r"pipe: is neither a file nor a folder"),
    "link to a device": (
        lambda s: (s / "zero").symlink_to("/dev/zero"),
        r"zero: is neither a file nor a folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses_a_bad_source(name: str, src: Path, out: Path) -> None:
    damage, message = DAMAGES[name]
    damage(src)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(src, out / "dst", MOBA)
    assert "\n" not in str(caught.value)
    assert os.listdir(out) == []


def test_refuses_sources_that_are_not_folders(src: Path, out: Path) -> None:
    for path, message in (
        (src / "nowhere", "no such file or folder"),
        (first_shard(src), "pass their folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(path, out / "dst", MOBA)
    (src / "config.json").unlink()
    (src / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="PEFT adapter"):
        convert_checkpoint(src, out / "dst", MOBA)
    assert os.listdir(out) == []


def test_refuses_settings_that_do_not_fit(src: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="names layer 3, but the model has 3 layers"):
        convert_checkpoint(src, out / "dst", MobaConfig(8, 2, full_attention_layers=(3,)))
    with pytest.raises(ValueError, match="dtype is for GGUF"):
        convert_checkpoint(src, out / "dst", MOBA, dtype="float16")
    assert os.listdir(out) == []


def test_refuses_a_bad_target(src: Path, out: Path) -> None:
    (out / "file").write_text("mine")
    (out / "photos").mkdir()
    (out / "photos" / "a.jpg").touch()
    before = snapshot(out), snapshot(src)
    for target, overwrite, message in (
        (out / "photos", False, "exists already; --overwrite"),
        (out / "photos", True, "will not be overwritten, because it contains no config.json"),
        (out / "file", True, "exists and is not a folder"),
        (out / "file" / "dst", False, "out/file: is not a folder"),
        (out / "file" / "new" / "dst", False, "out/file: is not a folder"),
        (src, True, "is the source itself"),
        (src / ".." / "src", True, "is the source itself"),
        (src / "dst", False, "is inside the source"),
        (src.parent, True, "contains the source"),
        (Path("/"), True, "contains the source"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(src, target, MOBA, overwrite=overwrite)
    assert (snapshot(out), snapshot(src)) == before


def test_refuses_a_target_that_the_source_links_into(src: Path, out: Path) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    shard = first_shard(src)
    shard.unlink()
    shard.symlink_to(made / shard.name)
    with pytest.raises(ValueError, match="links to"):
        convert_checkpoint(src, made, MOBA, overwrite=True)
    assert (made / shard.name).is_file()


def test_refuses_a_target_it_cannot_write(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((ValueError, OSError)):
        convert_checkpoint(src, "/proc/moba-dst", MOBA)  # even root cannot
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == out))
    with pytest.raises(ValueError, match="out: cannot be written to"):
        convert_checkpoint(src, out / "dst", MOBA)
    assert os.listdir(out) == []


def test_refuses_a_model_without_a_layer_for_moba(tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src", "mistral")
    edit_json(src / "config.json", sliding_window=64)
    with pytest.raises(
        ValueError, match=r"config\.json: no layer .* can use MoBA \(layer 0: sliding window of 64\)"
    ):
        convert_checkpoint(src, tmp_path / "dst", MOBA)
    assert os.listdir(tmp_path) == ["src"]


def test_refuses_a_source_with_missing_weights(src: Path, out: Path) -> None:
    edit_json(src / "config.json", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"src: 9 weights are missing.*layers\.3\."):
        convert_checkpoint(src, out / "dst", MobaConfig(8, 2))
    assert os.listdir(out) == []


def add_git(made: Path) -> None:
    (made / ".git").mkdir()


def add_checkpoint(made: Path) -> None:
    (made / "other" / "deep").mkdir(parents=True)
    (made / "other" / "deep" / "config.json").touch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_git, r"contains a \.git"),
        (add_checkpoint, "contains another checkpoint .other/deep."),
        (lambda made: (made / "config.json").write_text("{}"), "not of a model"),
        (lambda made: (made / "config.json").write_text("{"), "no readable config.json"),
        (lambda made: (made / "config.json").unlink(), "contains no config.json"),
    ],
)
def test_overwrites_checkpoints_only(
    change: Callable[[Path], object], message: str, src: Path, out: Path
) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    (made / "moba_hf.json").unlink()
    convert_checkpoint(src, made, MOBA, overwrite=True)
    (made / "moba_hf.json").unlink()
    change(made)
    before = snapshot(out)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert snapshot(out) == before


def test_overwrites_a_conversion_of_a_nested_source(src: Path, out: Path) -> None:
    (src / "pooling").mkdir()
    (src / "pooling" / "config.json").write_text("{}")
    made = convert_checkpoint(src, out / "dst", MOBA)
    convert_checkpoint(src, made, OTHER, overwrite=True)
    (made / "pooling" / "mine").touch()
    with pytest.raises(ValueError, match="contains another checkpoint"):
        convert_checkpoint(src, made, MOBA, overwrite=True)


def test_refuses_a_mount_point(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "a b").mkdir()
    line = b"30 1 0:26 / " + bytes(out / "a b").replace(b" ", b"\\040") + b" rw - ext4 /dev/vda rw\n"
    read = Path.read_bytes
    mounts = Path("/proc/self/mountinfo")
    monkeypatch.setattr(Path, "read_bytes", lambda self: line if self == mounts else read(self))
    monkeypatch.setattr(convert, "new_folder", lambda *_, **__: pytest.fail("copied"))
    with pytest.raises(ValueError, match="a b: is a mount point"):
        convert_checkpoint(src, out / "a b", MOBA, overwrite=True)


def test_settings_outside_the_text_config_are_replaced(tmp_path: Path) -> None:
    build_model(tiny_config("qwen2_5_vl")).save_pretrained(tmp_path / "src")
    edit_json(tmp_path / "src" / "config.json", moba=MOBA_2.to_dict())
    made = convert_checkpoint(tmp_path / "src", tmp_path / "dst", OTHER)
    assert "moba" not in json.loads((made / "config.json").read_text())
    report = verify_checkpoint(made, tmp_path / "src")
    assert report.passed, report
    loaded = AutoModelForImageTextToText.from_pretrained(made)
    assert loaded.config.text_config.moba == OTHER.to_dict()
