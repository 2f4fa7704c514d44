"""MoBA in Triton, forward and backward, one stage per file. Importing needs triton; only running needs a GPU.

The backend consists of `select_blocks` (for either gate), `attend` and `attend_backward`; `unsupported` says
which inputs they cannot handle. Each stage can be used alone:

    prefill     tiling (numbers tiles and blocks), block_mean, mass_summary, gate (with gate_kernels and
                gate_scores), routing, own, routed, merge
    decode      append, bounds, choose, sparse_decode, dense_decode
    backward    backward_rows, backward_routed, backward_own
    Hopper      hopper
    shared      the choice shared by a tile: `shared` and all files that begin with its name

`layout` names the columns of tables, `tuning` holds all launch parameters, and `budgets` the sizes that
depend on memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.append import MAX_ROWS as MAX_APPENDED_ROWS
from moba_hf.kernels.append import append
from moba_hf.kernels.backward import attend_backward
from moba_hf.kernels.block_mean import update_block_means
from moba_hf.kernels.bounds import row_bounds
from moba_hf.kernels.choose import choose_blocks
from moba_hf.kernels.dense_decode import dense_decode_attention
from moba_hf.kernels.forward import attend
from moba_hf.kernels.gate import select_blocks
from moba_hf.kernels.launch import INTERPRETED
from moba_hf.kernels.tuning import DECODE_QUERIES as MAX_DECODE_QUERIES

MIN_BLOCK_SIZE = 16
MAX_HEAD_DIM = 256


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None if they can."""
    if device.type == "cuda":
        if INTERPRETED:
            return None
        if torch.version.hip is not None:
            return "it is tuned for NVIDIA GPUs; AMD is not supported"
        if tuning.capability(device) < (8, 0):
            return f"it needs compute capability 8.0 or later, this GPU has {tuning.capability(device)}"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA device, or TRITON_INTERPRET=1 on CPU tensors; q is on {device}"


def unsupported(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """Why the kernels cannot handle these `(batch, heads, length, dim)` tensors, or None if they can."""
    reason = unsupported_device(q.device)
    if reason is not None:
        return reason
    if block_size < MIN_BLOCK_SIZE:
        return f"block_size={block_size} is less than {MIN_BLOCK_SIZE}"
    if q.dtype not in (torch.bfloat16, torch.float16) and not (INTERPRETED and q.dtype == torch.float32):
        return f"it computes bf16 and fp16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims are at most {MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]}"
    if q.shape[0] * q.shape[2] * q.shape[1] >= 2**31:
        return "batch * length * heads of the queries must be less than 2**31"
    return None


__all__ = [
    "MAX_APPENDED_ROWS",
    "MAX_DECODE_QUERIES",
    "append",
    "attend",
    "attend_backward",
    "choose_blocks",
    "dense_decode_attention",
    "row_bounds",
    "select_blocks",
    "unsupported",
    "unsupported_device",
    "update_block_means",
]
