"""Stages of a context extension: their data, what loading a stage changes, and the loss in pieces."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Letters
from model_checks import tiny_model
from tiny_models import RULE, Blocks, checkpointed, grads, tiny, tokens
from torch.utils.data import Subset
from transformers import AutoConfig, Trainer, TrainingArguments

from moba_hf import MobaConfig, patch_model
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.evaluate.repositories import load_repositories, save_repositories
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.prefill import attending_everything
from moba_hf.op.dense import dense_tail_attention
from moba_hf.training import (
    LongRowTrainer,
    MobaCallback,
    Recipe,
    Repository,
    Rows,
    Schedule,
    Stage,
    loss_in_pieces,
    read_repository,
)
from moba_hf.training import rows as rows_module
from moba_hf.training.loss import dense_tail
from moba_hf.training.rows import IGNORED
from moba_hf.training.stages import POSITION, load_stage, save_stage

SHARED = MobaConfig(16, gate="mass", tile=16, threshold=0.01)
TWO = Schedule(
    (
        Stage(1024, MobaConfig(8, 4), tokens=3000, theta=4e4),
        Stage(2048, MobaConfig(16, 4, full_attention_layers=(-1,)), 4096, rope="linear", dense_tail=128),
    )
)


def test_json_round_trip(tmp_path: Path) -> None:
    TWO.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == TWO
    assert TWO.stages[0].steps == 3  # 3,000 tokens reach into a third row
    (tmp_path / "broken.json").write_text('{"stages": [{"length": 8}]}')
    with pytest.raises(ValueError, match=r"broken.json: not a schedule \(a stage needs moba, tokens"):
        Schedule.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"tokens": -1}, "tokens must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"rope": "none"}, "rope must be one of"),
        ({"dense_tail": 33}, "dense_tail=33 must be at most half of length=64"),
        ({"dense_tail": 24, "moba": SHARED}, "dense_tail=24 must be a multiple of tile=16"),
        (
            {"dense_tail": 16, "moba": replace(SHARED, layers={0: {"tile": 32}})},
            "dense_tail=16 must be a multiple of tile=32",
        ),
        ({"rope": "yarn", "theta": 1e6}, "theta=1000000.0 needs rope="),
    ],
)
def test_a_bad_stage_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**{"length": 64, "moba": MobaConfig(8, 2), "tokens": 64, **changes})


def test_a_bad_schedule_is_refused() -> None:
    short, long = TWO.stages
    with pytest.raises(ValueError, match="lengths must rise: stage 1 has 1024 tokens after 2048"):
        Schedule((long, short))
    with pytest.raises(ValueError, match="block sizes must not fall: stage 1 has 4 after 8"):
        Schedule((short, Stage(4096, MobaConfig(4, 4), tokens=1)))
    with pytest.raises(ValueError, match="at least one stage"):
        Schedule(())


def test_a_stage_changes_the_config_and_no_weight(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = load_stage(TWO, 0, tmp_path / "source")
    assert first.config.max_position_embeddings == 1024
    assert first.config.rope_parameters["rope_theta"] == 4e4
    assert first.config.moba == TWO.stages[0].moba.to_dict()
    assert all(x.dtype == torch.float32 for x in first.parameters())
    save_stage(TWO, 0, first, tmp_path / "stage0")
    second = load_stage(TWO, 1, tmp_path / "stage0")
    assert second.config.rope_parameters == {"rope_type": "linear", "rope_theta": 4e4, "factor": 2.0}
    save_stage(TWO, 1, second, tmp_path / "stage1")
    stored = json.loads((tmp_path / "stage1" / "config.json").read_text())
    assert (stored["rope_theta"], stored["rope_scaling"]) == (4e4, {"rope_type": "linear", "factor": 2.0})
    again = AutoConfig.from_pretrained(tmp_path / "stage1")
    assert again.rope_parameters == second.config.rope_parameters
    assert again.max_position_embeddings == 2048
    assert again.moba["full_attention_layers"] == [-1]
    assert json.loads((tmp_path / "stage1" / POSITION).read_text())["done"] == 2
    for name, x in second.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


def test_a_folder_of_another_stage_or_schedule_is_refused(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"no moba_schedule\.json found; stage 1 must start"):
        load_stage(TWO, 1, tmp_path / "source")
    save_stage(TWO, 1, model, tmp_path / "done")
    with pytest.raises(ValueError, match="has completed 2 stages of this schedule, so stage 1 cannot follow"):
        load_stage(TWO, 1, tmp_path / "done")
    other = Schedule(TWO.stages[:1])
    save_stage(other, 0, model, tmp_path / "other")
    with pytest.raises(ValueError, match="stages of another schedule"):
        load_stage(TWO, 1, tmp_path / "other")
    tight = Schedule((Stage(256, MobaConfig(8, 2), tokens=1, theta=2e4),))
    with pytest.raises(ValueError, match="the model already reads 512 tokens"):
        load_stage(tight, 0, tmp_path / "source")


def test_loss_in_pieces_is_the_loss() -> None:
    model = tiny()
    ids = tokens(2, 60)
    labels = ids.clone()
    labels[:, 10:20] = IGNORED
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.base_model(input_ids=ids).last_hidden_state
    total, count = loss_in_pieces(hidden, labels, model.get_output_embeddings(), piece=7)
    assert int(count) == 2 * 49
    torch.testing.assert_close(total / count, expected)
    (total / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)


@pytest.mark.parametrize("offload", [False, True])
def test_the_trainer_takes_the_same_step(offload: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(48, seed=i), "labels": tokens(48, seed=i)} for i in range(4)]

    def after(kind: Any, **given: Any) -> dict[str, torch.Tensor]:
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2, seed=3,
            per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        model = tiny()
        kind(model=model, args=settings, train_dataset=rows, **given).train()
        return model.state_dict()

    plain, pieces = after(Trainer), after(LongRowTrainer, piece=10, offload=offload)
    for name, x in plain.items():
        torch.testing.assert_close(pieces[name], x, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_the_dense_tail(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def given(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()

    q, k, v = given(1, 9, 96, 64), given(1, 3, 700, 64), given(1, 3, 700, 64)
    keys, values = (x.detach().float().repeat_interleave(3, 1).requires_grad_() for x in (k, v))
    query = q.detach().float().requires_grad_()
    scores = (query @ keys.transpose(2, 3)).div(8).masked_fill(_later(96, 700), -torch.inf)
    expected = (scores.softmax(3) @ values).transpose(1, 2)
    out = dense_tail_attention(q, k, v, 0.125)
    up = given(*out.shape).detach()
    wanted = list(torch.autograd.grad(expected, (query, keys, values), up.float()))
    wanted[1:] = [x.unflatten(1, (3, 3)).sum(2) for x in wanted[1:]]
    got = torch.autograd.grad(out, (q, k, v), up)
    for one, other in zip((out, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)


def _later(queries: int, keys: int) -> torch.Tensor:
    return ~torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)


def repository(size: int, seed: int, files: tuple[int, ...] = (0,)) -> Repository:
    return Repository(f"r{seed}", tokens(size, seed=seed).numpy().astype(np.uint16), np.array(files))


def test_rows_are_whole_bounded_and_repeatable() -> None:
    repositories = [repository(500, 1, (0, 100, 300)), repository(40, 2)]
    rows = Rows(repositories, 128, 20, seed=5, short_share=0.5, short_length=30)
    again = Rows(repositories, 128, 20, seed=5, short_share=0.5, short_length=30)
    short = 0
    for i in range(len(rows)):
        row = rows[i]
        assert all(torch.equal(row[name], again[i][name]) for name in row)
        assert {name: len(x) for name, x in row.items()} == dict.fromkeys(row, 128)
        starts = torch.nonzero(row["position_ids"] == 0).flatten().tolist()
        assert starts[0] == 0
        assert (row["labels"][starts] == IGNORED).all()
        kept = torch.ones(128, dtype=torch.bool)
        kept[starts] = False
        assert torch.equal(row["labels"][kept], row["input_ids"][kept])
        sizes = np.diff([*starts, 128])
        short += max(sizes) <= 30
        for begin, size in zip(starts, sizes.tolist(), strict=True):
            piece = row["input_ids"][begin : begin + size].numpy()
            assert any(
                np.array_equal(one.ids[f : f + size], piece) for one in repositories for f in one.files
            )  # begins at the start of a file
    assert 4 <= short <= 16


def test_repositories_on_disk(tmp_path: Path) -> None:
    saved = [repository(50, 1, (0, 20)), repository(30, 2)]
    save_repositories(tmp_path / "x.npz", saved)
    for one, other in zip(load_repositories(tmp_path / "x.npz"), saved, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.files, other.files)


def test_files_come_after_what_they_import(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("from package.inner import c\nfrom . import b\n")
    (package / "b.py").write_text("import package.a\nx = 1\n")  # a cycle
    (package / "inner" / "c.py").write_text("y = 2\n")
    (package / "inner" / "broken.py").write_text("def (")
    read = read_repository(package, Letters())
    text = bytes(read.ids.tolist()).decode()
    order = [line[2:] for line in text.splitlines() if line.startswith("# package")]
    assert order == [f"package/{x}.py" for x in ("inner/c", "b", "a", "inner/broken")]
    assert [text[i:].splitlines()[0] for i in read.files] == [f"# {x}" for x in order]
    with pytest.raises(ValueError, match=r"found no file that ends in \.rs"):
        read_repository(package, Letters(), ".rs")


def lookup_rows(**given: Any) -> Rows:
    text = np.frombuffer(b"value = 1\n" * 400, np.uint8).astype(np.int32)
    given = {"short_share": 0, "lookups": 8, "tokenizer": Letters(), **given}
    return Rows([Repository("r", text, np.array([0]))], 2048, 4, **given)


def test_rows_end_and_sizes_are_checked() -> None:
    rows = lookup_rows()
    assert len(list(rows)) == 4  # iteration asks for rows until there is none
    assert all(torch.equal(rows[-1][name], rows[3][name]) for name in rows[3])
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"there are 4 rows, so no row {index}"):
            rows[index]
    with pytest.raises(ValueError, match="short_length must be at least 1, got 0"):
        lookup_rows(short_length=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(full_layers="-1"), "full_layers must be a sequence of layer numbers, got '-1'"),
        (lambda: Recipe(full_layers=-1), "full_layers must be a sequence of layer numbers, got -1"),
        (lambda: Recipe(full_layers=(1.5,)), r"full_layers must be an int, got 1\.5"),
        (lambda: MobaCallback(trailing_tokens=2.5), r"trailing_tokens must be an int, got 2\.5"),
        (
            lambda: MobaCallback(config={"topk": 2}),
            r"must be a MobaConfig, got \{'topk': 2\}; MobaConfig\.from_dict",
        ),
        (lambda: Stage(64, "fine", 1), r"moba must be a MobaConfig, got 'fine'; MobaConfig\.from_preset"),
        (lambda: Stage(64, MobaConfig(8, 2), 1, learning_rate="1e-3"), "learning_rate must be a number"),
    ],
)
def test_values_of_another_type_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_repositories_of_one_name_are_not_saved(tmp_path: Path) -> None:
    one = Repository("src", np.arange(5), np.array([0]))
    with pytest.raises(ValueError, match="two repositories are named 'src'; give one of them another name"):
        save_repositories(tmp_path / "a.npz", [one, one])


@pytest.mark.parametrize("tail", [0, 512])
def test_rows_with_lookups(tail: int) -> None:
    rows = lookup_rows(tail=tail, lookup_weight=4.0)
    for i in range(4):
        row = rows[i]
        assert {name: len(x) for name, x in row.items()} == dict.fromkeys(row, 2048)
        written = bytes(row["input_ids"].tolist()).decode()
        labelled = bytes(x if x != IGNORED else 0 for x in row["labels"].tolist()).decode(errors="replace")
        lines = [x for x in dict.fromkeys(written.splitlines()) if "_" in x]
        assert len(lines) == 8
        late, weights = 0, torch.ones(2048)
        for line in lines:
            first, second = written.index(line), written.rindex(line)
            assert first < second
            assert labelled[first : first + len(line)] == "\0" * len(line)  # unpredictable
            answer = re.search(r'(?<=[="(]).*', line).start()  # type: ignore[union-attr]
            answer += line[answer - 1] == "=" and line[answer : answer + 2] == ' "' and 2
            assert labelled[second : second + len(line)] == "\0" * answer + line[answer:]
            weights[second + answer : second + len(line)] = 4
            late += second >= 2048 - tail
        assert torch.equal(row["loss_weights"], weights)
        assert late >= 3 if tail else late == 0


def test_lookups_are_near_and_far() -> None:
    distances = []
    for row in (lookup_rows(lookups=16)[i] for i in range(4)):
        written = bytes(row["input_ids"].tolist()).decode()
        lines = {x for x in written.splitlines() if "_" in x}
        distances += [written.rindex(x) - written.index(x) for x in lines]
    assert sum(x < 256 for x in distances) > len(distances) / 4
    assert sum(x > 512 for x in distances) > len(distances) / 8


def test_a_row_with_a_tail_is_one_document() -> None:
    short = Repository("s", np.frombuffer(b"other = 2\n" * 90, np.uint8).astype(np.int32), np.array([0]))
    rows = Rows([short], 2048, 2, short_share=0, lookups=8, tail=512, tokenizer=Letters())
    assert torch.equal(rows[0]["position_ids"], torch.arange(2048))
    assert "loss_weights" not in rows[0]
    with pytest.raises(ValueError, match="tail must be from 0 to half of a row of 2048 tokens, got 1025"):
        lookup_rows(tail=1025)
    with pytest.raises(ValueError, match=r"lookup_weight must be at least 1, got 0\.5"):
        lookup_rows(lookup_weight=0.5)


@pytest.mark.parametrize("remove_unused", [False, True])
def test_weights_of_the_loss(remove_unused: bool, tmp_path: Path) -> None:
    model, ids = tiny(), tokens(2, 60)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    weights = torch.ones(2, 60)
    weights[:, 30:34] = 5.0
    labels = ids.clone()
    labels[:, 32] = IGNORED
    total, count = loss_in_pieces(hidden, labels, model.get_output_embeddings(), piece=7, weights=weights)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    factors = weights[:, 1:].flatten() * (labels[:, 1:].flatten() != IGNORED)
    assert int(count) == 116
    torch.testing.assert_close(total / count, (losses * factors).sum() / factors.sum())
    rows = [{"input_ids": ids[0], "labels": labels[0], "loss_weights": weights[0]}] * 2
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=1, learning_rate=1e-9,
        remove_unused_columns=remove_unused,
    )  # fmt: skip
    trainer = LongRowTrainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    weighted = (losses * factors)[:59].sum() / factors[:59].sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(weighted.detach()), abs=1e-3)
    marked = losses[:59][factors[:59] > 1].mean()
    assert trainer.state.log_history[0]["marked_loss"] == pytest.approx(float(marked.detach()), abs=1e-3)


@pytest.mark.parametrize("remove_unused", [False, True])
def test_a_trainer_that_ignores_the_weights_is_refused(remove_unused: bool, tmp_path: Path) -> None:
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=1, remove_unused_columns=remove_unused,
    )  # fmt: skip
    text = [Repository("r", tokens(300).numpy().astype(np.uint16), np.arange(0, 300, 50))]

    def train(trainer_class: Any, weight: float) -> int:
        rows, callback = Rows(text, 60, 2, lookup_weight=weight), MobaCallback()
        trainer = trainer_class(model=tiny(), args=settings, train_dataset=rows, callbacks=[callback])
        trainer.train()
        return int(trainer.state.global_step)

    with pytest.raises(ValueError, match=r"the rows have loss_weights, but this trainer .*LongRowTrainer"):
        train(Trainer, 5.0)
    assert train(Trainer, 1.0) == train(LongRowTrainer, 5.0) == 1


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Subset(rows, [0, 1])], ids=["all", "part"])
def test_weights_that_a_trainer_without_the_callback_drops_are_reported(
    wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=1,
    )  # fmt: skip
    text = [Repository("r", tokens(300).numpy().astype(np.uint16), np.arange(0, 300, 50))]
    warnings: list[str] = []
    monkeypatch.setattr(rows_module.logger, "warning_once", warnings.append)

    def warned(trainer_class: Any, weight: float) -> bool:
        warnings.clear()
        rows = wrap(Rows(text, 60, 2, lookup_weight=weight))
        trainer = trainer_class(model=model, args=settings, train_dataset=rows)
        next(iter(trainer.get_train_dataloader()))
        return any("loss_weights" in warning for warning in warnings)

    model = tiny()
    assert warned(Trainer, 5.0)
    assert not warned(Trainer, 1.0)
    assert not warned(LongRowTrainer, 5.0)
    trainer = LongRowTrainer(model=model, args=settings, train_dataset=Blocks(2, 60))
    next(iter(trainer.get_eval_dataloader(wrap(Rows(text, 60, 2, lookup_weight=5.0)))))
    trainer.train_dataset = wrap(Rows(text, 60, 2, lookup_weight=5.0))
    next(iter(trainer.get_train_dataloader()))
    assert not warnings


def loss_of(trainer_class: Any, model: Any, tmp_path: Path) -> float:
    """The loss of the first training step."""
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=settings, train_dataset=Blocks(2, 60))
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def test_the_loss_of_a_model_that_caps_its_logits(tmp_path: Path) -> None:
    config = {"final_logit_softcapping": 0.5, "layer_types": ["full_attention"] * 2}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 512}
    model = tiny_model("gemma3_text", RULE, **sizes, **config)
    ids = tokens(1, 60)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    assert logits.abs().max() <= 0.5
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    torch.testing.assert_close(token_losses(model, ids, RULE), expected)
    losses = [loss_of(kind, deepcopy(model), tmp_path) for kind in (Trainer, LongRowTrainer)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"changes its logits by logits_scaling=8\.0"):
        token_losses(model, ids, RULE)


def test_a_row_without_labels_adds_no_weighted_loss() -> None:
    model, ids = tiny(), tokens(2, 60)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    labels, head = torch.full_like(ids, IGNORED), model.get_output_embeddings()
    total, count = loss_in_pieces(hidden, labels, head, weights=torch.full((2, 60), 4.0))
    total.backward()
    assert (total.item(), int(count)) == (0, 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_dense_tail_in_training(recompute: bool, tmp_path: Path) -> None:
    """The gradients are those of one pass by the rule and one over its cache that attends every key."""
    from transformers import DynamicCache

    ids, tail = tokens(1, 96), 24
    model = tiny()
    cache = DynamicCache(config=model.config)
    given = cache_kwargs(model.base_model, cache)
    begun = model.base_model(input_ids=ids[:, :-tail], **given)
    with attending_everything(model):
        ended = model.base_model(input_ids=ids[:, -tail:], **given)
    hidden = torch.cat([begun.last_hidden_state, ended.last_hidden_state], dim=1)
    total, count = loss_in_pieces(hidden, ids, model.get_output_embeddings())
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = LongRowTrainer(model=model, args=settings, train_dataset=[{}], dense_tail=tail)
    if recompute:
        checkpointed(model, reentrant=False)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, (total / count).detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    assert not any(hasattr(module, "moba_trained_tail") for module in model.modules())


def test_a_tail_of_parts_of_tiles_is_refused(tmp_path: Path) -> None:
    """When the trainer is made if its model uses MoBA by then, else in the first step."""
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)

    def trainer(model: Any, tail: int) -> LongRowTrainer:
        return LongRowTrainer(model=model, args=settings, train_dataset=[{}], dense_tail=tail)

    with pytest.raises(ValueError, match="dense_tail=24 must be a multiple of tile=16"):
        trainer(tiny(SHARED), 24)
    trainer(tiny(SHARED), 32)
    model, ids = tiny(rule=None, attention="sdpa"), tokens(1, 96)
    late = trainer(model, 24)
    patch_model(model, SHARED)
    with pytest.raises(ValueError, match="dense_tail=24 must be a multiple of tile=16"):
        late.training_step(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("length", [64, 96])
def test_rows_within_the_tail_attend_every_key(length: int) -> None:
    model, ids = tiny(), tokens(1, length)
    by_rule = model(input_ids=ids, use_cache=False).logits
    with attending_everything(model):
        expected = model(input_ids=ids, use_cache=False).logits
    with dense_tail(model, 96):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert not torch.allclose(by_rule, expected, atol=1e-3)


def test_a_dense_tail_in_a_compiled_model() -> None:
    """One graph with the gradients of the model itself, and another one without the tail."""
    ids, found = tokens(1, 96), []
    for compiled in (False, True):
        model = tiny()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with dense_tail(model, 24):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        gradients = grads(model)
        with torch.no_grad():
            after = run(input_ids=ids, labels=ids, use_cache=False).loss
        assert abs(after - loss) > 1e-3
        found.append((loss.detach(), after, gradients))
    torch.testing.assert_close(found[1], found[0])


def test_tails_may_be_nested() -> None:
    model, ids = tiny(), tokens(1, 96)
    before = model(input_ids=ids, use_cache=False).logits
    with dense_tail(model, 32):
        outer = model(input_ids=ids, use_cache=False).logits
        with dense_tail(model, 16):
            inner = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, outer)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert not torch.equal(outer, inner)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "label_smoothing_factor"])
def test_refuses_what_the_loss_in_pieces_would_ignore(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"label_smoothing_factor": 0.1} if name == "label_smoothing_factor" else {}
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **more)
    given: dict[str, Any] = {} if more else {name: lambda *args, **kwargs: None}
    with pytest.raises(ValueError, match=f"does not support {name}; leave it out"):
        LongRowTrainer(model=tiny(), args=settings, train_dataset=[{}], **given)


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = LongRowTrainer(model=tiny(), args=settings, train_dataset=[{}])
    with pytest.raises(ValueError, match="the rows need labels, got only input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": tokens(1, 60)})


def test_an_evaluation_does_not_count_towards_the_marked_loss(tmp_path: Path) -> None:
    ids = tokens(2, 60)
    rows = [{"input_ids": x, "labels": x, "loss_weights": torch.full((60,), 4.0)} for x in ids]
    settings = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    trainer = LongRowTrainer(model=tiny(), args=settings, train_dataset=rows[:1], eval_dataset=rows[1:])
    trainer.evaluate()
    trainer.log({"loss": 1.0})
    assert "marked_loss" not in trainer.state.log_history[-1]
