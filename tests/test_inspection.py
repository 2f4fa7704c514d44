"""Inspection gives the right layers and numbers for public configs, quickly and without weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from moba_hf import MobaConfig
from moba_hf.checkpoints.inspection import LENGTHS, describe, inspect_config

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
}
MISTRAL_7B_V01 = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
# As published, with the text model's values at the top level.
QWEN25_VL_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584},
}


def config_of(values: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a parameter was made")

    monkeypatch.setattr(torch.nn.Parameter, "__new__", fail)


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        (LLAMA_70B, {"moba": 77, "full": 3}),
        (MISTRAL_7B_V01, {"stock": 32}),
        (QWEN3_30B_A3B, {"moba": 45, "full": 3}),
        (QWEN25_VL_7B, {"moba": 25, "full": 3}),
    ],
    ids=["llama-3.1-70b", "mistral-7b-v0.1", "qwen3-30b-a3b", "qwen2.5-vl-7b"],
)
def test_public_configs(
    values: dict[str, Any], kinds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    result = inspect_config(config_of(values), MobaConfig.from_preset("paper-1m"))
    text = describe(result)
    counted = [row.kind for row in result.layers]
    assert {kind: counted.count(kind) for kind in dict.fromkeys(counted)} == kinds
    assert len(result.layers) == values["num_hidden_layers"] == len({row.index for row in result.layers})
    assert [row.tokens for row in result.lengths] == list(LENGTHS) == [8192, 32768, 131072, 1048576]
    ranges = [
        line.split()[0] for line in text.splitlines() if re.match(r"\d+(-\d+)? +(moba|full|stock) ", line)
    ]
    covered = [range(int(r.split("-")[0]), int(r.split("-")[-1]) + 1) for r in ranges]
    assert [index for each in covered for index in each] == [row.index for row in result.layers]
    assert len(ranges) < len(result.layers), "equal neighbours are one line"


def test_numbers_of_llama_70b() -> None:
    """Computed by hand at 128K tokens with preset paper-1m: 77 layers with 12 x 4096 keys, 3 dense ones."""
    moba = MobaConfig.from_preset("paper-1m")
    row = inspect_config(config_of(LLAMA_70B), moba).lengths[2]
    length = 131072
    assert row.key_budget == pytest.approx((77 * 12 * 4096 / length + 3) / 80)
    assert row.key_budget == pytest.approx(moba.key_budget(length, 80))
    assert row.pair_share == pytest.approx(moba.pair_share(length, 80))
    assert row.dense_flops == 80 * 4 * 64 * 128 * length * (length + 1) // 2
    assert row.kv_cache_bytes == 80 * 2 * 8 * 128 * 2 * length == 40 * 2**30
    attended = [min(t // 4096, 11) * 4096 + t % 4096 + 1 for t in range(0, length, 4096)]
    pairs = sum(4096 * first + 4096 * 4095 // 2 for first in attended)
    gate = sum(4096 * block for block in range(32))
    dense = 3 * 4 * 64 * 128 * length * (length + 1) // 2
    assert row.moba_flops == dense + 77 * (4 * 64 * 128 * pairs + 2 * 64 * 128 * gate + 8 * 128 * length)


def test_a_window_bounds_the_cache_of_a_stock_layer() -> None:
    row = inspect_config(config_of(MISTRAL_7B_V01)).lengths[1]
    assert row.kv_cache_bytes == 32 * 2 * 8 * 128 * 2 * 4096
    assert row.key_budget == pytest.approx(4096 / 32768)
    assert row.dense_flops == row.moba_flops
    assert "sliding window of 4096" in describe(inspect_config(config_of(MISTRAL_7B_V01)))


def test_linear_layers_attend_no_keys() -> None:
    config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=8)
    result = inspect_config(config, MobaConfig(64, 16))
    assert [row.kind for row in result.layers] == ["stock", "stock", "stock", "moba"] * 2
    assert result.layers[0].why == "linear attention"
    assert result.lengths[0].key_budget == pytest.approx(64 * 16 / 8192)
    one = inspect_config(CONFIG_MAPPING["qwen3_next"](num_hidden_layers=4), MobaConfig(64, 16)).lengths[0]
    assert result.lengths[0].kv_cache_bytes == 2 * one.kv_cache_bytes


def test_settings_come_from_the_config_unless_asked() -> None:
    config = config_of(QWEN25_VL_7B)
    assert inspect_config(config).moba_source == "preset default"
    config.text_config.moba = MobaConfig(32, 4).to_dict()
    assert inspect_config(config).moba_source == "config.moba"
    assert inspect_config(config).moba == MobaConfig(32, 4)
    assert inspect_config(config, MobaConfig(16, 2)).moba == MobaConfig(16, 2)
    assert inspect_config(config).text_model_type == "qwen2_5_vl_text"
    with pytest.raises(ValueError, match="layer 28"):
        inspect_config(config, MobaConfig(32, 4, full_attention_layers=(28,)))
