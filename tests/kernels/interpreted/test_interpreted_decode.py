"""Decode steps on the Triton backend: chosen from cached means, attended by the decode kernel."""

import torch
from torch import Tensor

from moba_hf.block_means import block_means_of
from moba_hf.ops import batched_moba_attention


def test_rows_equal_the_reference() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 100, 16) for _ in range(2))
    starts = torch.tensor([0, 17])
    for q_len, topk in ((1, 3), (3, 9)):
        q = torch.randn(2, 4, q_len, 16)

        def run(backend: str, means: Tensor | None, q: Tensor = q, topk: int = topk) -> tuple[Tensor, Tensor]:
            rule = {"block_size": 16, "topk": topk, "sink_blocks": 1}
            return batched_moba_attention(
                q, k, v, kv_start=starts, backend=backend, block_means=means, **rule
            )

        expected = run("reference", None)
        for means in (None, block_means_of(k, starts, 16)):
            torch.testing.assert_close(run("triton", means), expected)
