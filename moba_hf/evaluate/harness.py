"""Runs the installed lm-evaluation-harness with "moba" registered as an attention implementation."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run_lm_eval(args: Sequence[str]) -> None:
    """Runs the harness's command line with `args`, such as `--model hf --tasks NAME`.

    Raises:
        ImportError: the harness is not installed.
    """
    import moba_hf  # noqa: F401  registers "moba"

    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError('lm-evaluation-harness is missing: pip install "moba-hf[eval]"') from error
    previous, sys.argv = sys.argv, ["lm-eval", *args]
    try:
        cli_evaluate()
    finally:
        sys.argv = previous
