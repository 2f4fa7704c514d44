"""MobaConfig and the presets."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moba_hf import MobaConfig
from moba_hf.config import LayerConfig, preset_names, read_preset
from moba_hf.op.backends import BACKENDS
from moba_hf.op.shared_rule import SharedRule

PRESETS = (
    *("default", "default-per-query", "default-per-query-mass", "fine"),
    *("paper-10m", "paper-1m", "paper-32k", "paper-8k"),
)


def make(**values: object) -> MobaConfig:
    return MobaConfig(**({"block_size": 64, "topk": 4} | values))


class TestValues:
    def test_defaults_are_plain_moba(self) -> None:
        config = MobaConfig(512, 3)
        assert config.for_layer(0, 4) == LayerConfig(512, 3, sink_blocks=0, local_blocks=0)
        assert config.full_attention_layers == ()
        assert config.decode == "full"
        assert config.decode_max_len == 1
        assert config.backend == "auto"
        assert config.layers == ()

    def test_it_is_frozen_and_compares_by_value(self) -> None:
        config = make()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.topk = 5
        assert config == make()
        assert hash(config) == hash(make())
        assert config != make(topk=5)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"block_size": 0}, "block_size must be at least 1, got 0"),
            ({"topk": 0}, "topk must be at least 1, got 0"),
            ({"topk": -3}, "topk must be at least 1, got -3"),
            ({"sink_blocks": -1}, "sink_blocks must be at least 0, got -1"),
            ({"local_blocks": -1}, "local_blocks must be at least 0, got -1"),
            ({"topk": 3, "sink_blocks": 1, "local_blocks": 2}, "must be at least 4"),
            ({"decode": "dense"}, "decode must be one of 'full', 'sparse', got 'dense'"),
            ({"decode_max_len": 0}, "decode_max_len must be at least 1, got 0"),
            ({"decode_max_len": 257}, "decode_max_len=257 exceeds topk \\* block_size = 256"),
            ({"decode_max_len": 200, "layers": {1: {"topk": 2}}}, "exceeds topk \\* block_size = 128"),
            ({"layers": {1: {"topk": 0}}}, "topk must be at least 1, got 0"),
            ({"layers": {1: {"sink_blocks": 4}}}, "must be at least 5"),
            ({"layers": {1: {"decode": "full"}}}, "layer 1 overrides decode; it may set block_size, topk"),
            ({"layers": {"one": {}}}, "layers is keyed by layer index, got 'one'"),
            ({"layers": {1.5: {}}}, "layers is keyed by layer index, got 1.5"),
            ({"layers": {True: {}}}, "layers is keyed by layer index, got True"),
            ({"layers": [(1, {}), ("1", {})]}, "layers names a layer twice"),
        ],
    )
    def test_values_out_of_range(self, values: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(**values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"block_size": 64.0}, "block_size must be an int, got 64.0"),
            ({"block_size": "64"}, "block_size must be an int, got '64'"),
            ({"topk": True}, "topk must be an int, got True"),
            ({"topk": 2.0}, "topk must be an int, got 2.0"),
            ({"decode_max_len": 1.5}, "decode_max_len must be an int"),
            ({"backend": 3}, "backend must be a string, got 3"),
            ({"full_attention_layers": 3}, "full_attention_layers must be a list of ints, got 3"),
            ({"full_attention_layers": "last"}, "full_attention_layers must be a list of ints, got 'last'"),
            ({"full_attention_layers": [1.0]}, "full_attention_layers must hold ints, got 1.0"),
            ({"layers": ""}, "layers must map a layer index to its overrides"),
            ({"layers": 5}, "layers must map a layer index to its overrides, got 5"),
            ({"layers": [5]}, "layers must map a layer index to its overrides"),
            ({"layers": {1: 5}}, "layers must map a layer index to its overrides"),
            ({"layers": {1: {"topk": "2"}}}, "topk must be an int, got '2'"),
        ],
    )
    def test_wrong_types(self, values: dict[str, object], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            make(**values)

    def test_sparse_decode_round_trips(self) -> None:
        assert MobaConfig.from_dict(make(decode="sparse").to_dict()).decode == "sparse"


class TestDict:
    def test_names_of_the_original_code(self) -> None:
        assert MobaConfig.from_dict({"moba_chunk_size": 4096, "moba_topk": 12}) == MobaConfig(4096, 12)

    def test_a_value_given_twice(self) -> None:
        with pytest.raises(ValueError, match="block_size is given twice"):
            MobaConfig.from_dict({"moba_chunk_size": 4096, "block_size": 512, "topk": 3})

    def test_unknown_keys_are_named_with_the_known_ones(self) -> None:
        with pytest.raises(
            ValueError, match=r"unknown MoBA settings: blok_size, top_k; known are block_size"
        ):
            MobaConfig.from_dict({"blok_size": 64, "top_k": 3})

    @pytest.mark.parametrize(
        ("values", "missing"),
        [({"block_size": 64}, "topk"), ({"topk": 3}, "block_size"), ({}, "block_size and topk")],
    )
    def test_missing_keys(self, values: dict[str, int], missing: str) -> None:
        with pytest.raises(ValueError, match=f"a MoBA config needs {missing}$"):
            MobaConfig.from_dict(values)

    @pytest.mark.parametrize("values", [None, [64, 3], "fine", 64])
    def test_not_a_mapping(self, values: object) -> None:
        with pytest.raises(TypeError, match="MoBA settings must be a mapping"):
            MobaConfig.from_dict(values)

    def test_lists_and_string_keys_are_read_as_json_gives_them(self) -> None:
        values = {
            "block_size": 64,
            "topk": 4,
            "full_attention_layers": [-1, 0],
            "layers": {"2": {"topk": 8}},
        }
        config = MobaConfig.from_dict(values)
        assert config == make(full_attention_layers=(-1, 0), layers={2: {"topk": 8}})
        assert hash(config) == hash(make(full_attention_layers=(-1, 0), layers=((2, (("topk", 8),)),)))

    @pytest.mark.parametrize(
        "config",
        [
            make(),
            make(sink_blocks=1, local_blocks=2, decode_max_len=16),
            make(full_attention_layers=[0, -2, -1]),
            make(layers={3: {"topk": 8, "block_size": 32}, -1: {"sink_blocks": 2}}),
            *(MobaConfig.from_preset(name) for name in PRESETS),
        ],
    )
    def test_round_trip_through_json(self, config: MobaConfig) -> None:
        assert MobaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_an_unknown_backend_is_refused(self) -> None:
        for values in ({"backend": "x"}, {"backend": ""}, {"backend": "Auto"}):
            with pytest.raises(ValueError, match=r"unknown backend .*; known are auto, reference, portable"):
                MobaConfig(64, 4, **values)
        for name in ("auto", *BACKENDS):
            assert MobaConfig(64, 4, backend=name).backend == name

    def test_the_backend_is_read_but_never_saved(self) -> None:
        config = MobaConfig.from_dict({"block_size": 64, "topk": 4, "backend": "reference"})
        assert config.backend == "reference"
        assert "backend" not in config.to_dict()


class TestLayers:
    def test_full_attention_layers_count_from_either_end(self) -> None:
        config = make(full_attention_layers=(0, -1))
        assert [config.for_layer(i, 4) is None for i in range(4)] == [True, False, False, True]

    @pytest.mark.parametrize("index", [4, -5, 100])
    @pytest.mark.parametrize("name", ["full_attention_layers", "layers"])
    def test_a_layer_that_does_not_exist(self, name: str, index: int) -> None:
        config = make(**{name: [index] if name == "full_attention_layers" else {index: {"topk": 1}}})
        message = f"{name} names layer {index}, but the model has 4 layers"
        with pytest.raises(ValueError, match=message):
            config.check_layers(4)
        with pytest.raises(ValueError, match=message):
            config.for_layer(0, 4)

    def test_a_layer_overridden_under_both_its_indices(self) -> None:
        with pytest.raises(ValueError, match="layers names layer 3 twice, also as -1"):
            make(layers={3: {"topk": 1}, -1: {"topk": 2}}).for_layer(0, 4)

    def test_overrides_change_only_what_they_name(self) -> None:
        config = make(sink_blocks=1, layers={1: {"topk": 9}, -1: {"block_size": 16, "sink_blocks": 0}})
        rules = [config.for_layer(i, 3) for i in range(3)]
        assert rules == [LayerConfig(64, 4, 1, 0), LayerConfig(64, 9, 1, 0), LayerConfig(16, 4, 0, 0)]

    def test_key_budget(self) -> None:
        """Mean over layers of min(1, topk * block_size / length); a full-attention layer counts as 1."""
        assert make().key_budget(1024, 2) == 256 / 1024
        assert make().key_budget(100, 2) == 1.0
        assert make(full_attention_layers=[-1]).key_budget(1024, 4) == (3 * 0.25 + 1) / 4
        assert make(layers={0: {"topk": 8}}).key_budget(1024, 2) == (0.5 + 0.25) / 2

    def test_key_budget_at_length_zero(self) -> None:
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            make().key_budget(0, 2)


class TestPresets:
    def test_names(self) -> None:
        assert tuple(preset_names()) == PRESETS

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("paper-8k", MobaConfig(512, 3)),
            ("paper-32k", MobaConfig(2048, 3)),
            ("paper-1m", MobaConfig(4096, 12, full_attention_layers=(-3, -2, -1), decode="full")),
            ("paper-10m", MobaConfig(163840, 3)),
            ("fine", MobaConfig(128, 8)),
        ],
    )
    def test_published_settings(self, name: str, expected: MobaConfig) -> None:
        assert MobaConfig.from_preset(name) == expected

    @pytest.mark.parametrize("name", ["default", "default-per-query", "default-per-query-mass"])
    def test_default_keeps_the_first_block_and_the_one_before(self, name: str) -> None:
        config = MobaConfig.from_preset(name)
        assert config.sink_blocks >= 1
        assert config.local_blocks >= 1

    def test_default_shares_its_choice(self) -> None:
        rule = MobaConfig.from_preset("default").for_layer(0, 2)
        assert isinstance(rule, SharedRule)
        assert (rule.tile, rule.block_size, rule.threshold, rule.topk) == (128, 32, 0.01, None)

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_number_has_a_source(self, name: str) -> None:
        preset = read_preset(name)
        assert preset["description"]
        assert set(preset["sources"]) == set(preset["moba"])
        assert all(isinstance(source, str) and source for source in preset["sources"].values())

    @pytest.mark.parametrize("name", ["paper", "", "../pyproject", "default.json"])
    def test_an_unknown_preset_lists_the_valid_ones(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"valid presets are {', '.join(PRESETS)}"):
            MobaConfig.from_preset(name)


def test_scaled_keeps_the_key_budget_and_the_kept_blocks() -> None:
    config = MobaConfig(
        32,
        64,
        sink_blocks=1,
        local_blocks=1,
        full_attention_layers=(0,),
        gate="mass",
        layers={"1": {"topk": 16}, "2": {"topk": 4, "local_blocks": 2}},  # type: ignore[arg-type]
    )
    half = config.scaled(8192, 4096)
    assert [half.for_layer(i, 5).topk for i in (1, 2, 3)] == [8, 4, 32]  # type: ignore[union-attr]
    assert half.for_layer(0, 5) is None
    assert half.gate == "mass"
    assert half.for_layer(2, 5).local_blocks == 2  # type: ignore[union-attr]
    assert config.scaled(8192, 8192) == config
    even = MobaConfig(32, 64).scaled(8192, 2048)
    assert even.key_budget(2048, 3) == MobaConfig(32, 64).key_budget(8192, 3)
