"""MoBA for OLMo 2 and OLMo 3, which moba_hf does not ship."""

from moba_hf.hf.adapter import Adapter


class Olmo2Adapter(Adapter):
    """OLMo 2 has full layers only; of OLMo 3 `layer_types` names three window layers in four."""
