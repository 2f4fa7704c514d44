"""The commands eval, calibrate and plot, end to end on a tiny checkpoint."""

import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface, AutoTokenizer, PreTrainedTokenizerFast

from moba_hf import MobaConfig
from moba_hf.evaluate import token_losses
from moba_hf.evaluate.run import load
from moba_hf_cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are bytes, with a text file in the same folder."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_model(vocab_size=256).save_pretrained(folder)
    (folder / "text.txt").write_text("The grass is green and the sky is blue. " * 40)
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "MODEL", "--text", "TEXT", "--out", "TEXT"),
        ("eval", "MODEL", "--text", "TEXT", "--out", "NEW", "--store", "NEW"),
        ("calibrate", "MODEL", "--text", "TEXT", "--keys", "0.5", "--store", "TEXT"),
        ("plot", "routing", "MODEL", "--text", "TEXT", "--out", "TEXT"),
    ],
)
def test_no_output_replaces_an_input_or_another_output(
    args: tuple[str, ...], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(before := (checkpoint / "text.txt").read_text())
    named = {"MODEL": str(checkpoint), "TEXT": str(text), "NEW": str(tmp_path / "new.json")}
    with pytest.raises(SystemExit) as stop:
        main([named.get(arg, arg) for arg in args])
    assert stop.value.code == 2
    assert "is named twice and would be replaced" in capsys.readouterr().err
    assert text.read_text() == before


def test_eval_prints_what_it_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = checkpoint / "text.txt", tmp_path / "eval.json"
    rule = ("--block-size", 16, "--topk", 4, "--sink-blocks", 1, "--local-blocks", 1)
    measures = [a for m in ("perplexity", "agreement", "recall") for a in ("--measure", m)]
    task = ("--task", "needle", "--task-length", 500, "--contexts", 1, "--depth", 0.25, "--depth", 0.75)
    printed = run(
        capsys, "eval", checkpoint, "--text", text, "--length", 512, *rule, *measures, *task, "--out", out
    )
    values = json.loads(out.read_text())
    losses = values["perplexity"][str(text)]
    rise = losses["given"]["trailing"] - losses["dense"]["trailing"]
    assert f"{rise:+.4f}" in printed
    assert values["keys"][str(text)]["given"][0] == 4 * 16 / 512
    assert {t["setting"] for t in values["tasks"]} == {"dense", "given"}
    assert [[depth for depth, _ in t["by_depth"]] for t in values["tasks"]] == [[0.25, 0.75]] * 2
    for kind in ("positions", "recall", "needles"):
        picture = tmp_path / f"{kind}.png"
        run(capsys, "plot", kind, out, "--out", picture)
        assert picture.read_bytes()[:4] == b"\x89PNG"
    dense = tmp_path / "dense.png"
    run(capsys, "plot", "needles", out, "--setting", "dense", "--out", dense)
    assert dense.read_bytes() != picture.read_bytes()


def test_calibrate_writes_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = checkpoint / "text.txt", tmp_path / "curve.json"
    rule = ("--preset", "default-per-query", "--block-size", 16, "--gate", "mass")
    args = ("--text", text, "--length", 512, "--keys", 0.4, *rule)
    printed = run(capsys, "calibrate", checkpoint, *args, "--out", out, "--write")
    config = MobaConfig.from_dict(json.loads((checkpoint / "config.json").read_text())["moba"])
    assert config == MobaConfig.from_dict(json.loads(out.read_text())["config"])
    assert config.gate == "mass"
    assert config.key_budget(512, 3) <= 0.4
    assert "measured rise" in printed
    for kind, source, more in (
        ("budget", out, ()),
        ("routing", checkpoint, ("--text", text, "--length", 256, "--layer", 1)),
    ):
        run(capsys, "plot", kind, source, "--out", tmp_path / "x.png", *more)


def test_lm_eval_gets_its_arguments_and_finds_moba(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the harness: the arguments it gets, and what is registered by then."""
    harness, seen = types.ModuleType("lm_eval.__main__"), []

    def cli_evaluate() -> None:
        seen.append((sys.argv, "moba" in AttentionInterface()))

    harness.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", harness)
    before = sys.argv
    run(capsys, "lm-eval", "--model", "hf", "--tasks", "mine", "--limit", 2)
    assert seen == [(["lm-eval", "--model", "hf", "--tasks", "mine", "--limit", "2"], True)]
    assert sys.argv == before


def test_errors_are_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = checkpoint / "text.txt"
    for args in (
        ("calibrate", checkpoint, "--keys", 0.5),
        ("calibrate", checkpoint, "--text", text, "--length", 64),
        ("eval", checkpoint, "--text", text, "--length", 100000),
        ("plot", "poem", text, "--out", "x.png"),
        ("plot", "routing", checkpoint, "--text", text, "--length", 64, "--out", "missing/x.png"),
        ("eval", checkpoint, "--text", text, "--length", 64, "--out", "missing/x.json"),
        ("calibrate", checkpoint, "--text", text, "--length", 64, "--keys", 0.5, "--store", "missing/x.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("length", [0, -5])
@pytest.mark.parametrize(
    "command", [("eval",), ("calibrate", "--keys", 0.5), ("plot", "routing", "--out", "x.png")]
)
def test_lengths_below_one_are_refused(
    command: tuple[Any, ...], length: int, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*command, checkpoint, "--text", checkpoint / "text.txt", "--length", length)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in given])
    assert stop.value.code == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err == "moba-hf: Invalid value for '--length': Input should be greater than or equal to 1\n"


def test_out_that_cannot_be_written(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before the work; where the disk fills up meanwhile, the results are printed."""
    rule = ("--block-size", 16, "--topk", 2)
    args = ("eval", checkpoint, "--text", checkpoint / "text.txt", "--length", 64, *rule, "--out")
    for out, message in (("/proc/x.json", "cannot be written"), ("/dev/full", "No space left on device")):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in (*args, out)])
        printed, err = capsys.readouterr()
        assert stop.value.code == 2
        assert message in err
        assert err.count("\n") == 1
        assert bool(printed) == (out == "/dev/full")
    assert json.loads(printed)["perplexity"]


