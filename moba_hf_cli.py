"""Starts the command `moba-hf`; apart from moba_hf, so that an interrupt while that is imported is quiet."""

import os
import signal
from types import FrameType


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"moba-hf: interrupted\n")
    os._exit(130)  # nothing is open yet; an exception would pass through half-made modules


def main() -> None:
    """Imports the command line and runs it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from moba_hf.cli import main as run

    run()


if __name__ == "__main__":
    main()
