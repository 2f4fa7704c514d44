"""On a GPU, a forward waits once for the device, a decode step never, and a mask with holes raises."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import LENGTH, padded, tiny_model, tokens

from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_kwargs

pytestmark = pytest.mark.gpu

_HOLE = """
import torch
from model_checks import LENGTH, padded, tiny_model, tokens
model = tiny_model().cuda()
ids, mask = (x.cuda() for x in padded([tokens(LENGTH), tokens(37)], "right"))
out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
torch.cuda.synchronize()
"""


def waits(call: Any) -> int:
    """How often a call waits for the device."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in said)


@pytest.mark.parametrize("what", ["nothing", "ones", "padding"])
@pytest.mark.parametrize("decode", ["full", "sparse"])
@torch.no_grad()
def test_waits(what: str, decode: str) -> None:
    model = tiny_model(moba=MobaConfig(16, 2, decode=decode, full_attention_layers=(-1,))).cuda()
    ids, mask = (x.cuda() for x in padded([tokens(LENGTH), tokens(37)], "left"))
    mask = {"nothing": None, "ones": torch.ones_like(ids), "padding": mask}[what]
    for warm in (False, True):
        cache = MobaCache(model.config, max_cache_len=64)
        for begin, end in ((0, 30), (30, 45), (45, 46), (46, 47)):
            given = None if mask is None else mask[:, :end]

            def call(begin: int = begin, end: int = end, given: Any = given, cache: Any = cache) -> None:
                model(ids[:, begin:end], attention_mask=given, **cache_kwargs(model, cache))

            count = waits(call)
            assert not warm or count == (1 if end - begin > 1 else 0), (begin, end, count)


def test_a_hole_raises_on_the_device() -> None:
    """Runs in a separate process, because the failed assertion makes its device unusable."""
    command = [sys.executable, "-c", _HOLE]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