def test_lm_eval_runs_a_local_task_under_moba(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real harness on a local multiple-choice task gives the likelihoods that we compute."""
    tasks = pytest.importorskip("lm_eval.tasks", reason='needs the extra "eval"')
    # reading the 14,000 files of the built-in tasks took 90 % of the time
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    questions = [
        {"text": "The grass is green and the sky is" * n, "a": " blue", "b": " red"} for n in (3, 5, 7)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "colours.yaml").write_text(
        f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model = tmp_path / "model"
    run(capsys, "convert", checkpoint, model, "--block-size", 16, "--topk", 2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # the harness needs one
    tokenizer.save_pretrained(model)
    found = {}
    for name in ("moba", "sdpa"):
        out = tmp_path / name
        given = f"pretrained={model},dtype=float32,attn_implementation={name}"
        task = ("--tasks", "colours", "--include_path", tmp_path, "--device", "cpu", "--batch_size", 1)
        run(
            capsys,
            "lm-eval",
            "--model",
            "hf",
            "--model_args",
            given,
            *task,
            "--output_path",
            out,
            "--log_samples",
        )
        lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
        samples = sorted((json.loads(line) for line in lines), key=lambda one: one["doc_id"])
        found[name] = [float(one["filtered_resps"][0][0]) for one in samples]
    loaded, tokenizer = load(str(model), "cpu")
    for name, config in (("moba", MobaConfig(16, 2)), ("sdpa", None)):
        expected = []
        for one in questions:
            ids = tokenizer(one["text"] + one["a"], return_tensors="pt").input_ids
            expected.append(-float(token_losses(loaded, ids, config)[-5:].sum()))
        assert found[name] == pytest.approx(expected, abs=1e-3)
    assert found["moba"] != pytest.approx(found["sdpa"], abs=1e-2)
