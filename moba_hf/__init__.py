"""MoBA (Mixture of Block Attention, arXiv 2502.13189) for Hugging Face Transformers.

Importing this package registers "moba" as an attention implementation of transformers. It also wraps four
methods, so that MoBA settings survive saving and loading: `__init__`, `from_pretrained` and `save_pretrained`
of `PreTrainedModel`, and `save_pretrained` of `PreTrainedConfig` (see `moba_hf.hf.loading`). For models and
checkpoints without MoBA, the wrappers do nothing. The import changes nothing else.
"""

from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.config import MobaConfig
from moba_hf.hf.attention import register
from moba_hf.hf.cache import MobaCache
from moba_hf.hf.default_cache import use_moba_cache
from moba_hf.hf.patching import patch_model, unpatch_model, use_moba
from moba_hf.hf.prefill import prefill
from moba_hf.op.ops import moba_attention, select_blocks

__all__ = [
    "MobaCache",
    "MobaConfig",
    "convert_checkpoint",
    "moba_attention",
    "patch_model",
    "prefill",
    "select_blocks",
    "unpatch_model",
    "use_moba",
    "use_moba_cache",
]

__version__ = "0.1.0"

register()
