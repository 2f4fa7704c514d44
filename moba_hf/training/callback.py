"""Training with MoBA: recipes, and the callback that applies them in transformers' Trainer.

    Trainer(model=model, args=args, train_dataset=data, callbacks=[MobaCallback("hybrid-time")]).train()

Nothing else in training (gradients, checkpointing, mixed precision, packing, PEFT, TRL, compile) needs code
of ours: the attention function is differentiable.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.config import NAME, MobaConfig, require_config
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.layer_plan import moba_config
from moba_hf.hf.loading import runs_dense
from moba_hf.hf.output_head import check_layers, inner_model, output_head
from moba_hf.hf.patching import patch_model, suspend_moba
from moba_hf.op.numerics import check_int
from moba_hf.training.loss import token_losses_in_pieces
from moba_hf.training.rows import WEIGHTS, weighted_rows

_ROWS = 512  # rows of logits converted to fp32 at a time

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How MoBA and full attention share a training run (arXiv 2502.13189, section 3.2).

    Attributes:
        full_share: share of the optimizer steps, at the end of training, that run full attention in every
            layer; at least 0 (none) and below 1.
        full_layers: indices of the layers that always run full attention; negative ones count from the last
            layer. None: use the model's settings.

    Raises:
        ValueError: `full_share` out of range.
        TypeError: `full_layers` are not ints.
    """

    full_share: float = 0.0
    full_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.full_share < 1.0:
            raise ValueError(f"full_share must be at least 0 and below 1, got {self.full_share}")
        if self.full_layers is not None:
            if isinstance(self.full_layers, str) or not isinstance(self.full_layers, Iterable):
                raise TypeError(f"full_layers must be a sequence of layer numbers, got {self.full_layers!r}")
            object.__setattr__(self, "full_layers", tuple(self.full_layers))
            for layer in self.full_layers:
                check_int("full_layers", layer, minimum=-sys.maxsize)

    def switch_step(self, max_steps: int) -> int:
        """Number of optimizer steps with MoBA before full attention begins; `max_steps` if it never does.

        The steps with full attention are rounded up, so a share above zero gives at least one.
        """
        full = math.ceil(round(self.full_share * max_steps, 6))  # 0.1 * 30 is 3.0000000000000004
        return max_steps - min(full, max_steps)

    def settings(self, config: MobaConfig) -> MobaConfig:
        """`config` with this recipe's full-attention layers."""
        if self.full_layers is None:
            return config
        return dataclasses.replace(config, full_attention_layers=self.full_layers)


# From the paper: 90 % of the tokens with MoBA, the rest with full attention (3.2); full attention in the
# last three layers (3.3).
RECIPES: dict[str, Recipe] = {
    "moba": Recipe(),
    "hybrid-time": Recipe(full_share=0.1),
    "hybrid-depth": Recipe(full_layers=(-3, -2, -1)),
    "hybrid-time-depth": Recipe(full_share=0.1, full_layers=(-3, -2, -1)),
}


