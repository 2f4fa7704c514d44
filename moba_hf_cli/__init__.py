"""The command `moba-hf`: parses and prints, decides nothing.

It stands beside `moba_hf`, whose import registers with transformers and takes seconds: `--help`, `presets`
and errors of usage need neither. A command calls `options.load_package` before it imports from `moba_hf`.
Every error is one plain line on stderr and exit code 2. `checkpoints`, `quality` and `speed` hold the
commands, `options` what several of them take, `signals` how they end, `app` the whole.
"""

import atexit
from collections.abc import Sequence
from typing import NoReturn

from moba_hf_cli.signals import exiting, ignore


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line `args` (default: the program's own) and exits."""
    atexit.register(ignore)  # the status is decided then: a late signal must not replace it
    with exiting():
        from moba_hf_cli.app import main as run
    run(args)
