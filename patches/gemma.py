"""Gemma 3, text models."""

from typing import Any

from moba_hf.config import MobaConfig
from moba_hf.hf.adapter import Adapter


class Gemma3Adapter(Adapter):
    """`layer_types` marks five of every six layers as window layers, which also use another rotary base.

    The other differences from Llama need no code here: queries and keys are normalised before the rotary
    embedding, which pairs d with d + head_dim / 2 as usual, and scores are scaled by `query_pre_attn_scalar`.
    """

    def check(self, config: Any, moba: MobaConfig) -> None:
        super().check(config, moba)
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                "use_bidirectional_attention=True: MoBA is causal, so it cannot run in this encoder"
            )
