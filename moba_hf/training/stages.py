"""A context extension as data: stages of rising length, each with its attention, its rotary base, its tokens.

    schedule = Schedule((Stage(32768, MobaConfig(128, 8), tokens=13_000_000, theta=1e6), ...))
    model = load_stage(schedule, 0, "out/model")   # fp32 weights, config rewritten, MoBA on
    ...                                            # any Trainer
    save_stage(schedule, 0, model, "out/stage0")   # bf16 weights, and where in the schedule they stand

`examples/extend.py` carries out a whole schedule.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moba_hf.checkpoints.context_length import ContextLength, with_context_length
from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import find_adapter
from moba_hf.op.numerics import check_int
from moba_hf.training.callback import Recipe, turn_on

POSITION = "moba_schedule.json"


@dataclass(frozen=True)
class Stage:
    """One length of a context extension.

    Attributes:
        length: tokens of a row.
        moba: the attention of this stage, with its block size, topk and full layers.
        tokens: tokens to train on; rounded up to whole optimizer steps. 0: only the config changes.
        learning_rate: its peak, after `warmup_steps`; a cosine leads from there to a twentieth of it.
        warmup_steps: optimizer steps in which the learning rate rises.
        rows: rows of an optimizer step.
        rope: how positions reach a length above the model's, see `ContextLength`.
        theta: the new rotary base, with `rope="theta"` only; None: as `ContextLength` chooses it.

    Raises:
        ValueError, TypeError: values out of range or of the wrong type.
    """

    length: int
    moba: MobaConfig
    tokens: int
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    rows: int = 1
    rope: str = "theta"
    theta: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("tokens", 0), ("warmup_steps", 0), ("rows", 1)):
            check_int(name, getattr(self, name), minimum=least)
        if not isinstance(self.moba, MobaConfig):
            raise TypeError(f"moba must be a MobaConfig, got {self.moba!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        ContextLength(self.length, self.rope, self.theta)  # raises

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.tokens // (self.rows * self.length))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values that `from_dict` reads back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "moba": self.moba.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stage:
        """A stage from JSON-like values. Raises ValueError for unknown or missing ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown values of a stage: {', '.join(unknown)}; known are {', '.join(known)}")
        if missing := sorted({"length", "moba", "tokens"} - set(values)):
            raise ValueError(f"a stage needs {', '.join(missing)}")
        return cls(**{**values, "moba": MobaConfig.from_dict(values["moba"])})


@dataclass(frozen=True)
class Schedule:
    """Stages in the order in which they are carried out.

    Raises:
        ValueError: no stage, lengths that do not rise, or block sizes that fall.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("a schedule needs at least one stage")
        for number, (before, stage) in enumerate(itertools.pairwise(self.stages), 1):
            if stage.length <= before.length:
                raise ValueError(
                    f"lengths must rise: stage {number} has {stage.length} tokens after {before.length}"
                )
            if stage.moba.block_size < before.moba.block_size:
                raise ValueError(
                    f"block sizes must not fall: stage {number} has {stage.moba.block_size} after "
                    f"{before.moba.block_size}"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values that `from_dict` reads back."""
        return {"stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """A schedule from JSON-like values. Raises ValueError where they are none."""
        if set(values) != {"stages"} or not isinstance(values["stages"], list):
            raise ValueError("a schedule is an object with one list, 'stages'")
        return cls(tuple(Stage.from_dict(stage) for stage in values["stages"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Reads what `save` wrote. Raises ValueError, which names the file, where it is no schedule."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no schedule ({error})") from error


def load_stage(schedule: Schedule, index: int, source: str | os.PathLike[str]) -> Any:
    """The model that stage `index` trains: weights of `source` in fp32, longer context, MoBA on.

    Args:
        source: the folder that the stage before wrote, or for the first stage the checkpoint to extend.

    Raises:
        ValueError: `source` stands elsewhere in the schedule or in another one, or its context cannot be
            extended as the stage says.
    """
    check_source(schedule, index, source)
    stage = schedule.stages[index]
    config = AutoConfig.from_pretrained(source)
    text = find_adapter(config.model_type).text_config(config)
    if stage.length > text.max_position_embeddings:
        wanted = ContextLength(stage.length, stage.rope, stage.theta, rescale=index > 0)
        changed = with_context_length(text.to_dict(), text, wanted)
        text.rope_parameters = changed["rope_parameters"]
        text.max_position_embeddings = stage.length
    elif stage.theta is not None:
        raise ValueError(
            f"stage {index} has theta={stage.theta}, but the model reads {text.max_position_embeddings} "
            f"tokens already, so that its rotary base stays for {stage.length}"
        )
    text.moba = stage.moba.to_dict()
    model = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=torch.float32, attn_implementation=NAME
    )
    turn_on(model, Recipe(), stage.moba)
    return model


def check_source(schedule: Schedule, index: int, source: str | os.PathLike[str]) -> None:
    """Raises ValueError unless stage `index` may start from the folder `source`."""
    position = Path(source) / POSITION
    if index == 0 and not position.exists():
        return
    if not position.exists():
        raise ValueError(
            f"{source}: holds no {POSITION}: stage {index} starts from what the one before saved"
        )
    known = json.loads(position.read_text(encoding="utf-8"))
    if known["done"] != index or known["schedule"] != schedule.to_dict():
        other = known["schedule"] != schedule.to_dict()
        reason = "is another one" if other else f"stage {index} does not follow"
        raise ValueError(f"{source}: stands after {known['done']} stages of its schedule, which {reason}")


def save_stage(schedule: Schedule, index: int, model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the weights in bf16, the config under old and new names, and the position in the schedule.

    The position is written last: a folder without it is not finished.

    Args:
        model: what `load_stage` gave, trained. Its weights are rounded in place.
    """
    target = Path(folder)
    model.to(torch.bfloat16).save_pretrained(target)
    path = target / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    text = find_adapter(model.config.model_type).text_config(model.config)
    rope = text.rope_parameters
    if text is model.config and "rope_theta" in rope:  # names of earlier releases, which other engines read
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        plain = rope.get("rope_type", "default") == "default" and set(scaling) <= {"rope_type"}
        values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    position = {"done": index + 1, "schedule": schedule.to_dict()}
    (target / POSITION).write_text(json.dumps(position, indent=1) + "\n", encoding="utf-8")


def stages_done(folder: str | os.PathLike[str]) -> int:
    """How many stages the checkpoint in `folder` has behind it."""
    path = Path(folder) / POSITION
    return int(json.loads(path.read_text(encoding="utf-8"))["done"]) if path.exists() else 0
