"""patch_model, unpatch_model, use_moba and transformers' own switch turn MoBA on and off without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import LENGTH, SMALL, logits, sdpa_logits, tiny_config, tiny_model, tokens, with_rule
from torch import nn
from transformers import AutoModelForCausalLM

from moba_hf import MobaConfig, patch_model, unpatch_model, use_moba
from moba_hf.hf.layer_plan import SUSPENDED

# What patching leaves on attention modules.
MARKS = {"moba_backend", "_moba_previous", "_moba_plan", SUSPENDED}


class TestSwitching:
    def model(self) -> Any:
        model = tiny_model(moba=None)
        model.set_attn_implementation("sdpa")
        return model

    def test_by_transformers_alone(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        inside = logits(model, ids)
        before = sdpa_logits(model, ids)
        assert torch.equal(logits(model, ids), inside)
        assert torch.equal(sdpa_logits(model, ids), before)

    def test_an_exception_inside_restores(self) -> None:
        model, ids = self.model(), tokens(1, LENGTH)
        before = logits(model, ids)
        with pytest.raises(KeyError, match="ours"), use_moba(model, SMALL):
            raise KeyError("ours")
        assert torch.equal(logits(model, ids), before)
        assert not hasattr(model.config, "moba")
        with (
            pytest.raises(ValueError, match="names layer 9"),
            use_moba(model, MobaConfig(8, 2, layers={9: {}})),
        ):
            pass
        assert torch.equal(logits(model, ids), before)

    def test_nesting(self) -> None:
        model, ids = self.model(), tokens(1, LENGTH)
        before = logits(model, ids)
        other = MobaConfig(8, 3, backend="reference")
        with use_moba(model, other):
            outer = logits(model, ids)
            with use_moba(model, SMALL):
                assert not torch.equal(logits(model, ids), outer)
            assert torch.equal(logits(model, ids), outer)
            assert model.model.layers[0].self_attn.moba_backend == "reference"
        assert torch.equal(logits(model, ids), before)

    @pytest.mark.parametrize("order", list(permutations(range(3))))
    @pytest.mark.parametrize("shared", [False, True], ids=["one model", "one config"])
    def test_uses_end_in_any_order(self, order: tuple[int, ...], shared: bool) -> None:
        model = self.model()
        other = type(model)(model.config).eval() if shared else model
        rules = [MobaConfig(8, topk) for topk in (2, 3, 4)]
        uses = [use_moba(one, rule) for one, rule in zip((model, other, model), rules, strict=True)]
        for use in uses:
            use.__enter__()
        active = [0, 1, 2]
        for number in order:
            uses[number].__exit__(None, None, None)
            active.remove(number)
            expected = rules[active[-1]].to_dict() if active else None
            assert getattr(model.config, "moba", None) == expected
            assert model.config._attn_implementation == ("moba" if active else "sdpa")
        for one in {model, other}:
            assert all(not set(vars(layer.self_attn)) & MARKS for layer in one.model.layers)
            with pytest.raises(ValueError, match="does not use MoBA but 'sdpa'"):
                unpatch_model(one)

    def test_generators_that_are_dropped_leave_the_others_in_place(self) -> None:
        def reads(rule: MobaConfig) -> Iterator[int]:
            with use_moba(model, rule):
                yield model.config.moba["topk"]

        model, other = self.model(), self.model()
        first, second = reads(MobaConfig(8, 2)), reads(MobaConfig(8, 3))
        assert (next(first), next(second)) == (2, 3)
        with use_moba(other, SMALL):
            first.close()
            assert model.config.moba["topk"] == 3
        assert model.config.moba["topk"] == 3
        assert not hasattr(other.config, "moba")
        with pytest.raises(ValueError, match="stop"):
            second.throw(ValueError("stop"))
        assert not hasattr(model.config, "moba")

    def test_inside_a_patched_model(self) -> None:
        model, ids = self.model(), tokens(1, LENGTH)
        before = logits(model, ids)
        patch_model(model, SMALL)
        patched = logits(model, ids)
        with use_moba(model, MobaConfig(8, 3)):
            pass
        assert torch.equal(logits(model, ids), patched)
        assert torch.equal(logits(unpatch_model(model), ids), before)
        with pytest.raises(ValueError, match="does not use MoBA but 'sdpa'"):
            unpatch_model(model)

    def test_patching_twice_is_undone_once(self) -> None:
        model, ids = self.model(), tokens(1, LENGTH)
        before = logits(model, ids)
        patch_model(patch_model(model, SMALL), MobaConfig(8, 3))
        assert torch.equal(logits(model, ids), logits(with_rule(tiny_model(), MobaConfig(8, 3)), ids))
        assert torch.equal(logits(unpatch_model(model), ids), before)

    def test_a_model_loaded_with_moba_goes_to_sdpa_and_keeps_its_settings(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        expected = sdpa_logits(model, ids)
        assert torch.equal(logits(unpatch_model(model), ids), expected)
        assert model.config.moba == SMALL.to_dict()

    def test_invalid_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="Linear is not a transformers model"):
            patch_model(nn.Linear(2, 2), SMALL)
        with pytest.raises(
            TypeError, match=r"must be a MobaConfig, got \{.*\}; MobaConfig\.from_dict\(\.\.\.\) makes"
        ):
            patch_model(self.model(), SMALL.to_dict())
        with pytest.raises(
            TypeError, match=r"must be a MobaConfig, got 'fine'; MobaConfig\.from_preset\(\.\.\.\)"
        ):
            patch_model(self.model(), "fine")

    def test_an_unknown_backend_is_named(self) -> None:
        model = self.model()
        with pytest.raises(ValueError, match="unknown backend 'cuda'"):
            patch_model(model, MobaConfig(8, 2, backend="cuda"))
        assert not hasattr(model.config, "moba")
        assert model.config._attn_implementation == "sdpa"

    def test_a_failed_patch_keeps_the_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = patch_model(self.model(), MobaConfig(8, 2, backend="reference"))
        unpatch_model(model)
        patch_model(model, MobaConfig(8, 2, backend="reference"))
        monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_: 1 / 0)
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(ZeroDivisionError):
            patch_model(model, MobaConfig(8, 3))
        assert model.model.layers[0].self_attn.moba_backend == "reference"
        assert model.config.moba == MobaConfig(8, 2).to_dict()

    def test_settings_that_would_not_be_saved_are_refused(self) -> None:
        model = tiny_model(moba=None)
        model.config.moba = MobaConfig(8, 2)
        with pytest.raises(TypeError, match=r"must be a mapping, .*to_dict\(\), got MobaConfig\("):
            logits(model, tokens(1, LENGTH))

    def test_from_config_leaves_a_given_moba_alone(self) -> None:
        config = tiny_config("llama", SMALL)
        AutoModelForCausalLM.from_config(config, attn_implementation="moba")
        assert config.moba == SMALL.to_dict()


def _copied(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


class TestCopies:
    """The state before patching belongs to the model and follows its copies and wrappers."""

    @pytest.mark.parametrize("copied", [_copied, _pickled])
    @pytest.mark.parametrize("had_settings", [False, True])
    def test_a_copy_is_undone_and_saved(
        self, copied: Callable[[Any], Any], had_settings: bool, tmp_path: Path
    ) -> None:
        model, ids = tiny_model(moba=MobaConfig(8, 5) if had_settings else None), tokens(1, LENGTH)
        model.set_attn_implementation("sdpa")
        before = logits(model, ids)
        patched = logits(patch_model(model, SMALL), ids)
        twin = copied(model)
        assert torch.equal(logits(twin, ids), patched)
        assert torch.equal(logits(unpatch_model(twin), ids), before)
        assert getattr(twin.config, "moba", None) == (MobaConfig(8, 5).to_dict() if had_settings else None)
        twin.save_pretrained(tmp_path)
        assert torch.equal(logits(model, ids), patched)
        assert torch.equal(logits(unpatch_model(model), ids), before)
        with pytest.raises(ValueError, match="does not use MoBA"):
            unpatch_model(twin)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
    @pytest.mark.parametrize("patch_first", [True, False])
    def test_through_peft(self, patch_first: bool) -> None:
        peft = pytest.importorskip("peft")
        model, ids = tiny_model(moba=None), tokens(1, LENGTH)
        model.set_attn_implementation("sdpa")
        before = logits(model, ids)
        if patch_first:
            patch_model(model, SMALL)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
        if not patch_first:
            patch_model(wrapped, SMALL)
        assert not torch.equal(logits(wrapped, ids), before)
        merged = wrapped.merge_and_unload()
        assert torch.equal(logits(unpatch_model(merged), ids), before)
        assert not hasattr(merged.config, "moba")

    @pytest.mark.parametrize("undo", ["wrapped", "inner"])
    def test_through_compile(self, undo: str) -> None:
        model, ids = tiny_model(moba=None), tokens(1, LENGTH)
        model.set_attn_implementation("sdpa")
        before = logits(model, ids)
        compiled = torch.compile(model, backend="eager")
        patch_model(compiled, SMALL)
        assert model.config._attn_implementation == "moba"
        unpatch_model(compiled if undo == "wrapped" else model)
        assert torch.equal(logits(model, ids), before)
        assert not hasattr(model.config, "moba")

    @pytest.mark.parametrize("inner_first", [True, False])
    def test_through_the_base_model(self, inner_first: bool) -> None:
        model, ids = tiny_model(moba=None), tokens(1, LENGTH)
        model.set_attn_implementation("sdpa")
        before = logits(model, ids)
        patch_model(model.model if inner_first else model, SMALL)
        unpatch_model(model if inner_first else model.model)
        assert torch.equal(logits(model, ids), before)
        assert not hasattr(model.config, "moba")

    @pytest.mark.parametrize("first", [0, 1])
    def test_models_that_share_a_config(self, first: int) -> None:
        one = tiny_model(moba=None)
        one.set_attn_implementation("sdpa")
        pair, ids = [one, type(one)(one.config).eval()], tokens(1, LENGTH)
        before = [logits(model, ids) for model in pair]
        for model in pair:
            patch_model(model, SMALL)
        unpatch_model(pair[first])
        unpatch_model(pair[1 - first])
        assert all(torch.equal(logits(model, ids), was) for model, was in zip(pair, before, strict=True))
        assert not hasattr(one.config, "moba")


def test_a_backend_among_stored_settings_is_refused() -> None:
    model = tiny_model(moba=None)
    model.config.moba = {**SMALL.to_dict(), "backend": "portable"}
    with pytest.raises(ValueError, match=r"patch_model\(model, MobaConfig\(\.\.\., backend='portable'\)\)"):
        logits(model, tokens(1, LENGTH))
