"""The command line: the arguments it passes on, its output, and how it fails."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import flip, save_tiny

import moba_hf_cli as cli
from moba_hf import MobaConfig, bench
from moba_hf.checkpoints import convert
from moba_hf.config import preset_names


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cli") / "src")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*args: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        return (caught.value.code, *capsys.readouterr())

    return run


def settings(folder: Path) -> MobaConfig:
    return MobaConfig.from_dict(json.loads((folder / "config.json").read_text())["moba"])


def test_convert_with_numbers(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dst = tmp_path / "dst"
    numbers = ["--block-size", "16", "--topk", "5", "--sink-blocks", "1", "--local-blocks", "2"]
    code, out, err = run("convert", src, dst, *numbers, "--full-attention-layers", "-1,0")
    assert (code, err) == (0, "")
    assert str(dst) in out
    assert settings(dst) == MobaConfig(16, 5, 1, 2, full_attention_layers=(-1, 0))
    code, out, err = run("verify", dst, "--source", src)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", name] for name in ("config", "weights", "files", "load", "logits")
    ]


def test_convert_with_a_preset_and_flags(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dst = tmp_path / "dst"
    assert run("convert", src, dst, "--preset", "fine", "--link")[0] == 0
    assert settings(dst) == MobaConfig.from_preset("fine")
    assert (dst / "model.safetensors").samefile(src / "model.safetensors")
    code, _, err = run("convert", src, dst, "--preset", "paper-8k")
    assert code == 2
    assert "exists already; --overwrite" in err
    assert run("convert", src, dst, "--preset", "paper-8k", "--overwrite")[0] == 0
    assert settings(dst) == MobaConfig.from_preset("paper-8k")
    numbers = ["--block-size", "16", "--topk", "5", "--gate", "mass"]
    assert run("convert", src, dst, *numbers, "--overwrite")[0] == 0
    assert settings(dst) == MobaConfig(16, 5, gate="mass")
    assert "16, mass gate" in run("inspect", dst)[1]
    assert run("convert", src, dst, "--preset", "default-per-query-mass", "--overwrite")[0] == 0
    assert settings(dst) == dataclasses.replace(MobaConfig.from_preset("default-per-query"), gate="mass")
    assert os.listdir(tmp_path) == ["dst"]


def test_convert_with_a_shared_choice(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dst = tmp_path / "dst"
    numbers = ["--tile", "16", "--block-size", "8", "--threshold", "0.25", "--sample", "4"]
    code, out, _ = run("convert", src, dst, *numbers, "--dense-below", "32")
    expected = MobaConfig(8, tile=16, threshold=0.25, sample=4, dense_below=32, gate="mass")
    assert code == 0
    assert "converted; block_size=8" in out
    assert "threshold=0.25" in out
    assert "topk" not in out
    assert settings(dst) == expected
    shown = run("inspect", dst)[1]
    assert "blocks of 8 shared by 16 queries, threshold 0.25, one query in 4 scored, dense below 32" in shown
    assert "up to 100.0%" in shown
    capped = run("inspect", dst, "--block-size", "8", "--tile", "8", "--threshold", "0.5", "--topk", "9")[1]
    assert "blocks of 8 shared by 8 queries, threshold 0.5, at most 9" in capped


def test_dtype_is_passed_on(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    seen = {}

    def record(src: str, dst: str, config: MobaConfig, **kwargs: object) -> Path:
        seen.update(kwargs)
        return Path(dst)

    monkeypatch.setattr(convert, "convert_checkpoint", record)
    assert run("convert", "a.gguf", "b", "--preset", "fine", "--dtype", "bfloat16")[0] == 0
    command = seen.pop("command")
    assert command == "moba-hf convert a.gguf b --preset fine --dtype bfloat16"
    assert seen.pop("eval_results") is None
    assert seen == {
        "overwrite": False,
        "link": False,
        "dtype": "bfloat16",
        "context": None,
        "remote_code": False,
    }


def test_presets(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("presets")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == preset_names()
    assert re.search(r"^paper-1m +4096 +12 +1 +- +0 +0 +mean +-3,-2,-1 +The setting of", out, re.MULTILINE)
    values = json.loads(run("presets", "--json")[1])
    assert list(values) == preset_names()
    for name, preset in values.items():  # settings left out of a file have MobaConfig's defaults
        config = MobaConfig.from_preset(name)
        assert {key: getattr(config, key) for key in preset["moba"] if key != "full_attention_layers"} == {
            key: value for key, value in preset["moba"].items() if key != "full_attention_layers"
        }
        assert tuple(preset["moba"]["full_attention_layers"]) == config.full_attention_layers


def test_convert_without_settings_takes_the_default_and_says_so(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run("convert", src, tmp_path / "dst")
    assert (code, err) == (0, "moba-hf: no settings given, so preset 'default' is used\n")
    assert settings(tmp_path / "dst") == MobaConfig.from_preset("default")
    assert "\nmoba-hf convert src dst --preset default\n" in (tmp_path / "dst" / "README.md").read_text()


def test_convert_with_remote_code(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dst = tmp_path / "a dst"
    code, out, err = run("convert", src, dst, *BLOCKS, "--full-attention-layers", "0,-1", "--remote-code")
    assert (code, err) == (0, "")
    assert "trust_remote_code=True" in out
    card = (dst / "README.md").read_text()
    command = "moba-hf convert src 'a dst' --block-size 8 --topk 2 --full-attention-layers 0,-1 --remote-code"
    assert f"```bash\n{command}\n```" in card
    assert str(tmp_path) not in card
    assert run("verify", dst, "--source", src)[::2] == (0, "")
    assert run("inspect", dst)[::2] == (0, "")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["convert", "--help"], 0),
        (["presets"], 0),
        (["presets", "--json"], 0),
        (["fly"], 2),
        (["convert"], 2),
        (["convert", "a", "b", "--topk", "2"], 2),
        (["convert", "a", "b", "--preset", "huge"], 2),
        (["eval", "a", "--preset", "huge"], 2),
        (["calibrate", "a"], 2),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(args: list[str], code: int) -> None:
    program = """
