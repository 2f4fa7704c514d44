"""Gemma 3, text models."""

from typing import Any

from moba_hf.config import MobaConfig
from moba_hf.hf.adapter import Adapter


class Gemma3Adapter(Adapter):
    """`layer_types` names five window layers in six, which also have a rotary base of their own.

    What else differs from Llama needs no word here: queries and keys are normed before the rotary embedding,
    which pairs d and d + head_dim / 2 as elsewhere, and scores are scaled by `query_pre_attn_scalar`.
    """

    def check(self, config: Any, moba: MobaConfig) -> None:
        super().check(config, moba)
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                "use_bidirectional_attention=True: MoBA is causal, so it cannot run in this encoder"
            )
