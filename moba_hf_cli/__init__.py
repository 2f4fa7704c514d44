"""The command `moba-hf`: it parses options and prints results; all logic is in `moba_hf`.

It is a separate package because importing `moba_hf` registers with transformers and takes seconds, which
`--help`, `presets` and usage errors do not need. A command calls `options.load_package` before it imports
from `moba_hf`. Every error is one plain line on stderr, with exit code 2. The commands are in `checkpoints`,
`quality` and `speed`; `options` has their shared options, `signals` handles signals, and `app` combines
everything.
"""

import atexit
from collections.abc import Sequence
from typing import NoReturn

from moba_hf_cli.signals import exiting, ignore


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line `args` (default: `sys.argv`) and exits."""
    atexit.register(ignore)  # the exit status is final then: a late signal must not change it
    with exiting():
        from moba_hf_cli.app import main as run
    run(args)
