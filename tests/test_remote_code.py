"""The module that lets `trust_remote_code=True` load a converted checkpoint without `import moba_hf`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import MOBA, edit_json, save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, dynamic_module_utils

from moba_hf import MobaConfig, unpatch_model
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.inspection import inspect_checkpoint
from moba_hf.checkpoints.load import load_checkpoint
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.testing import SMALL, build_model

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config

MODULE = "modeling_moba.py"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects the folder to which transformers copies code of checkpoints."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def auto_map(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral", "qwen2_5_vl"])
def test_the_model_is_that_of_a_load_with_the_import(family: str, tmp_path: Path) -> None:
    auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
    if family in ("mixtral", "qwen2_5_vl"):
        build_model(tiny_config(family)).save_pretrained(tmp_path / "src")
    else:
        save_tiny(tmp_path / "src", family)
    made = convert_checkpoint(tmp_path / "src", tmp_path / "dst", SMALL, remote_code=True)
    report = verify_checkpoint(made, tmp_path / "src")
    assert report.passed, report
    plain = auto.from_pretrained(made)
    assert auto_map(made) == {auto.__name__: f"modeling_moba.{type(plain).__name__}"}
    loaded, info = auto.from_pretrained(made, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (tmp_path / "modules").exists()  # else the module was not run
    assert type(loaded) is type(plain)
    ids = torch.randint(1, 90, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = plain(ids).logits
        assert torch.equal(loaded(ids).logits, wanted)
        for name, model in {"again": loaded, "plain": plain}.items():
            model.save_pretrained(tmp_path / name)
            assert (tmp_path / name / MODULE).read_bytes() == (made / MODULE).read_bytes()
            assert auto_map(tmp_path / name) == auto_map(made)
            again = auto.from_pretrained(tmp_path / name, trust_remote_code=True)
            assert again.config.get_text_config()._attn_implementation == "moba"
            assert torch.equal(again(ids).logits, wanted)


PROGRAM = """
import sys
from transformers import AutoModelForCausalLM

folder, saved = sys.argv[1:]
dense = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
sys.modules["moba_hf"] = None  # as if it were not installed
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.modules["moba_hf"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(dense) is type(model), dense.config._attn_implementation, model.config._attn_implementation)
model.save_pretrained(saved)
print(AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).config._attn_implementation)
"""


def test_in_a_process_without_the_import(tmp_path: Path) -> None:
    made = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA, remote_code=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(made), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "fresh")},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # deepspeed prints its own
    assert said == [
        "this checkpoint runs MoBA, which needs moba_hf: pip install moba-hf",
        "True sdpa moba",
        "moba",
    ]


def test_our_own_commands_run_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = save_tokenizer(save_tiny(tmp_path / "src"))
    made = convert_checkpoint(src, tmp_path / "dst", MOBA, remote_code=True)
    (made / MODULE).write_text("raise SystemExit('run')")
    assert inspect_checkpoint(made).moba == MOBA
    model, _ = load_checkpoint(made)
    assert model.config.moba == MOBA.to_dict()


def test_it_is_off_by_default(tmp_path: Path) -> None:
    made = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA)
    assert auto_map(made) is None
    AutoModelForCausalLM.from_pretrained(made).save_pretrained(tmp_path / "saved")
    assert not (made / MODULE).exists()
    assert not (tmp_path / "saved" / MODULE).exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
def test_an_adapter_on_it_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA, remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.randint(1, 90, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = loaded(ids).logits
        assert torch.equal(logits, plain(ids).logits)
        assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(made)(ids).logits)
    assert loaded.config._attn_implementation == "moba"


def test_a_model_that_runs_dense_keeps_the_module(tmp_path: Path) -> None:
    made = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA, remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(made)
    unpatch_model(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert loaded.config._attn_implementation == "sdpa"


def test_converting_again(tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src")
    once = convert_checkpoint(src, tmp_path / "once", MOBA, remote_code=True)
    for name, remote_code in {"with": True, "without": False}.items():
        made = convert_checkpoint(once, tmp_path / name, MobaConfig(16, 3), remote_code=remote_code)
        assert auto_map(made) == auto_map(once)
        assert (made / MODULE).read_bytes() == (once / MODULE).read_bytes()
        report = verify_checkpoint(made, once)
        assert report.passed, report


def test_verify_sees_a_changed_module(tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src")
    made = convert_checkpoint(src, tmp_path / "dst", MOBA, remote_code=True)
    text = (made / MODULE).read_text()
    (made / MODULE).write_text(text + "\nprint('mine')\n")
    assert (
        f"{MODULE}: is not what 'convert --remote-code' writes"
        in verify_checkpoint(made, src).checks[-1].detail
    )
    (made / MODULE).write_text(text)
    assert verify_checkpoint(made, src).passed
    edit_json(made / "config.json", auto_map={"AutoModelForCausalLM": "modeling_moba.Other"})
    assert (
        "auto_map.AutoModelForCausalLM is 'modeling_moba.Other'"
        in verify_checkpoint(made, src).checks[-1].detail
    )
    edit_json(made / "config.json", auto_map=None)
    assert "auto_map is missing" in verify_checkpoint(made, src).checks[-1].detail


def test_refuses_a_source_with_code_of_its_own(tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src")
    edit_json(src / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    with pytest.raises(ValueError, match=r"config\.json: already has an auto_map .*modeling_mine\.Mine"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, remote_code=True)
    edit_json(src / "config.json", auto_map=None)
    for name in (MODULE, "modeling_mine.py"):
        (src / name).write_text("mine = 1\n")
        with pytest.raises(ValueError, match=rf"{name}: is code of the source"):
            convert_checkpoint(src, tmp_path / "dst", MOBA, remote_code=True)
        (src / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_refuses_a_tokenizer_with_code(tmp_path: Path) -> None:
    src = save_tokenizer(save_tiny(tmp_path / "src"))
    edit_json(src / "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/other--mine.Mine", None]})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: has an auto_map"):
        convert_checkpoint(src, tmp_path / "dst", MOBA, remote_code=True)
    assert not (tmp_path / "dst").exists()
    convert_checkpoint(src, tmp_path / "dst", MOBA)


def test_refuses_a_model_without_a_language_head(tmp_path: Path) -> None:
    values = json.loads((save_tiny(tmp_path / "x") / "config.json").read_text())
    transformers.LlamaModel(LlamaConfig(**values)).save_pretrained(tmp_path / "src")
    with pytest.raises(
        ValueError, match=r"AutoModelForCausalLM loads \(LlamaForCausalLM\).* is a LlamaModel"
    ):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", MOBA, remote_code=True)
    made = convert_checkpoint(tmp_path / "src", tmp_path / "dst", MOBA)
    assert "model = LlamaModel.from_pretrained(" in (made / "README.md").read_text()
