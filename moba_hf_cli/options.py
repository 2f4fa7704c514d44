"""Options that several commands share, and the settings that they define."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING, Annotated

import typer

from moba_hf_cli.preset_files import check_preset
from moba_hf_cli.signals import exiting

if TYPE_CHECKING:
    from moba_hf.config import MobaConfig

Preset = Annotated[str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block.")]
Topk = Annotated[
    int | None, typer.Option(help="Blocks per query, including its own; with --tile the maximum.")
]
SinkBlocks = Annotated[
    int | None, typer.Option(help="First blocks that are always attended; they count towards topk.")
]
LocalBlocks = Annotated[
    int | None, typer.Option(help="Blocks before the own block, always attended; they count towards topk.")
]
Gate = Annotated[
    str | None,
    typer.Option(help="How blocks are scored: mean (MoBA) or mass (not MoBA; better without training)."),
]
Tile = Annotated[
    int | None,
    typer.Option(help="Queries that share a choice of blocks (not MoBA; better without training)."),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="With --tile: attend to blocks of at least this fraction of the largest mass."),
]
SampleRows = Annotated[
    int | None, typer.Option("--sample", help="With --tile: use every n-th query to choose for its tile (1).")
]
DenseBelow = Annotated[
    int | None, typer.Option(help="With --tile: queries before this position attend to every key (0).")
]
FullLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative numbers count from the last layer."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# The error message if some of these are missing.
NEEDED = (
    "pass --preset NAME, or both --block-size and --topk, or --tile, --block-size and --threshold for a "
    "choice that queries share"
)

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code from the checkpoint for its tokenizer."),
]


def load_package() -> None:
    """Imports moba_hf, torch and transformers; meanwhile, a signal ends the process immediately."""
    with exiting():
        import moba_hf  # noqa: F401


def load_package_alone() -> None:
    """Makes modules of moba_hf importable without running `moba_hf/__init__`.

    For a command that only reads configs, because registering with transformers takes seconds.
    """
    found = find_spec("moba_hf")
    if "moba_hf" not in sys.modules and found is not None:
        sys.modules["moba_hf"] = module_from_spec(found)


def settings(
    preset: str | None = None,
    full_attention_layers: str | None = None,
    load: Callable[[], None] = load_package,
    **numbers: int | float | str | None,
) -> MobaConfig | None:
    """The settings from the options; None if there are no options.

    Args:
        preset: name of a preset.
        full_attention_layers: comma-separated layer numbers.
        load: imports moba_hf, after the options have been checked.
        numbers: fields of `MobaConfig`; None: not given.

    Raises:
        typer.BadParameter: a preset together with numbers, or missing numbers.
        ValueError: a value is out of range.
    """
    numbers["full_attention_layers"] = _layer_list(full_attention_layers)  # type: ignore[assignment]
    given = {name: value for name, value in numbers.items() if value is not None}
    if preset is not None and given:
        raise typer.BadParameter(f"--preset excludes --{next(iter(given)).replace('_', '-')}")
    if preset is not None:
        check_preset(preset)
    shared = given.get("tile", 1) != 1
    if given and any(name not in given for name in ("block_size", "threshold" if shared else "topk")):
        raise typer.BadParameter(NEEDED)
    if shared:
        given.setdefault("gate", "mass")  # the only gate for tiles
    load()
    from moba_hf.config import MobaConfig

    if preset is not None:
        return MobaConfig.from_preset(preset)
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
    """Silences transformers, and shows its progress bars only on a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def shown(text: object) -> str:
    """Escapes control characters and lone surrogates (from file names) in `text`, for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))
