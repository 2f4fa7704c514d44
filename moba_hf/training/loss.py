"""The loss of long rows, computed in pieces so that the logits of a whole row never exist.

For a row of 1,048,576 tokens and a vocabulary of 49,152, fp32 logits would take 206 GB. Here the output
embeddings and the cross entropy run on a few thousand positions at a time; the backward pass recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.layer_plan import TRAINED_TAIL, common_tile
from moba_hf.hf.output_head import check_head, check_tokens, inner_model, output_head
from moba_hf.op.numerics import check_int
from moba_hf.training.rows import IGNORED, WEIGHTS, weighted_rows

PIECE = 8192  # positions whose logits exist at the same time


def loss_in_pieces(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    piece: int = PIECE,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses in nats, fp32, and the number of tokens it covers.

    Args:
        hidden: `(batch, length, width)`, the input of the output embeddings.
        labels: `(batch, length)`, not shifted; -100 means no label.
        head: maps `(positions, width)` to logits `(positions, vocabulary)`.
        piece: number of positions processed at a time.
        weights: `(batch, length)`, a factor for the loss of each label. The sum is divided by the
            mean weight of the labels, so that its scale stays the same. None: 1.
    """
    losses, counted = token_losses_in_pieces(hidden, labels, head, piece=piece)
    return weighted_sum(losses, counted, None if weights is None else of_next_tokens(weights))


def of_next_tokens(values: Tensor) -> Tensor:
    """`values (batch, length)` of the token that each position predicts, `(batch * (length - 1),)`."""
    return values[:, 1:].flatten()


