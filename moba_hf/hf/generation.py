"""Long prompts on the command line: load, read in chunks, stream, compare with dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer, TextStreamer

from moba_hf.checkpoints.load import load_checkpoint
from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.cache import MobaCache
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.patching import patch_model, unpatch_model
from moba_hf.hf.prefill import DENSE_TAIL, prefill
from moba_hf.op.inputs import require_tensor

CHUNK = 2048


@dataclass(frozen=True)
class Generated:
    """One generation.

    Attributes:
        tokens: the new token ids.
        prefill_seconds: time to read the prompt except for its last token.
        decode_seconds: time from then to the last new token.
    """

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the prefill."""
        return len(self.tokens) / max(self.decode_seconds, 1e-9)

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """JSON-ready values, with the text as decoded by `tokenizer`."""
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return {"text": text, **asdict(self), "tokens_per_second": self.tokens_per_second}


def read_prompt(file: str | Path | None, text: str | None) -> str:
    """The contents of `file`, then `text` as a new paragraph; either may be None.

    Raises:
        ValueError: both are None, the file cannot be read as UTF-8, or the result is blank.
    """
    parts = []
    if file is not None:
        if Path(file).is_char_device() and Path(file).resolve().parent == Path("/dev"):
            raise ValueError(f"{file}: is a device, which may never end; pass a file or a pipe")
        try:
            parts.append(Path(file).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    if text is not None:
        parts.append(text)
    prompt = "\n\n".join(parts)
    if not prompt.strip():
        raise ValueError("the prompt is empty: pass --prompt-file, --prompt or both")
    return prompt


def load(
    source: str | Path,
    dtype: str = "auto",
    moba: MobaConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads a checkpoint on all GPUs or ranks, turns MoBA on, and returns the model and its tokenizer.

    Args:
        source: a checkpoint, converted or not; see `load_checkpoint`, also for the other arguments.
        moba: the settings; None: those of the checkpoint, else the preset "default".

    Raises:
        ValueError: as `load_checkpoint`, or MoBA does not support the architecture.
    """
    model, tokenizer = load_checkpoint(source, dtype, trust_remote_code=trust_remote_code, spread=True)
    return patch_model(model, moba), tokenizer


def encode(model: Any, tokenizer: Any, text: str, *, chat: bool = False) -> Tensor:
    """Token ids `(1, length)` of `text`.

    Args:
        text: if it begins with the tokenizer's beginning-of-sequence token, no second one is added.
        chat: `text` is a question for the tokenizer's chat template.

    Raises:
        ValueError: there are no tokens or no chat template, or the model has no embedding for a token id
            (the tokenizer belongs to another model).
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template, so omit --chat (chat=True)")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    begins = chat or bool(tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not begins).input_ids
    if ids.numel() == 0:
        raise ValueError("the tokenizer returns no tokens for this prompt")
    size = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise ValueError(
            f"the tokenizer returned token id {int(ids.max())}, but the model's vocabulary has {size} tokens"
        )
    return ids.long()


def text_streamer(tokenizer: Any) -> BaseStreamer:
    """A streamer that prints new tokens to stdout as they are generated."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@torch.no_grad()
def generate(
    model: Any,
    ids: Tensor,
    max_new_tokens: int,
    *,
    chunk: int = CHUNK,
    dense_tail: int = DENSE_TAIL,
    streamer: BaseStreamer | None = None,
    on_prefill: Callable[[int], None] | None = None,
) -> Generated:
    """Greedy continuation of one prompt, which is read in chunks into a `MobaCache`.

    Args:
        model: a loaded model, with or without MoBA.
        ids: `(1, length)` token ids.
        max_new_tokens: limit; generation stops earlier at an end-of-sequence token.
        chunk: number of prompt tokens read at a time, which bounds memory; see `prefill`.
        dense_tail: number of tokens at the end of the prompt that attend to every key; see `prefill`.
        streamer: receives the tokens as they are generated.
        on_prefill: called after each chunk with its number of tokens.

    Raises:
        ValueError: the prompt is empty, or `max_new_tokens` or `chunk` is too small (see `prefill`).
        TypeError: `ids` is not a tensor.
    """
    require_tensor("ids", ids)
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"ids must be (1, length) and not empty, got {tuple(ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = ids.to(model.device)
    length = ids.shape[1]
    cache = MobaCache(model.config, max_cache_len=length + max_new_tokens)

    def read(count: int) -> None:
        if on_prefill is not None:
            _wait(model)
            on_prefill(count)

    start = time.perf_counter()
    prefill(model, ids, chunk, cache=cache, progress=False, on_chunk=read, dense_tail=dense_tail)
    _wait(model)
    middle = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_kwargs(model.generate, cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    _wait(model)
    return Generated(out[0, length:].tolist(), middle - start, time.perf_counter() - middle)


def generate_dense(model: Any, ids: Tensor, max_new_tokens: int, **kwargs: Any) -> Generated:
    """`generate` with the stock attention; the model must use MoBA, which is on again afterwards."""
    text_config = find_adapter(model.config.model_type).text_config(model.config)
    if text_config._attn_implementation != NAME:
        raise ValueError("the model does not use MoBA")
    moba = MobaConfig.from_dict(text_config.moba)
    unpatch_model(model)
    try:
        return generate(model, ids, max_new_tokens, **kwargs)
    finally:
        patch_model(model, moba)


def common_tokens(first: list[int], second: list[int]) -> int:
    """Length of the common prefix of two continuations."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def summary(run: Generated, prompt_tokens: int) -> str:
    """One line about a generation."""
    return (
        f"prompt of {prompt_tokens:,} tokens read in {run.prefill_seconds:.2f} s; "
        f"{len(run.tokens)} new tokens, {run.tokens_per_second:.1f} per second"
    )


def compare_table(moba: Generated, dense: Generated, prompt_tokens: int) -> str:
    """A text table of two generations, and where they diverge."""
    lines = [f"{'':<10}{'prefill s':>10}{'tokens/s':>10}{'new tokens':>12}"]
    lines += [
        f"{name:<10}{run.prefill_seconds:>10.2f}{run.tokens_per_second:>10.1f}{len(run.tokens):>12}"
        for name, run in (("MoBA", moba), ("dense", dense))
    ]
    same = common_tokens(moba.tokens, dense.tokens)
    if moba.tokens == dense.tokens:
        lines.append(f"prompt of {prompt_tokens:,} tokens; the continuations are the same ({same} tokens)")
    else:
        lines.append(f"prompt of {prompt_tokens:,} tokens; the continuations diverge after {same} tokens")
    return "\n".join(lines)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
