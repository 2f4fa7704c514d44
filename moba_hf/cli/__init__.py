"""The command `moba-hf`: parses and prints, decides nothing.

Every error is one plain line on stderr and exit code 2. What a command needs is imported inside it.
`checkpoints`, `quality` and `speed` hold the commands, `options` what several of them take, `app` the whole.
"""

from moba_hf.cli.app import main

__all__ = ["main"]
