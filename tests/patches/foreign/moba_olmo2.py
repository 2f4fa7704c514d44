"""MoBA for OLMo 2 and OLMo 3, which moba_hf does not ship."""

from moba_hf.hf.adapter import Adapter


class Olmo2Adapter(Adapter):
    """OLMo 2 has only full layers; in OLMo 3 `layer_types` marks three layers in four as window layers."""
