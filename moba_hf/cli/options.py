"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moba_hf.config import MobaConfig

Preset = Annotated[str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a block.")]
Topk = Annotated[int | None, typer.Option(help="Blocks a query attends, its own included.")]
SinkBlocks = Annotated[
    int | None, typer.Option(help="First blocks that are always attended; they count in topk.")
]
LocalBlocks = Annotated[
    int | None, typer.Option(help="Blocks just before one's own, always attended; they count in topk.")
]
Gate = Annotated[
    str | None, typer.Option(help="How blocks are scored: mean (MoBA), or mass (not MoBA; better untrained).")
]
FullLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative ones count from the last."),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings for its tokenizer."),
]


def settings(
    preset: str | None,
    block_size: int | None,
    topk: int | None,
    sink_blocks: int | None,
    local_blocks: int | None,
    gate: str | None,
    full_attention_layers: str | None,
) -> MobaConfig | None:
    """The settings that options give; None: no option is given."""
    from moba_hf.config import MobaConfig

    numbers: dict[str, object] = {
        "block_size": block_size,
        "topk": topk,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "gate": gate,
        "full_attention_layers": _layer_list(full_attention_layers),
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    if preset is not None and given:
        raise typer.BadParameter(f"--preset excludes --{next(iter(given)).replace('_', '-')}")
    if preset is not None:
        return MobaConfig.from_preset(preset)
    if given and (block_size is None or topk is None):
        raise typer.BadParameter("give --preset NAME, or both --block-size and --topk")
    return MobaConfig.from_dict(given) if given else None


def _layer_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"--full-attention-layers takes comma-separated layer numbers, got {text!r}"
        ) from None


def quiet() -> None:
    """Keeps transformers from adding its own lines; progress bars only on a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def shown(text: object) -> str:
    """`text` as a terminal may get it: control characters and half surrogates (of file names) as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))