import sys
import moba_hf_cli
try:
    moba_hf_cli.main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "transformers", "moba_hf", "numpy"} & set(sys.modules)
    print("imported", sorted(heavy), "code", end.code)
"""
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == [f"imported [] code {code}"], done.stderr


def test_inspect_does_not_import_the_models_of_transformers(src: Path) -> None:
    program = """
import sys
import moba_hf_cli
try:
    moba_hf_cli.main(sys.argv[1:])
except SystemExit as end:
    print("imported", "transformers.modeling_utils" in sys.modules, "code", end.code)
"""
    command = [sys.executable, "-c", program, "inspect", str(src)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["imported False code 0"], done.stderr


def test_shell_completion_lists_commands() -> None:
    environment = {
        **os.environ,
        "_MOBA_HF_COMPLETE": "complete_bash",
        "COMP_WORDS": "moba-hf con",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "moba_hf_cli"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.split() == ["convert"]


BLOCKS = ("--block-size", "8", "--topk", "2")
SHARED = ("--block-size", "8", "--tile", "16", "--threshold", "0.1")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing command"),
        (("fly",), "No such command 'fly'"),
        (("convert",), "Missing argument"),
        (("convert", "SRC", "DST", "--topk", "2"), "pass --preset NAME, or both --block-size and --topk"),
        (("convert", "SRC", "DST", "--preset", "fine", "--topk", "2"), "--preset excludes --topk"),
        (("convert", "SRC", "DST", "--preset", "fine", "--tile", "8"), "--preset excludes --tile"),
        (("convert", "SRC", "DST", *BLOCKS, "--tile", "8"), "or --tile, --block-size and --threshold"),
        (("convert", "SRC", "DST", *BLOCKS, "--threshold", "0.1"), "threshold=0.1 needs tile > 1"),
        (("convert", "SRC", "DST", *BLOCKS, "--sample", "2"), "sample=2 needs tile > 1"),
        (("convert", "SRC", "DST", *SHARED, "--sample", "3"), "sample=3 must divide tile=16"),
        (("convert", "SRC", "DST", *SHARED, "--gate", "mean"), "needs gate='mass'"),
        (("inspect", "SRC", *SHARED, "--dense-below", "8"), "dense_below=8 must be a multiple of tile=16"),
        (("eval", "SRC", *SHARED, "--sample", "0"), "sample must be at least 1, got 0"),
        (("generate", "SRC", "--prompt", "a", *SHARED, "--sample", "0"), "sample must be at least 1, got 0"),
        (
            ("convert", "SRC", "DST", "--preset", "huge"),
            "valid presets are default, default-per-query, default-per-query-mass, fine",
        ),
        (
            ("convert", "SRC", "DST", *BLOCKS, "--gate", "max"),
            "gate must be one of 'mean', 'mass', got 'max'",
        ),
        (("convert", "SRC", "DST", "--block-size", "0", "--topk", "2"), "block_size must be at least 1"),
        (("convert", "SRC", "DST", "--block-size", "8", "--topk", "0"), "topk must be at least 1"),
        (("convert", "SRC", "DST", "--block-size", "x", "--topk", "2"), "Invalid value for '--block-size'"),
        (("convert", "SRC", "DST", *BLOCKS, "--sink-blocks", "2"), "topk=2 is too small"),
        (
            ("convert", "SRC", "DST", *BLOCKS, "--full-attention-layers", "last"),
            "comma-separated layer numbers",
        ),
        (("convert", "SRC", "DST", *BLOCKS, "--full-attention-layers", "9"), "names layer 9"),
        (("convert", "SRC", "DST", *BLOCKS, "--dtype", "int4"), "'int4' is not one of"),
        (("convert", "SRC", "DST", *BLOCKS, "--dtype", "float16"), "dtype is for GGUF"),
        (("convert", "SRC", "DST", *BLOCKS, "--fast"), "No such option"),
        (("convert", "SRC/none", "DST", *BLOCKS), "no such file or folder"),
        (("convert", "SRC", "DST", *BLOCKS, "--eval-results", "SRC/none.json"), "none.json: no such file"),
        (("convert", "SRC", "SRC", *BLOCKS), "is the source itself"),
        (("verify", "SRC"), "Missing option '--source'"),
        (("verify", "DST", "--source", "SRC"), "no such folder"),
        (("verify", "SRC", "--source", "SRC"), "verify failed at config: "),
        (("bench", "--rows", "1M"), "unknown row '1M'; known are 32K-128/8"),
        (("bench", "--figure", "1"), "unknown figure '1'; known are paper"),
        *(
            pytest.param(
                ("bench", *option, "--out", "DST"),
                "no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
            )
            for option in ((), ("--tiny",))
        ),
    ],
)
def test_errors_are_one_line(run, args, message: str, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    places = [arg.replace("SRC", str(src)).replace("DST", str(tmp_path / "dst")) for arg in args]
    code, out, err = run(*places)
    assert code == 2
    assert out == ""
    assert err.startswith("moba-hf: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert os.listdir(tmp_path) == []


def test_verify_fails_on_a_flipped_byte(run, src: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dst = tmp_path / "dst"
    run("convert", src, dst, *BLOCKS)
    values = json.loads(run("verify", dst, "--source", src, "--json")[1])
    assert values["passed"]
    assert [check["name"] for check in values["checks"]] == ["config", "weights", "files", "load", "logits"]
    flip(dst / "model.safetensors", -1)
    code, out, err = run("verify", dst, "--source", src, "--json")
    values = json.loads(out)
    assert (code, values["passed"], values["checks"][-1]["passed"]) == (2, False, False)
    assert values["checks"][-1]["detail"] in err
    code, out, err = run("verify", dst, "--source", src)
    assert code == 2
    assert out.startswith("ok      config")
    assert re.fullmatch(
        r"moba-hf: verify failed at weights: .*model\.safetensors: \S+ differs from the source\n", err
    )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            AttributeError("'int' object has no attribute 'x'"),
            2,
            "AttributeError: 'int' object has no attribute 'x'",
        ),
        (ValueError("a\x1b[31m\udcff\u202eb"), 2, "a\\x1b[31m\\udcff\\u202eb"),
        (OSError(28, "No space left on device", "x"), 2, "[Errno 28] No space left on device: 'x'"),
        (RuntimeError("two\nlines"), 2, "two lines"),
        (MemoryError(), 2, "MemoryError"),
    ],
)
def test_failures_under_way(  # type: ignore[no-untyped-def]
    run, error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(convert, "convert_checkpoint", fail)
    assert run("convert", "a", "b", "--preset", "fine") == (code, "", f"moba-hf: {message}\n")


@pytest.mark.parametrize("green", [True, False])
def test_bench_passes_its_options_on(run, green: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[bench.Options] = []
    outcome = bench.Outcome(() if green else ("wrong",), "a machine", ({"row": "1M-4096/12", "ms": 2.5},))
    monkeypatch.setattr(bench, "run", lambda options: seen.append(options) or print("rows") or outcome)
    flags = ("--no-stages", "--no-dense", "--flash", "--tiny", "--workspace", "2", "--dense-limit", "9")
    rows = ("--rows", "1M-4096/12", "--rows", "1M-16384/3")
    code, out, err = run("bench", *rows, "--repeats", "3", "--figure", "paper", "--out", "x", *flags)
    assert (code, out, err) == (0 if green else 1, "rows\n", "")
    code, out, err = run(
        "bench", *rows, "--repeats", "3", "--figure", "paper", "--out", "x", *flags, "--json"
    )
    assert (code, err) == (0 if green else 1, "rows\n")
    assert json.loads(out) == {
        "green": green,
        "problems": [] if green else ["wrong"],
        "machine": "a machine",
        "results": [{"row": "1M-4096/12", "ms": 2.5}],
    }
    assert seen == 2 * [
        bench.Options(
            rows=["1M-4096/12", "1M-16384/3"],
            figure="paper",
            repeats=3,
            stages=False,
            dense=False,
            dense_limit=9,
            flash=True,
            workspace=2.0,
            tiny=True,
            out=Path("x"),
        )
    ]


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moba_hf_cli", "convert", "nowhere", str(tmp_path / "dst"), *BLOCKS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "moba-hf: nowhere: no such file or folder\n"


@pytest.mark.parametrize("seconds", [0.3, 1.5, 4.0])
def test_an_interrupt_is_quiet_from_the_start(seconds: float, tmp_path: Path) -> None:
    """Importing takes seconds; an interrupt during it must not print a traceback."""
    program = "import sys; print(flush=True); import moba_hf_cli; moba_hf_cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "convert", "nowhere", str(tmp_path / "dst"), *BLOCKS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [
        (130, "moba-hf: interrupted\n"),
        (2, "moba-hf: nowhere: no such file or folder\n"),  # a fast machine
    ]


def test_a_signal_while_python_ends_does_not_replace_the_status() -> None:
    program = """
import atexit, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
import moba_hf_cli
moba_hf_cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program, "calibrate", "a"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help(run) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert listed == [
        *("convert", "presets", "verify", "inspect", "generate"),
        *("eval", "calibrate", "plot", "bench", "lm-eval"),
    ]
    assert "╭" not in out
    assert "--block-size" in run("convert", "--help")[1]
