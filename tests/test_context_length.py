"""Longer contexts: the rotary frequencies that transformers computes from the written config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from typer.testing import CliRunner

from moba_hf import MobaConfig
from moba_hf.checkpoints.context_length import ContextLength, with_context_length
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.inspection import describe, inspect_checkpoint
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf_cli.app import app

DIM, BASE, OLD = 16, 10_000.0, 256
PLAIN = BASE ** (-torch.arange(0, DIM, 2).double() / DIM)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": BASE,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(**values: Any) -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    return LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=OLD, **values)


def source(rope: dict[str, Any] | None = None) -> Any:
    return config(rope_parameters=rope or {"rope_type": "default", "rope_theta": BASE})


def written(given: Any, wanted: ContextLength, folder: Path) -> Any:
    """The extended config, written to a file and read back."""
    values = with_context_length(json.loads(given.to_json_string(use_diff=False)), given, wanted)
    (folder / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(folder)


def frequencies(found: Any) -> torch.Tensor:
    return LlamaRotaryEmbedding(found).inv_freq.double()


class TestRoundTrip:
    @pytest.mark.parametrize("theta", [None, 5e5])
    def test_theta(self, theta: float | None, tmp_path: Path) -> None:
        found = written(source(), ContextLength(1024, "theta", theta), tmp_path)
        expected = BASE * 4 ** (DIM / (DIM - 2)) if theta is None else theta
        torch.testing.assert_close(
            frequencies(found), expected ** (-torch.arange(0, DIM, 2).double() / DIM), rtol=1e-6, atol=0
        )
        if theta is None:  # the slowest pair slows down as much as under interpolation
            torch.testing.assert_close(frequencies(found)[-1], PLAIN[-1] / 4, rtol=1e-6, atol=0)
        assert found.max_position_embeddings == 1024

    def test_linear(self, tmp_path: Path) -> None:
        found = written(source(), ContextLength(1024, "linear"), tmp_path)
        torch.testing.assert_close(frequencies(found), PLAIN / 4, rtol=1e-6, atol=0)

    def test_yarn(self, tmp_path: Path) -> None:
        found = written(source(), ContextLength(4096, "yarn"), tmp_path)
        embedding = LlamaRotaryEmbedding(found)
        expected = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": OLD}
        assert expected.items() <= found.rope_parameters.items()
        torch.testing.assert_close(embedding.inv_freq[-1].double(), PLAIN[-1] / 16, rtol=1e-6, atol=0)
        torch.testing.assert_close(embedding.inv_freq[0].double(), PLAIN[0], rtol=1e-6, atol=0)
        assert embedding.attention_scaling > 1

    def test_linear_over_llama3(self, tmp_path: Path) -> None:
        given = source(LLAMA3)
        found = written(given, ContextLength(1024, "linear", rescale=True), tmp_path)
        torch.testing.assert_close(frequencies(found), frequencies(given) / 4, rtol=1e-6, atol=0)
        assert LlamaRotaryEmbedding(found).attention_scaling == 1.0

    def test_theta_over_llama3_keeps_its_scaling(self, tmp_path: Path) -> None:
        found = written(source(LLAMA3), ContextLength(1024, "theta", 1e6, rescale=True), tmp_path)
        torch.testing.assert_close(
            frequencies(found), frequencies(source({**LLAMA3, "rope_theta": 1e6})), rtol=1e-6, atol=0
        )

    def test_extending_twice_equals_extending_once(self, tmp_path: Path) -> None:
        for rope in ("linear", "yarn"):
            half = written(source(), ContextLength(512, rope), tmp_path)
            whole = written(half, ContextLength(1024, rope, rescale=True), tmp_path)
            at_once = written(source(), ContextLength(1024, rope), tmp_path)
            assert torch.equal(frequencies(whole), frequencies(at_once))

    def test_older_names_have_the_same_values(self, tmp_path: Path) -> None:
        for rope in ("theta", "linear", "yarn"):
            given = source()
            values = with_context_length(
                json.loads(given.to_json_string(use_diff=False)), given, ContextLength(1024, rope)
            )
            new = LlamaConfig.from_dict(dict(values))
            del values["rope_parameters"]
            assert torch.equal(frequencies(LlamaConfig.from_dict(values)), frequencies(new))

    def test_layers_of_other_types_keep_their_embedding(self) -> None:
        given = AutoConfig.for_model("gemma3_text", max_position_embeddings=OLD)
        before = given.rope_parameters
        values = with_context_length(given.to_dict(), given, ContextLength(1024, "linear"))
        assert values["rope_parameters"]["sliding_attention"] == before["sliding_attention"]
        assert values["rope_parameters"]["full_attention"]["factor"] == 4.0

    def test_a_model_runs_at_the_new_length(self, tmp_path: Path) -> None:
        found = written(source(), ContextLength(1024, "linear"), tmp_path)
        model = AutoModelForCausalLM.from_config(found, attn_implementation="sdpa").eval()
        ids = torch.randint(0, 50, (1, 40))
        plain = AutoModelForCausalLM.from_config(source(), attn_implementation="sdpa").eval()
        plain.load_state_dict(model.state_dict())
        positions = torch.arange(40)[None]
        with torch.no_grad():
            expected = plain(ids, position_ids=positions / 4).logits
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


class TestRefused:
    @pytest.mark.parametrize(
        ("rope", "wanted", "message"),
        [
            (None, ContextLength(OLD), "context_length=256 is not above the 256 tokens"),
            (LLAMA3, ContextLength(1024), "already scaled .*llama3.* pass rescale"),
            (
                LLAMA3,
                ContextLength(1024, "yarn", rescale=True),
                "'yarn' cannot be combined with rope_type 'llama3'",
            ),
        ],
    )
    def test_sources(self, rope: dict[str, Any] | None, wanted: ContextLength, message: str) -> None:
        given = source(rope)
        with pytest.raises(ValueError, match=message):
            with_context_length(given.to_dict(), given, wanted)

    def test_no_rotary_embedding(self) -> None:
        given = AutoConfig.for_model("gpt2")
        with pytest.raises(ValueError, match="gpt2 has no rotary embedding"):
            with_context_length(given.to_dict(), given, ContextLength(4096))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"rope": "ntk"}, "rope must be one of"),
            ({"rope": "yarn", "theta": 1e6}, "needs rope="),
            ({"theta": 0.0}, "must be positive"),
        ],
    )
    def test_values(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ContextLength(1024, **values)


@pytest.mark.parametrize(
    "wanted", [ContextLength(1024), ContextLength(2048, "linear"), ContextLength(512, "yarn")]
)
def test_convert_writes_it_and_verify_knows(wanted: ContextLength, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source")
    made = convert_checkpoint(model, tmp_path / "made", MobaConfig(8, 2), context=wanted)
    read = AutoConfig.from_pretrained(made)
    assert read.max_position_embeddings == wanted.length
    assert read.rope_parameters["rope_type"] == ("default" if wanted.rope == "theta" else wanted.rope)
    report = verify_checkpoint(made, model)
    assert report.passed, report.checks[-1]
    shown = describe(inspect_checkpoint(made))
    assert f"context: {wanted.length:,} tokens" in shown
    assert f"rope_type {read.rope_parameters['rope_type']}" in shown
    edit_json(made / "config.json", max_position_embeddings=wanted.length + 1)  # differs from the record
    assert not verify_checkpoint(made, model).passed
    with pytest.raises(ValueError, match=f"context_length={OLD} is not above"):
        convert_checkpoint(model, tmp_path / "other", MobaConfig(8, 2), context=ContextLength(OLD))
    assert not (tmp_path / "other").exists()


def test_the_command(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source")
    command = ["convert", str(model), str(tmp_path / "made"), "--block-size", "8", "--topk", "2"]
    result = CliRunner().invoke(app, [*command, "--context-length", "1024", "--rope-theta", "5e4"])
    assert result.exit_code == 0, result.output
    assert "Context extended to 1,024 tokens (theta)" in result.output
    assert AutoConfig.from_pretrained(tmp_path / "made").rope_parameters["rope_theta"] == 5e4
    other = [*command[:2], str(tmp_path / "other"), *command[3:], "--rope", "yarn"]
    assert CliRunner().invoke(app, other).exit_code != 0