def weighted_sum(losses: Tensor, counted: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results of `loss_in_pieces` from those of `token_losses_in_pieces`.

    Args:
        weights: the factor of each loss, of the shape of `losses`; None: 1.
    """
    count = counted.sum()
    if weights is None:
        return losses.sum(), count
    factors = weights.to(losses) * counted
    whole = factors.sum()
    whole = torch.where(whole > 0, whole, 1)  # without labels, the sum is 0
    return (losses * factors).sum() * count / whole, count


def token_losses_in_pieces(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], *, piece: int = PIECE
) -> tuple[Tensor, Tensor]:
    """Losses of the next tokens in nats, fp32 `(batch * (length - 1),)`, and bool: which have a label.

    Losses without a label are 0. The arguments are those of `loss_in_pieces`.
    """

    def one(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=IGNORED, reduction="none")

    states, targets = hidden[:, :-1].flatten(0, 1), of_next_tokens(labels).to(hidden.device)
    losses = [
        checkpoint(one, *part, use_reentrant=False)
        for part in zip(states.split(piece), targets.split(piece), strict=True)
    ]
    return torch.cat(losses), targets != IGNORED


def check_dense_tail(tokens: int, tile: int) -> None:
    """Raises unless `tokens`, the length of a dense tail, is a number of whole tiles of `tile` queries.

    A tail that began inside a tile would leave fewer queries to choose for it than in `moba_hf.prefill`.

    Raises:
        ValueError: negative, or not a multiple of `tile`.
        TypeError: not an int.
    """
    check_int("dense_tail", tokens, minimum=0)
    if tokens % tile:
        raise ValueError(f"dense_tail={tokens} must be a multiple of tile={tile}")


@contextmanager
def dense_tail(model: Any, tokens: int) -> Iterator[None]:
    """Inside the block, the last `tokens` queries of each row attend every key, in every MoBA layer.

    It covers forward passes over rows with one document, all of it if it is not longer than the tail; packed
    rows have no such tail. The backward pass belongs into the block too, because gradient checkpointing
    repeats the forward pass.

    Raises:
        ValueError: `tokens` is not a multiple of the tiles of all layers.
    """
    check_dense_tail(tokens, common_tile(model))
    modules = [module for _, module in find_adapter(model.config.model_type).attention_layers(model)]
    before = [module.__dict__.get(TRAINED_TAIL) for module in modules]
    for module in modules:
        setattr(module, TRAINED_TAIL, tokens)
    try:
        yield
    finally:
        for module, held in zip(modules, before, strict=True):
            if held is None:
                delattr(module, TRAINED_TAIL)
            else:  # the block is inside another one
                setattr(module, TRAINED_TAIL, held)


class LongRowTrainer(Trainer):
    """transformers' Trainer with the loss computed in pieces and, optionally, activations in host memory.

    Rows may have `loss_weights` (see `loss_in_pieces`). Then each line of the log has `marked_loss`, the
    plain mean loss of the tokens whose weight is above 1.

    Args:
        piece: positions whose logits exist at the same time.
        offload: keep tensors saved for the backward pass in pinned host memory. With gradient checkpointing
            these are the inputs of the layers.
        dense_tail: number of queries at the end of each row that attend every key, as the last tokens of a
            prompt do in `moba_hf.prefill`. Packed rows have no such tail. A multiple of the tile if queries
            share a choice.

    Raises:
        ValueError: a number out of range, or an argument of `Trainer` for another loss or for the logits of
            all positions. The first step raises it if the model does more to its last hidden states than its
            output embeddings do (`moba_hf.hf.output_head`), or reads virtual tokens (prompt tuning).
    """

    def __init__(
        self, *args: Any, piece: int = PIECE, offload: bool = False, dense_tail: int = 0, **kwargs: Any
    ) -> None:
        check_int("piece", piece, minimum=1)
        check_int("dense_tail", dense_tail, minimum=0)
        super().__init__(*args, **kwargs)
        if dense_tail:  # MoBA may be turned on later, so every step checks too
            check_dense_tail(dense_tail, common_tile(inner_model(self.model)))
        self._refuse_other_losses()
        self.piece, self.offload, self.dense_tail = piece, offload, dense_tail
        self._head_checked = False  # whether logits are known to be those of the model itself
        self._marked: Tensor | None = None  # sum and number of the marked losses since the last log line

    def _refuse_other_losses(self) -> None:
        """Raises ValueError for arguments that `compute_loss` would ignore."""
        given = {
            "compute_loss_func": self.compute_loss_func is not None,
            "compute_metrics": self.compute_metrics is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
        }
        if named := [name for name, is_given in given.items() if is_given]:
            raise ValueError(
                "LongRowTrainer computes the plain loss of the next tokens and no logits of whole rows, so "
                f"it does not support {', '.join(named)}; leave it out or use transformers.Trainer"
            )

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the weights in rows whose unused columns are removed, because the model has no such input."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if WEIGHTS not in columns:
            columns.append(WEIGHTS)

    def get_train_dataloader(self) -> Any:
        """The dataloader of the training rows, whose weights `compute_loss` applies."""
        _apply_weights(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The dataloader of an evaluation, which has weights like training."""
        _apply_weights(self.eval_dataset, eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """A forward and backward pass with the dense tail."""
        if not self.dense_tail:
            return super().training_step(model, *args, **kwargs)
        with dense_tail(inner_model(model), self.dense_tail):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the labels in `inputs`; with `num_items_in_batch`, their sum divided by that."""
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise ValueError(f"the rows need labels, got only {', '.join(inputs)}")
        labels, weights, kept = inputs.pop("labels"), inputs.pop(WEIGHTS, None), []
        weights = None if weights is None else of_next_tokens(weights)
        inner = inner_model(model)
        hook = inner.base_model.register_forward_hook(lambda *given: kept.append(given[2]))
        pinned = inputs["input_ids"].device.type == "cuda"
        saved = torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()
        try:
            with saved:
                outputs = model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        hidden = kept[0].last_hidden_state
        check_tokens(model, hidden, labels.shape[1])
        # Trainer wraps only the model's forward in autocast
        with self.accelerator.autocast():
            if not self._head_checked:
                check_head(inner, hidden[:, -1], outputs.logits[:, -1])
                self._head_checked = True
            losses, counted = token_losses_in_pieces(hidden, labels, output_head(inner), piece=self.piece)
        total, count = weighted_sum(losses, counted, weights)
        if weights is not None and model.training:  # an evaluation between two log lines has its own loss
            self._mark(losses.detach(), counted & (weights.to(losses) > 1))
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _mark(self, losses: Tensor, marked: Tensor) -> None:
        """Adds the losses of marked tokens to those of the next log line, without waiting for the device."""
        found = torch.stack([(losses * marked).sum(), marked.sum()])
        self._marked = found if self._marked is None else self._marked + found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs `logs`, with `marked_loss` in lines that have a training loss."""
        if "loss" in logs and self._marked is not None:
            total, count = self._marked.tolist()
            self._marked = None
            if count:
                logs = {**logs, "marked_loss": round(total / count, 4)}
        super().log(logs, *args, **kwargs)


def _apply_weights(*datasets: Any) -> None:
    """Tells rows with weights that the loss has them."""
    for rows in weighted_rows(*datasets):
        rows.weights_applied = True
