"""Context extension as a list of stages of rising length, each with its own attention and rotary base.

    schedule = Schedule((Stage(32768, MobaConfig(128, 8), tokens=13_000_000, theta=1e6), ...))
    model = load_stage(schedule, 0, "out/model")   # fp32 weights, config rewritten, MoBA on
    ...                                            # any Trainer
    save_stage(schedule, 0, model, "out/stage0")   # bf16 weights and the position in the schedule

`examples/extend.py` runs a whole schedule.
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
from moba_hf.config import NAME, MobaConfig, require_config
from moba_hf.hf.adapter import find_adapter
from moba_hf.op.numerics import check_int
from moba_hf.training.callback import Recipe, turn_on
from moba_hf.training.loss import check_dense_tail

POSITION = "moba_schedule.json"


@dataclass(frozen=True)
class Stage:
    """One stage of a context extension: training at one length.

    Attributes:
        length: tokens in a row.
        moba: the attention of this stage: block size, topk, full-attention layers and so on.
        tokens: number of training tokens, rounded up to whole optimizer steps. 0: only the config changes.
        learning_rate: the peak learning rate, reached after `warmup_steps`; it then decays along a cosine to
            a twentieth of the peak.
        warmup_steps: number of optimizer steps in which the learning rate rises.
        rows: rows per optimizer step.
        rope: how RoPE is extended if `length` exceeds the model's, see `ContextLength`.
        theta: the new rotary base, only with `rope="theta"`; None: `ContextLength` chooses it.
        dense_tail: number of tokens at the end of each row that attend every key, see `LongRowTrainer`; a
            multiple of the tile, and at most half of `length`.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type.
    """

    length: int
    moba: MobaConfig
    tokens: int
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    rows: int = 1
    rope: str = "theta"
    theta: float | None = None
    dense_tail: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("length", 2),
            ("tokens", 0),
            ("warmup_steps", 0),
            ("rows", 1),
        ):
            check_int(name, getattr(self, name), minimum=least)
        require_config("moba", self.moba)
        if isinstance(self.learning_rate, bool) or not isinstance(self.learning_rate, (int, float)):
            raise TypeError(f"learning_rate must be a number, got {self.learning_rate!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        tiles = [dict(pairs).get("tile", 1) for _, pairs in self.moba.layers]
        check_dense_tail(self.dense_tail, math.lcm(self.moba.tile, *tiles))
        if self.dense_tail > self.length // 2:
            raise ValueError(f"dense_tail={self.dense_tail} must be at most half of length={self.length}")
        ContextLength(self.length, self.rope, self.theta)  # raises

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.tokens // (self.rows * self.length))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values that `from_dict` reads back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "moba": self.moba.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stage:
        """A stage from JSON-like values. Raises ValueError for unknown or missing keys."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys in a stage: {', '.join(unknown)}; known are {', '.join(known)}")
        if missing := sorted({"length", "moba", "tokens"} - set(values)):
            raise ValueError(f"a stage needs {', '.join(missing)}")
        return cls(**{**values, "moba": MobaConfig.from_dict(values["moba"])})


@dataclass(frozen=True)
class Schedule:
    """The stages of a context extension, in order.

    Raises:
        ValueError: no stages, lengths that do not rise, or block sizes that fall.
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
        """A schedule from JSON-like values. Raises ValueError if they do not describe one."""
        if set(values) != {"stages"} or not isinstance(values["stages"], list):
            raise ValueError("a schedule must be an object with exactly one key, 'stages', that holds a list")
        return cls(tuple(Stage.from_dict(stage) for stage in values["stages"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Reads a file written by `save`. Raises a ValueError that names the file if it holds no schedule."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a schedule ({error})") from error


def load_stage(schedule: Schedule, index: int, source: str | os.PathLike[str]) -> Any:
    """The model to train in stage `index`: weights of `source` in fp32, extended context, MoBA on.

    Args:
        source: the folder that the previous stage wrote; for the first stage, the checkpoint to extend.

    Raises:
        ValueError: `source` is at another stage or belongs to another schedule, or its context cannot be
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
            f"stage {index} has theta={stage.theta}, but the model already reads "
            f"{text.max_position_embeddings} tokens, so its rotary base does not change for {stage.length}; "
            f"leave theta out"
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
            f"{source}: no {POSITION} found; stage {index} must start from the folder of the previous stage"
        )
    known = json.loads(position.read_text(encoding="utf-8"))
    if known["done"] != index or known["schedule"] != schedule.to_dict():
        other = known["schedule"] != schedule.to_dict()
        reason = "another schedule" if other else f"this schedule, so stage {index} cannot follow"
        raise ValueError(f"{source}: this checkpoint has completed {known['done']} stages of {reason}")


def save_stage(
    schedule: Schedule, index: int, model: Any, folder: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Writes the weights in bf16, the config with old and new RoPE names, and the position in the schedule.

    The position is written last, so a folder without it is incomplete.

    Args:
        model: the model from `load_stage`, after training. Its weights are rounded to bf16 in place.
        tokenizer: saved with the model, so that the folder can be evaluated; None: no tokenizer.
    """
    target = Path(folder)
    model.to(torch.bfloat16).save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    path = target / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    text = find_adapter(model.config.model_type).text_config(model.config)
    rope = text.rope_parameters
    if text is model.config and "rope_theta" in rope:  # other engines still read the older names
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        plain = rope.get("rope_type", "default") == "default" and set(scaling) <= {"rope_type"}
        values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    position = {"done": index + 1, "schedule": schedule.to_dict()}
    (target / POSITION).write_text(json.dumps(position, indent=1) + "\n", encoding="utf-8")


def stages_done(folder: str | os.PathLike[str]) -> int:
    """Number of stages that the checkpoint in `folder` has completed."""
    path = Path(folder) / POSITION
    return int(json.loads(path.read_text(encoding="utf-8"))["done"]) if path.exists() else 0