def recipe_of(recipe: Recipe | str) -> Recipe:
    """`recipe`, looked up in `RECIPES` if it is a name. Raises ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
    return RECIPES[recipe]


class MobaCallback(TrainerCallback):
    """Applies a `Recipe` in transformers' Trainer or a subclass of it (TRL's).

    When training starts, the callback turns MoBA on in the model and writes it to the config, so every
    checkpoint has `config.moba` and loads with MoBA. The step number alone decides which attention a step
    runs, so a resumed run switches at the same step as an uninterrupted one. Full attention in the last steps
    changes the loaded model, not its config: after training, the model runs MoBA again, as checkpoints do.
    If training is interrupted, the model stays in its current mode; `suspend_moba(model, False)` turns MoBA
    back on. PEFT saves adapters without a config, so load their base model with MoBA.

    Adds to each training log line, and to `state.log_history`:
        moba_key_budget: the key budget (see `moba_hf.checkpoints.inspection`) at the mean row length since
            the last line; 1 under full attention. Packed documents attend a larger share.
        moba_full: 1.0 for full attention, else 0.0. Like the budget, it describes the last step before the
            line.
        trailing_loss: mean loss in nats over the labelled positions among the last `trailing_tokens` of each
            row, in this process. Evaluations during training log `eval_trailing_loss`. If a fused loss (TRL)
            computes no logits, the callback computes them for these positions. Missing if the model gets no
            labels, or if its logits are not those of its output embeddings (a warning says so).

    Callbacks that come before this one, such as the reporters in `report_to`, see the line without these
    values. To put this callback first, use `trainer.callback_handler.callbacks.insert(0, callback)` instead
    of `callbacks=[callback]`.

    If `Rows` have `loss_weights` and the model computes the loss, which ignores them, the first step raises
    ValueError; `LongRowTrainer` applies them.

    Args:
        recipe: a `Recipe`, or a name from `RECIPES`.
        config: the MoBA settings; None: the model's own, or the preset "default" if it has none.
        trailing_tokens: number of positions at the end of each row that `trailing_loss` covers.
    """

    def __init__(
        self, recipe: Recipe | str = "moba", config: MobaConfig | None = None, *, trailing_tokens: int = 2048
    ) -> None:
        check_int("trailing_tokens", trailing_tokens, minimum=1)
        if config is not None:
            require_config("config", config)
        self.recipe = recipe_of(recipe)
        self.config = config
        self.trailing_tokens = trailing_tokens
        self._model: Any = None
        self._switch = 0
        self._full = False
        self._meters: dict[bool, _Meter] = {}
        self._hooks: list[Any] = []
        self._weighted = False  # whether the rows have weights of the loss
        self._hidden: Tensor | None = None  # for the trailing positions of the current batch

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Turns MoBA on, or full attention if a resumed run is past the switch."""
        self._detach()
        self._weighted = any(True for _ in weighted_rows(getattr(train_dataloader, "dataset", None)))
        self._model = inner_model(model)
        turn_on(self._model, self.recipe, self.config)
        self._switch = self.recipe.switch_step(state.max_steps)
        self._meters = {training: _Meter(self._model.device) for training in (True, False)}
        self._hooks = [self._model.register_forward_hook(self._measure, with_kwargs=True)]
        if self._model.base_model is not self._model:
            self._hooks.append(self._model.base_model.register_forward_hook(self._keep))
        self._follow(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switches before the first step that runs full attention."""
        self._follow(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds this callback's measurements to a log line that has a loss."""
        if not logs or not self._hooks:
            return
        if "loss" in logs:
            found = self._training_values()
        elif name := next((n for n in logs if n.endswith("_loss") and n != "train_loss"), None):
            found = {f"{name.removesuffix('loss')}trailing_loss": self._meters[False].read()[0]}
        else:
            return
        found = {name: value for name, value in found.items() if value is not None}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the model running MoBA, as its checkpoint does."""
        self._detach()

    def _follow(self, step: int) -> None:
        """Selects MoBA before step `self._switch`, full attention from it on."""
        full = step >= self._switch
        if full != self._full:
            logger.info(f"step {step}: {'full attention' if full else 'MoBA'} from here on")
        self._full = full
        suspend_moba(self._model, full)

    def _detach(self) -> None:
        if self._hooks:
            suspend_moba(self._model, False)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hidden, self._full = [], None, False

    def _training_values(self) -> dict[str, float | None]:
        loss, length = self._meters[True].read()
        budget: float | None = None
        if length:
            adapter = find_adapter(self._model.config.model_type)
            text = adapter.text_config(self._model.config)
            settings = moba_config(text)
            if self._full:
                every = tuple(range(adapter.num_layers(text)))
                settings = dataclasses.replace(settings, full_attention_layers=every)
            budget = inspect_config(self._model.config, settings, (length,)).lengths[0].key_budget
        return {"moba_key_budget": budget, "moba_full": float(self._full), "trailing_loss": loss}

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook of the decoder: keeps the hidden states that predict the trailing positions."""
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None and not torch.compiler.is_compiling():
            self._hidden = hidden.detach()[:, -self.trailing_tokens - 1 :]

    def _measure(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: adds a batch to the meter of its mode (training or not) without a device sync."""
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        labels, logits = kwargs.get("labels"), getattr(output, "logits", None)
        hidden, self._hidden = self._hidden, None
        meter = self._meters[module.training]
        if ids is not None:
            meter.add_length(ids.shape[1])
        if labels is None:
            return
        if self._weighted and module.training:  # LongRowTrainer keeps the labels from the model
            raise ValueError(
                f"the rows have {WEIGHTS}, but this trainer lets the model compute its plain loss, which "
                "ignores them: use moba_hf.training.LongRowTrainer, or make Rows with lookup_weight=1"
            )
        if logits is not None and logits.shape[:2] == labels.shape:
            meter.add_loss(*trailing_loss(logits.detach(), labels, self.trailing_tokens))
        elif logits is None and hidden is not None:
            try:
                head = output_head(module)
                check_layers(module)
            except ValueError as error:  # a measurement must not end a run
                logger.warning_once(f"The log lines have no trailing_loss: {error}")
                return
            meter.add_loss(*trailing_loss(hidden, labels[:, -hidden.shape[1] :], self.trailing_tokens, head))


class _Meter:
    """Sums kept on the device: losses, number of labelled tokens, row lengths, number of batches."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float32, device=device)

    def add_length(self, length: int) -> None:
        self.sums[2].add_(length)
        self.sums[3].add_(1)

    def add_loss(self, loss: Tensor, count: Tensor) -> None:
        self.sums[0].add_(loss.to(self.sums.device))
        self.sums[1].add_(count.to(self.sums.device))

    def read(self) -> tuple[float | None, int]:
        """Mean loss (None without tokens) and mean row length (0 without batches) since the last call."""
        loss, tokens, lengths, batches = self.sums.tolist()
        self.sums.zero_()
        return (loss / tokens if tokens else None), (round(lengths / batches) if batches else 0)


@torch.no_grad()
def trailing_loss(
    logits: Tensor, labels: Tensor, count: int, head: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the losses at the last `count` positions of each row in fp32 nats, and how many have labels.

    Args:
        logits: `(batch, length, vocabulary)`; with `head`, its input `(batch, length, width)`.
        labels: `(batch, length)`, not shifted; -100 means no label.
        count: number of positions at the end of each row.
        head: computes logits from hidden states; None: `logits` are logits.
    """
    last = min(count, labels.shape[1] - 1) + 1  # and the position that predicts the first of them
    losses, counted = token_losses_in_pieces(
        logits[:, -last:], labels[:, -last:], head or (lambda given: given), piece=_ROWS
    )
    return losses.sum(), counted.sum()


def turn_on(model: Any, recipe: Recipe, config: MobaConfig | None = None) -> None:
    """Turns MoBA on in `model`, in place, with the settings of `recipe`; saved checkpoints load with MoBA.

    Args:
        config: the MoBA settings; None: the model's own, or the preset "default" if it has none.
    """
    adapter = find_adapter(model.config.model_type)
    text = adapter.text_config(model.config)
    if (running := runs_dense(model)) is not None:
        logger.warning(f"The model has config.moba but ran {running!r}: training turns MoBA on.")
    if config is None:
        modules = [module for _, module in adapter.attention_layers(model)]
        backend = getattr(modules[0], "moba_backend", "auto") if modules else "auto"
        config = dataclasses.replace(moba_config(text), backend=backend)
    patch_model(model, recipe.settings(config))
    # transformers saves this public field and reads it in a plain load; it does not save its private one
    key = adapter.nested_key(model.config)
    model.config.attn_implementation = NAME if key is None else {key: NAME}
