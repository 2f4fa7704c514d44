"""PEFT and TRL on tiny models, each for a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import Watch, arguments, assert_equal, weights
from tiny_models import HYBRID, RULE, VOCABULARY, Blocks, tiny, tokens
from transformers import Trainer

from moba_hf.config import LayerConfig
from moba_hf.training import LongRowTrainer, MobaCallback, Recipe

# Deprecated uses of transformers in these libraries are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

RULES = {"moba": (LayerConfig(8, 2),) * 2, "full": (None, None)}
SWITCHED = {0: {RULES["moba"]}, 1: {RULES["moba"]}, 2: {RULES["full"]}, 3: {RULES["full"]}}


class TestPeft:
    def lora(self, model: Any, seed: int = 0) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    def test_lora(self, tmp_path: Path) -> None:
        """Adapters learn, the base does not, the switch happens; reloading onto the base keeps the logits."""
        peft = pytest.importorskip("peft")
        model, base, watch = self.lora(tiny()), weights(tiny()), Watch()
        before = weights(model)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, 4, save_strategy="steps", save_steps=2),
            train_dataset=Blocks(),
            callbacks=[MobaCallback(Recipe(full_share=0.5), trailing_tokens=16), watch],
        )
        trainer.train()
        assert watch.rules == SWITCHED
        after = weights(model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if "lora_" in name}
        assert all("trailing_loss" in line for line in trainer.state.log_history if "loss" in line)
        restored = tiny()
        assert all(torch.equal(value, base[name]) for name, value in weights(restored).items())
        loaded = peft.PeftModel.from_pretrained(restored, tmp_path / "checkpoint-4").eval()
        ids = tokens(1, 64)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["moba"] == RULE.to_dict()

    @pytest.mark.parametrize("tail", [0, 16])
    def test_the_loss_in_pieces(self, tail: int, tmp_path: Path) -> None:
        found = []
        for kind, more in ((Trainer, {}), (LongRowTrainer, {"dense_tail": tail})):
            model = self.lora(tiny())
            kind(model=model, args=arguments(tmp_path, 2), train_dataset=Blocks(), **more).train()
            found.append(weights(model))
        same = [torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0]]
        assert all(same) == (tail == 0)

    def test_resumes_bit_identically(self, tmp_path: Path) -> None:
        trained = []
        for resume in (None, str(tmp_path / "checkpoint-2")):
            model = self.lora(
                tiny(), seed=len(trained)
            )  # a different initialisation, which resuming overwrites
            trainer = Trainer(
                model=model,
                args=arguments(tmp_path, 4, save_strategy="steps", save_steps=2),
                train_dataset=Blocks(),
                callbacks=[MobaCallback(Recipe(full_share=0.5))],
            )
            trainer.train(resume_from_checkpoint=resume)
            trained.append(model)
        assert_equal(*trained)


def tokenizer() -> Any:
    """A tokenizer with the tiny vocabulary, which TRL needs for padding and saving."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


def documents(count: int = 24) -> Any:
    """Tokenised documents of 9 to 60 tokens."""
    datasets = pytest.importorskip("datasets")
    lengths = torch.randint(9, 60, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    return datasets.Dataset.from_list(
        [{"input_ids": tokens(length, seed=10 + i).tolist()} for i, length in enumerate(lengths)]
    )


class TestTrl:
    def train(self, folder: Path, model: Any, steps: int = 4, **given: Any) -> Any:
        trl = pytest.importorskip("trl")
        settings = {
            **vars_of(folder, steps),
            "max_length": 64,
            "gradient_checkpointing": False,
            "bf16": False,
            **given,
        }
        watch, seen = Watch(), []
        model.register_forward_hook(
            lambda _m, _a, k, out: seen.append((k, out.loss.detach())), with_kwargs=True
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**settings),
            train_dataset=documents(),
            processing_class=tokenizer(),
            callbacks=[MobaCallback(Recipe(full_share=0.5), trailing_tokens=16), watch],
        )
        trainer.train()
        trainer.watch, trainer.seen = watch, seen
        return trainer

    @pytest.mark.parametrize("packing", ["padded", "bfd", "wrapped", "padding_free"])
    @pytest.mark.parametrize("rule", [RULE, HYBRID], ids=["moba", "hybrid"])
    def test_sft(self, tmp_path: Path, rule: Any, packing: str) -> None:
        given: dict[str, Any] = {"packing": packing in ("bfd", "wrapped")}
        if given["packing"]:
            given["packing_strategy"] = packing
        if packing == "padding_free":
            given |= {"padding_free": True, "max_length": None}
        trainer = self.train(tmp_path, tiny(rule), **given)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [line["moba_full"] for line in lines] == [0, 0, 1, 1]
        assert len(trainer.watch.rules) == 4
        assert all("trailing_loss" in line for line in lines)
        given, loss = trainer.seen[0]
        alone = packing in ("bfd", "padding_free")
        logits, labels = self.first_batch(tiny(rule), given, alone), given["labels"]
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        torch.testing.assert_close(loss, each.sum() / (labels[:, 1:] != -100).sum())
        trailing = each[:, -16:].sum() / (labels[:, -16:] != -100).sum()
        assert lines[0]["trailing_loss"] == pytest.approx(float(trailing), rel=1e-5)

    @torch.no_grad()
    def first_batch(self, model: Any, given: Any, alone: bool) -> torch.Tensor:
        """Logits of the untrained model on the first batch, or with `alone` on each document by itself."""
        ids = given["input_ids"]
        if not alone:
            return model(ids, attention_mask=given.get("attention_mask")).logits
        assert ids.shape[0] == 1
        begins = (given["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        assert len(begins) > 3
        spans = zip(begins, [*begins[1:], ids.shape[1]], strict=True)
        return torch.cat([model(ids[:, begin:end]).logits for begin, end in spans], dim=1)


def vars_of(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
