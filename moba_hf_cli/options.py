"""Options that several commands share, and the settings that they define."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec, module_from_spec
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from moba_hf_cli.preset_files import check_preset
from moba_hf_cli.signals import exiting

if TYPE_CHECKING:
    from moba_hf.config import MobaConfig

Gate = Annotated[
    str | None,
    typer.Option(help="How blocks are scored: mean (as in the paper) or mass (for untrained models)."),
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


@dataclass(frozen=True)
class Settings:
    """The options for the settings of MoBA; None: not given. `takes_settings` adds them to a command."""

    preset: Annotated[str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens per block.")] = None
    topk: Annotated[
        int | None, typer.Option(help="Blocks per query, including its own; with --tile the maximum.")
    ] = None
    tile: Annotated[
        int | None,
        typer.Option(help="Neighbouring queries that share a choice of blocks (not the paper's MoBA)."),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(help="With --tile: attend to blocks of at least this fraction of the largest mass."),
    ] = None
    sample: Annotated[
        int | None, typer.Option(help="With --tile: use every n-th query to choose for its tile (1).")
    ] = None
    dense_below: Annotated[
        int | None, typer.Option(help="With --tile: queries before this position attend to every key (0).")
    ] = None
    sink_blocks: Annotated[
        int | None, typer.Option(help="First blocks that are always attended; they count towards topk.")
    ] = None
    local_blocks: Annotated[
        int | None,
        typer.Option(help="Blocks before the own block, always attended; they count towards topk."),
    ] = None
    gate: Gate = None
    full_attention_layers: Annotated[
        str | None,
        typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative numbers count from the last layer."),
    ] = None

    def config(self, load: Callable[[], None] = load_package) -> MobaConfig | None:
        """The config from the options; None if there are no options.

        Args:
            load: imports moba_hf, after the options have been checked.

        Raises:
            typer.BadParameter: a preset together with other settings, or missing settings.
            ValueError: a value is out of range.
        """
        numbers = {**vars(self), "full_attention_layers": _layer_list(self.full_attention_layers)}
        preset = numbers.pop("preset")
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


def takes_settings(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the fields of `Settings`, except `left_out`, as options in place of the argument `given`."""
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in get_type_hints(Settings, include_extras=True).items()
        if name not in left_out
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            own = parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters += options if name == "given" else [own]

        @wraps(command)
        def run(**values: Any) -> None:
            given = Settings(**{option.name: values.pop(option.name) for option in options})
            command(given=given, **values)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


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
