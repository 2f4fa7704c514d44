"""MoBA (Mixture of Block Attention, arXiv 2502.13189) for Hugging Face Transformers."""

from moba_hf.config import MobaConfig
from moba_hf.ops import moba_attention, select_blocks

__all__ = ["MobaConfig", "moba_attention", "select_blocks"]

__version__ = "0.1.0"
