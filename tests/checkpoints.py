"""Tiny checkpoints with random weights for the conversion tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from moba_hf import MobaConfig

MOBA = MobaConfig(block_size=8, topk=2, full_attention_layers=(-1,))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
# Sizes of the GGUF model.
_VOCAB, _HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS = 64, 64, 96, 2, 4, 2


def save_tiny(folder: Path, family: str = "llama", *, layers: int = 3, **kwargs: Any) -> Path:
    """A folder with a tiny random model; `kwargs` go to `save_pretrained`."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, "num_hidden_layers": layers}, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, **kwargs)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def save_tokenizer(folder: Path, size: int = 96) -> Path:
    """Adds a tokenizer with `size` tokens, one per character, to a folder; it prepends `<s>`."""
    words = ["<s>", "</s>", "<unk>", *(chr(33 + i) for i in range(size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


class Letters:
    """A tokenizer with one token for each of 128 bytes, and no special tokens."""

    def __call__(self, text: Any, add_special_tokens: bool = True) -> Any:
        class Output:
            input_ids = [list(x.encode()) for x in text] if isinstance(text, list) else list(text.encode())

        return Output

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON object in place; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    removed = {name for name, value in changes.items() if value is None}
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in removed}))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, position: int) -> None:
    """Flips the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    leave_out: str = "",
    extra: dict[str, tuple[int, ...]] | None = None,
    scaling: str = "",
    parts: int = 0,
) -> dict[str, np.ndarray[Any, Any]]:
    """Writes a tiny Q8_0 model with a tokenizer and returns its tensors, dequantised by the gguf package.

    Args:
        path: file to write.
        architecture: name of the architecture in GGUF.
        leave_out: name of a tensor not to write.
        extra: additional tensors, name -> shape.
        scaling: type of RoPE scaling.
        parts: number of files that the header claims the model is split into.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer)
    if scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    if parts:
        writer.add_uint16("split.count", parts)
    shapes = {**_gguf_shapes(), **(extra or {})}
    shapes.pop(leave_out, None)
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    dequantised = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            dequantised[name] = values
        else:
            packed = gguf.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            dequantised[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantised


def _write_settings(writer: Any) -> None:
    """Sizes and a tokenizer."""
    writer.add_context_length(256)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(_VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(33 + i) for i in range(_VOCAB - 4)), '!"', "#$"])
    writer.add_token_merges(['! "', "# $"])
    writer.add_token_types([3, 3] + [1] * (_VOCAB - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _gguf_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by name."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (_VOCAB, _HIDDEN), "output_norm": (_HIDDEN,)}
    for i in range(_LAYERS):
        for name, shape in {
            "attn_norm": (_HIDDEN,),
            "ffn_norm": (_HIDDEN,),
            "attn_q": (_HIDDEN, _HIDDEN),
            "attn_k": (_HIDDEN // 2, _HIDDEN),
            "attn_v": (_HIDDEN // 2, _HIDDEN),
            "attn_output": (_HIDDEN, _HIDDEN),
            "ffn_gate": (_INNER, _HIDDEN),
            "ffn_up": (_INNER, _HIDDEN),
            "ffn_down": (_HIDDEN, _INNER),
        }.items():
            shapes[f"blk.{i}.{name}"] = shape
    return shapes
