"""The loss of long rows, computed in pieces so that the logits of a whole row never exist.

For a row of 1,048,576 tokens and a vocabulary of 49,152, fp32 logits would take 206 GB. Here the output
embeddings and the cross entropy run on a few thousand positions at a time; the backward pass recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

PIECE = 8192  # positions whose logits exist at the same time


def loss_in_pieces(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], *, piece: int = PIECE
) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses in nats, fp32, and the number of tokens it covers.

    Args:
        hidden: `(batch, length, width)`, the input of the output embeddings.
        labels: `(batch, length)`, not shifted; -100 means no label.
        head: maps `(positions, width)` to logits `(positions, vocabulary)`.
        piece: number of positions processed at a time.
    """

    def one(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=-100, reduction="sum")

    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    sums = [
        checkpoint(one, *part, use_reentrant=False)
        for part in zip(states.split(piece), targets.split(piece), strict=True)
    ]
    return torch.stack(sums).sum(), (targets != -100).sum()


class LongRowTrainer(Trainer):
    """transformers' Trainer with the loss computed in pieces and, optionally, activations in host memory.

    Args:
        piece: positions whose logits exist at the same time.
        offload: keep tensors saved for the backward pass in pinned host memory. With gradient checkpointing
            these are the inputs of the layers.
    """

    def __init__(self, *args: Any, piece: int = PIECE, offload: bool = False, **kwargs: Any) -> None:
        if piece < 1:
            raise ValueError(f"piece must be at least 1, got {piece}")
        super().__init__(*args, **kwargs)
        self.piece, self.offload = piece, offload

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the labels in `inputs`; with `num_items_in_batch`, their sum divided by that."""
        inputs = dict(inputs)
        labels, kept = inputs.pop("labels"), []
        inner = self.accelerator.unwrap_model(model)
        hook = inner.base_model.register_forward_hook(lambda *given: kept.append(given[2]))
        pinned = inputs["input_ids"].device.type == "cuda"
        saved = torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()
        try:
            with saved:
                outputs = model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        # Trainer wraps only the model's forward in autocast
        with self.accelerator.autocast():
            total, count = loss_in_pieces(
                kept[0].last_hidden_state, labels, inner.get_output_embeddings(), piece=self.piece
            )
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
