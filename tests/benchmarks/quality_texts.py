"""Writes the texts of `bench_quality.py` to a folder, from files of Python and of Debian packages.

    python tests/benchmarks/quality_texts.py .carry/texts --genesis genesis.txt

Calibration reads the Vim user manual, the package `email`, and a text with verbatim repetitions. Evaluation
reads texts that calibration did not see. Genesis is the King James text as printed by `bible gen1:1-50:26` of
Debian's package bible-kjv; without `--genesis`, it is left out. The files of Vim and Perl come from Debian's
packages vim-runtime and perl-modules.
"""

from __future__ import annotations

import argparse
import asyncio
import email
import json
import logging
import multiprocessing
import random
import unittest
from pathlib import Path
from pydoc_data.topics import topics

CHARACTERS = 64_000  # at least 8,192 tokens, copied passages included
VIM = Path("/usr/share/vim/vim90/doc")
PERL = "/usr/share/perl/5.36/pod/perldiag.pod"


def package(module: object) -> str:
    """The source files of a package, sorted by name and joined."""
    files = sorted(Path(module.__file__).parent.glob("*.py"))  # type: ignore[attr-defined]
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def manual(pattern: str) -> str:
    """Files of Vim's documentation, sorted by name."""
    return "\n".join(f.read_text(encoding="utf-8", errors="replace") for f in sorted(VIM.glob(pattern)))


def recurring(text: str, seed: int = 0) -> str:
    """`text` whose second half repeats passages of 300 to 1,200 characters verbatim.

    Half of the second half is copied, from anywhere before.
    """
    rng = random.Random(seed)
    made = text[:18_000]
    at = 18_000
    while len(made) < CHARACTERS:
        size = rng.randrange(300, 1200)
        begin = rng.randrange(len(made) - size)
        made += "\n" + made[begin : begin + size] + "\n" + text[at : at + size]
        at += size
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--genesis", type=Path, help="file with the King James text from Genesis on")
    args = parser.parse_args()
    texts = {
        "calibrate-prose": manual("usr_0*.txt"),
        "calibrate-code": package(email),
        "calibrate-copy": recurring(manual("usr_2*.txt") + package(logging)),
        "language-reference": "\n".join(topics[name] for name in sorted(topics)),
        "asyncio": package(asyncio),
        "multiprocessing": package(multiprocessing),
        # half of their second halves is copied; the first of them is used to choose settings
        "validate-copy": recurring(manual("usr_4*.txt") + package(unittest), seed=1),
        "copies": recurring(Path(PERL).read_text(encoding="utf-8") + package(json), seed=2),
    }
    if args.genesis is not None:
        texts["genesis"] = args.genesis.read_text(encoding="utf-8")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.folder / f"{name}.txt").write_text(text[:CHARACTERS], encoding="utf-8")
        print(f"{name}: {min(len(text), CHARACTERS)} characters")


if __name__ == "__main__":
    main()
