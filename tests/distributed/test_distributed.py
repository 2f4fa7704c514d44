"""Two processes compute the same as one: tensor parallel, FSDP2 and Ulysses, run by the usual engines."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from model_checks import tiny_config, tiny_model, tokens
from ranks import assert_done, assert_ranks, run_ranks
from torch.utils.cpp_extension import is_ninja_available

from moba_hf.hf.parallel import check_tensor_parallel

GPUS = torch.cuda.device_count()
# with ninja and a C++ compiler, to build its CPU communication
DEEPSPEED = find_spec("deepspeed") is not None and is_ninja_available() and which("c++") is not None
needs_deepspeed = pytest.mark.skipif(
    not DEEPSPEED,
    reason="needs DeepSpeed, with ninja and a C++ compiler to build its CPU communication",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves a tiny checkpoint; returns its folder."""

    def saved(model_type: str, **values: Any) -> Path:
        place = tmp_path_factory.mktemp(model_type)
        tiny_model(model_type, **values).save_pretrained(place)
        return place

    return saved


class TestTwoProcesses:
    def test_engines_and_a_rank_that_fails_after_them(self, folder: Any) -> None:
        """One run for all, since imports take most of its time; without DeepSpeed, Ulysses is left out."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        llama = folder("llama")
        uneven = folder("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
        steps = (
            f"tensor_parallel={llama}",
            f"tensor_parallel_gradients={llama}",
            f"tensor_parallel={folder('qwen3')}",  # QK-norm
            f"tensor_parallel={folder('qwen3_moe', **experts)}",
            f"uneven_heads={uneven}",
            f"fsdp={llama}",
            *([f"ulysses={llama}"] if DEEPSPEED else []),  # replaces attention in the process, so it is last
        )
        result = run_ranks(*steps, "fails=-")
        assert_done(result, *steps)
        assert result.returncode != 0
        assert "ValueError: the error of rank 1" in result.stderr
        assert "done: fails" not in result.stdout

    @needs_deepspeed
    def test_ulysses_through_accelerate(self, folder: Any) -> None:
        assert_ranks(f"through_accelerate={folder('llama')}")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_on_gpus(folder: Any, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, there are {GPUS}")
    monkeypatch.setenv("MOBA_TEST_DEVICE", "cuda")
    model = folder("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=96)
    assert_ranks(
        f"tensor_parallel={model}", f"tensor_parallel_gradients={model}", f"fsdp={model}", ranks=ranks
    )


class TestHeads:
    def test_heads_that_divide_pass(self) -> None:
        check_tensor_parallel(tiny_config("llama"), 2)

    @pytest.mark.parametrize(("heads", "ranks"), [((6, 3), 2), ((4, 2), 4)])
    def test_other_numbers_are_refused_by_name(self, heads: tuple[int, int], ranks: int) -> None:
        config = tiny_config(
            "llama", hidden_size=48, num_attention_heads=heads[0], num_key_value_heads=heads[1]
        )
        with pytest.raises(ValueError, match=f"{heads[1]} key-value heads .* {ranks} ranks"):
            check_tensor_parallel(config, ranks)


class TestRingAttention:
    @pytest.fixture(autouse=True)
    def _fresh_state(self) -> Iterator[None]:
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_it_is_refused_in_the_first_forward(self) -> None:
        Accelerator(cpu=True)
        model, ids = tiny_model("llama"), tokens(1, 20)
        model(ids)
        AcceleratorState().parallelism_config = ParallelismConfig(cp_size=2)
        with pytest.raises(ValueError, match=r"ring attention .*cp_size=2"):
            model(ids)
        model.set_attn_implementation("sdpa")
        model(ids)  # only MoBA refuses it

    def test_sequence_parallelism_is_not_refused(self) -> None:
        Accelerator(cpu=True)
        AcceleratorState().parallelism_config = ParallelismConfig(sp_size=2)
        tiny_model("llama")(tokens(1, 20))
