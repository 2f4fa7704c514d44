"""The model card of a converted checkpoint: its contents, and the checks of `verify`."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MOBA, save_tiny
from huggingface_hub import ModelCard, metadata_load
from transformers import AutoModelForCausalLM

from moba_hf import MobaConfig
from moba_hf.checkpoints.changes import Changes
from moba_hf.checkpoints.context_length import ContextLength
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.fingerprint import fingerprint
from moba_hf.checkpoints.model_card import Card, read_card
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.evaluate import run

CARD = Card("org/tiny", ("moba-hf convert org/tiny dst --preset fine",), base_model="org/tiny")
SECTION = CARD.section(Changes(MOBA))
BODY = "\n# Tiny\n\nA model of mine.\n\n```python\nprint('---')\n```\n"
FRONT = "---\nlanguage: no  # Norwegian\nlicense: apache-2.0\ntags:\n- mine\n---\n"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "src")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# What it says


def test_a_source_without_a_card_gets_one(src: Path, tmp_path: Path) -> None:
    made = convert_checkpoint(src, tmp_path / "dst", MOBA)
    text = (made / "README.md").read_text()
    assert metadata_load(made / "README.md") == {"library_name": "transformers", "tags": ["moba"]}
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert MobaConfig.from_dict(json.loads(block)) == MOBA
    assert "`src`, its weights unchanged, set up to use MoBA" in text
    assert "A query attends to at most 2 blocks of 8 tokens, including its own." in text
    assert "Layers that keep full attention: -1" in text
    assert "What it costs" not in text
    assert "trust_remote_code" not in text
    assert str(tmp_path) not in text
    assert verify_checkpoint(made, src).passed


def test_the_calls_it_shows_work(src: Path, tmp_path: Path) -> None:
    made = convert_checkpoint(src, tmp_path / "dst", replace(MOBA, decode="sparse", layers={0: {"topk": 3}}))
    with_moba, without, call = python_blocks((made / "README.md").read_text())
    found = {}
    for name, code in {"moba": with_moba, "sdpa": without}.items():
        values: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(made)), values)
        found[name] = values["model"].config._attn_implementation
    assert found == {"moba": "moba", "sdpa": "sdpa"}
    names = {"convert_checkpoint": convert_checkpoint, "MobaConfig": MobaConfig}
    (tmp_path / "again").mkdir()
    call = call.replace("'src'", repr(str(src))).replace("'dst'", repr(str(tmp_path / "again" / "dst")))
    exec(call, names)
    assert (tmp_path / "again" / "dst" / "config.json").read_text() == (made / "config.json").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            Changes(MobaConfig(8, tile=16, threshold=0.25, sample=4, dense_below=32, gate="mass", topk=9)),
            "Each tile of 16 neighbouring queries attends to the blocks of 8 tokens with at least 0.25 times "
            "the largest attention mass, at most 9. This is not the paper's MoBA. One query in 4 is used to "
            "choose for its tile. Queries before position 32 attend to every key. Reading a prompt is sparse",
        ),
        (
            Changes(MobaConfig(8, 5, 1, 2, gate="mass", decode="sparse", layers={1: {"topk": 6}})),
            "at most 5 blocks of 8 tokens, including its own. Blocks are scored by their mass, which is not "
            "the paper's MoBA. Always attended: the 1 first and the 2 preceding. Layers with their own "
            "settings: 1. Reading a prompt is sparse; generating a token chooses blocks too.",
        ),
        (
            Changes(MOBA, ContextLength(4096, "yarn")),
            "The context is extended to 4,096 tokens (rope: yarn), which reduces quality until the model is",
        ),
    ],
)
def test_settings_in_words(changes: Changes, words: str) -> None:
    assert words in CARD.section(changes)


def test_a_model_of_the_hub_is_the_base_model() -> None:
    assert ModelCard(CARD.text(None, SECTION)).data.base_model == "org/tiny"
    assert "```bash\nmoba-hf convert org/tiny dst --preset fine\n```" in SECTION
    other = replace(CARD, loader="AutoModelForImageTextToText").section(Changes(MOBA, remote_code=True))
    assert "import AutoModelForImageTextToText" in other
    assert '("path/to/this/folder", trust_remote_code=True)' in other


# The card of the source


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (FRONT, "---\nlanguage: no  # Norwegian\nlicense: apache-2.0\ntags:\n- moba\n- mine\nADDED\n---\n"),
        ("---\ntags: [a, b]\n---\n", "---\ntags: [moba, a, b]\nADDED\n---\n"),
        ("---\ntags: []\n---\n", "---\ntags: [moba, ]\nADDED\n---\n"),
        (
            "---\ntags:\n  - moba\nbase_model: x/y\n---\n",
            "---\ntags:\n  - moba\nbase_model: x/y\nLIBRARY\n---\n",
        ),
        (
            "---\ntags: one\nlibrary_name:\nbase_model: x/y\n---\n",
            "---\ntags: one\nlibrary_name:\nbase_model: x/y\n---\n",
        ),
        ("---\n{license: mit}\n---\n", "---\n{license: mit}\n---\n"),
        ("---\na: [b\n---\n", "---\na: [b\n---\n"),
        ("---\n\n---\n", "---\nADDED\ntags:\n- moba\n---\n"),
        ("", "---\nADDED\ntags:\n- moba\n---\n"),
    ],
    ids=["block", "flow", "empty flow", "tagged", "text", "mapping", "invalid", "empty", "none"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_front_matter_gains_lines_and_loses_none(front: str, expected: str, newline: str) -> None:
    library = "library_name: transformers"
    expected = expected.replace("ADDED", f"base_model: org/tiny\n{library}").replace("LIBRARY", library)
    made = CARD.text((front + BODY).replace("\n", newline), SECTION)
    assert made == f"{expected}\n{SECTION}\n{BODY}".replace("\n", newline)


@pytest.mark.parametrize(
    "block",
    [
        "a: &a [*a]",
        "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]),
    ],
    ids=["of itself", "of aliases"],
)
def test_aliases_in_a_front_matter_are_not_followed(block: str) -> None:
    made = CARD.text(f"---\n{block}\ntags: [b]\n---\n{BODY}", SECTION)
    added = "base_model: org/tiny\nlibrary_name: transformers"
    assert made == f"---\n{block}\ntags: [moba, b]\n{added}\n---\n\n{SECTION}\n{BODY}"


def test_a_byte_order_mark_and_a_missing_last_newline() -> None:
    assert CARD.text("\ufeff" + FRONT + BODY, SECTION).startswith("\ufeff---\nlanguage")
    made = CARD.text(FRONT.rstrip("\n"), SECTION)
    assert ModelCard(made).data.license == "apache-2.0"
    assert made.endswith(f"---\n\n{SECTION}\n")


@pytest.mark.parametrize("given", [None, BODY, FRONT + BODY, (FRONT + BODY).replace("\n", "\r\n")])
def test_a_further_conversion_replaces_our_part_alone(given: str | None) -> None:
    once = CARD.text(given, SECTION)
    assert CARD.text(once, SECTION) == once
    other = Card("dst", ("second",)).section(Changes(MobaConfig(16, 3)))
    newline = "\r\n" if given and "\r\n" in given else "\n"
    expected = once.replace(SECTION.replace("\n", newline), other.replace("\n", newline))
    assert Card("dst", ("second",)).text(once, other) == expected
    moved = f"{FRONT}{BODY}\n{SECTION}\nlast words\n"
    assert CARD.text(moved, other).endswith(f"{BODY}\n{other}\nlast words\n")


def test_the_card_of_a_source_is_kept(src: Path, tmp_path: Path) -> None:
    (src / "README.md").write_text(FRONT + BODY)
    (src / "README.md").chmod(0o640)
    made = convert_checkpoint(src, tmp_path / "dst", MOBA)
    text = (made / "README.md").read_text()
    assert text.endswith("<!-- moba-hf: end -->\n" + BODY)
    assert metadata_load(made / "README.md")["license"] == "apache-2.0"
    assert stat.S_IMODE((made / "README.md").stat().st_mode) == 0o640
    assert verify_checkpoint(made, src).passed
    again = convert_checkpoint(made, tmp_path / "again", MobaConfig(16, 3))
    changed = (again / "README.md").read_text()
    assert changed.count("<!-- moba-hf: begin") == 1
    assert changed.endswith("<!-- moba-hf: end -->\n" + BODY)
    assert changed[: changed.index("<!--")] == text[: text.index("<!--")]
    assert "at most 3 blocks of 16 tokens" in changed
    assert "at most 2 blocks of 8 tokens" not in changed
    assert verify_checkpoint(again, made).passed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"caf\xe9"), r"README\.md: is not UTF-8 text"),
        (lambda path: path.mkdir(), r"README\.md: is a folder"),
        (lambda path: path.write_text("<!-- moba-hf: begin -->"), r"README\.md: the marks"),
        (lambda path: path.write_text("<!-- moba-hf: end --> <!-- moba-hf: begin"), r"README\.md: the marks"),
        (lambda path: path.write_text(SECTION + SECTION), r"README\.md: the marks"),
        (
            lambda path: path.write_text(
                "\ufeff---\n# <!-- moba-hf: begin -->\n# <!-- moba-hf: end -->\n---\n"
            ),
            r"README\.md: the mark .* must not be in the front matter",
        ),
    ],
)
def test_refuses_a_card_that_cannot_be_kept(
    damage: Callable[[Path], object], message: str, src: Path, tmp_path: Path
) -> None:
    damage(src / "README.md")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(src, tmp_path / "dst", MOBA)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def edit(old: str, new: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edit("at most 2 blocks", "at most 3 blocks"),
            "the section between the moba-hf marks has been changed",
        ),
        (edit("<!-- moba-hf: end -->", ""), "the marks"),
        (
            lambda path: path.write_text(FRONT + BODY),
            "the section between the moba-hf marks has been changed",
        ),
        (edit("A model of mine.", "A model of yours."), "differs from the source outside the moba-hf marks"),
        (edit("license: apache-2.0", "license: mit"), "differs from the source outside the moba-hf marks"),
        (edit("- moba\n", ""), "differs from the source outside the moba-hf marks"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "differs from the source outside"),
    ],
)
def test_verify_sees_a_changed_card(
    change: Callable[[Path], object], message: str, src: Path, tmp_path: Path
) -> None:
    (src / "README.md").write_text(FRONT + BODY)
    made = convert_checkpoint(src, tmp_path / "dst", MOBA)
    change(made / "README.md")
    failed = verify_checkpoint(made, src).checks[-1]
    assert (failed.name, failed.passed) == ("files", False)
    assert f"README.md: {message}" in failed.detail


def test_verify_sees_another_card_of_the_source(src: Path, tmp_path: Path) -> None:
    made = convert_checkpoint(src, tmp_path / "dst", MOBA)
    (src / "README.md").write_text(BODY)
    assert "README.md: differs from the source" in verify_checkpoint(made, src).checks[-1].detail
    assert read_card(made) is not None


# What was measured


def write_results(path: Path, src: Path, **changes: Any) -> Path:
    """Results of `eval` of `src` for dense, `MOBA` and another setting."""
    loss = {"tokens": 4095, "loss": 3.0, "trailing_tokens": 2048}
    values = {
        "model": fingerprint(src),
        "settings": {"dense": None, "given": MOBA.to_dict(), "other": MobaConfig(16, 3).to_dict()},
        "perplexity": {
            "/home/me/a|b.txt": {
                name: {**loss, "trailing": trailing}
                for name, trailing in {"dense": 2.5, "given": 2.625, "other": 9.0}.items()
            }
        },
        "keys": {"/home/me/a|b.txt": {"given": [0.25, 0.3125], "other": [0.5, 0.5]}},
        "tasks": [
            {"setting": s, "task": "needle", "length": 8192, "score": x, "low": x - 0.125, "high": 1.0}
            for s, x in {"dense": 1.0, "given": 0.75, "other": 0.125}.items()
        ],
        **changes,
    }
    path.write_text(json.dumps(values))
    return path


def test_results_of_these_settings_are_shown(src: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "r.json", src)
    made = convert_checkpoint(src, tmp_path / "dst", MOBA, eval_results=results)
    text = (made / "README.md").read_text()
    table = text[text.index("| measured") : text.index("Measured with")].strip().splitlines()
    assert table == [
        "| measured | dense | MoBA |",
        "| --- | --- | --- |",
        "| a_b.txt, 4,095 tokens: loss of the last 2,048 (nats) | 2.5000 | 2.6250 (+0.1250) |",
        "| a_b.txt: attended query-key pairs | 100.0% | 31.2% |",
        "| task needle, 8,192 tokens: score | 1.00 (95 % interval 0.88 - 1.00) "
        "| 0.75 (95 % interval 0.62 - 1.00) |",
    ]
    assert verify_checkpoint(made, src).passed


def test_results_of_eval_itself_are_read(src: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    measures = ("perplexity", "agreement", "positions")
    settings = {"dense": None, "fine": MOBA}
    result = run.evaluate(model, None, {"text": ids}, settings, measures=measures, source=src)
    (tmp_path / "r.json").write_text(json.dumps(result))
    made = convert_checkpoint(src, tmp_path / "dst", MOBA, eval_results=tmp_path / "r.json")
    text = (made / "README.md").read_text()
    dense, sparse = (result["perplexity"]["text"][name]["trailing"] for name in ("dense", "fine"))
    assert f"| {dense:.4f} | {sparse:.4f} ({sparse - dense:+.4f}) |" in text
    assert f"| {result['agreement']['text']['fine']['top1']:.1%}; " in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"dense": None, "x": MobaConfig(16, 3).to_dict()}}, r"no results for the settings"),
        ({"settings": None}, "is not what 'moba-hf eval --json' prints"),
        ({"perplexity": {"a": {"given": {}}}}, "is not what 'moba-hf eval --json' prints"),
        ({"perplexity": {}, "tasks": []}, "no losses, agreement or tasks for 'given'"),
    ],
)
def test_refuses_results_of_something_else(
    changes: dict[str, Any], message: str, src: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "r.json", src, **changes)
    with pytest.raises(ValueError, match=rf"r\.json: .*{message}"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, eval_results=results)
    assert not (tmp_path / "dst").exists()


def changed_weight(src: Path, folder: Path) -> Path:
    """A copy of `src` in which one value of one weight differs."""
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(folder)
    shutil.copy(src / "config.json", folder)
    return folder


def changed_config(src: Path, folder: Path) -> Path:
    """A copy of `src` with another rotary base."""
    shutil.copytree(src, folder)
    values = json.loads((src / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("change", [changed_weight, changed_config])
def test_refuses_results_of_another_model(
    change: Callable[[Path, Path], Path], src: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "r.json", change(src, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"r\.json: holds results of another model; run 'moba-hf eval' on"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, eval_results=results)
    assert not (tmp_path / "dst").exists()
    unnamed = write_results(tmp_path / "r.json", src, model=None)
    with pytest.raises(ValueError, match=r"r\.json: does not tell which model it measured; run"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, eval_results=unnamed)


def test_results_belong_to_the_context_that_is_written(src: Path, tmp_path: Path) -> None:
    """Those of the source are not those of the extended model; those of its conversion are."""
    longer = ContextLength(4096)
    results = write_results(tmp_path / "r.json", src)
    with pytest.raises(ValueError, match="results of another model"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, context=longer, eval_results=results)
    other = MobaConfig(16, 3)
    made = convert_checkpoint(src, tmp_path / "dst", other, context=longer, remote_code=True)
    assert (
        fingerprint(made) != fingerprint(src) == fingerprint(convert_checkpoint(src, tmp_path / "a", other))
    )
    results = write_results(tmp_path / "r.json", made)
    again = convert_checkpoint(src, tmp_path / "b", MOBA, context=longer, eval_results=results)
    assert "| measured" in (again / "README.md").read_text()
