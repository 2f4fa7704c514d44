"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moba_hf.config import MobaConfig

Preset = Annotated[str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a block.")]
Topk = Annotated[
    int | None, typer.Option(help="Blocks a query attends, its own included; with --tile the most.")
]
SinkBlocks = Annotated[
    int | None, typer.Option(help="First blocks that are always attended; they count in topk.")
]
LocalBlocks = Annotated[
    int | None, typer.Option(help="Blocks just before one's own, always attended; they count in topk.")
]
Gate = Annotated[
    str | None, typer.Option(help="How blocks are scored: mean (MoBA), or mass (not MoBA; better untrained).")
]
Tile = Annotated[
    int | None, typer.Option(help="Queries that share a choice of blocks (not MoBA; better untrained).")
]
Threshold = Annotated[
    float | None, typer.Option(help="With --tile: take blocks of at least so many times the largest mass.")
]
SampleRows = Annotated[
    int | None, typer.Option("--sample", help="With --tile: one query in so many chooses for its tile (1).")
]
DenseBelow = Annotated[
    int | None, typer.Option(help="With --tile: queries before this position attend every key (0).")
]
FullLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative ones count from the last."),
]

# What a user is told who gave too few of them.
NEEDED = (
    "give --preset NAME, or both --block-size and --topk, or --tile, --block-size and --threshold for a "
    "choice that queries share"
)

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings for its tokenizer."),
]


def settings(
    preset: str | None = None, full_attention_layers: str | None = None, **numbers: int | float | str | None
) -> MobaConfig | None:
    """The settings that options give; None: no option is given.

    Args:
        numbers: fields of `MobaConfig`; None: not given.

    Raises:
        typer.BadParameter: a preset beside numbers, or too few of them. ValueError: values out of range.
    """
    from moba_hf.config import MobaConfig

    numbers["full_attention_layers"] = _layer_list(full_attention_layers)  # type: ignore[assignment]
    given = {name: value for name, value in numbers.items() if value is not None}
    if preset is not None and given:
        raise typer.BadParameter(f"--preset excludes --{next(iter(given)).replace('_', '-')}")
    if preset is not None:
        return MobaConfig.from_preset(preset)
    if not given:
        return None
    shared = given.get("tile", 1) != 1
    if any(name not in given for name in ("block_size", "threshold" if shared else "topk")):
        raise typer.BadParameter(NEEDED)
    if shared:
        given.setdefault("gate", "mass")  # the only one there
    return MobaConfig.from_dict(given)


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
