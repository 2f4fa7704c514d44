"""Damages files at random and runs the command line on them in this process."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import moba_hf_cli as cli

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 7, 2**31, 2**40, 10**9, -(10**12), 1e308, 0.5, float("nan")),
    *("", "x", "\x1b[31mred", "\ud800", "bfloat16", "torch.float32", "mistral", "moba", "../../etc/passwd"),
    *([], {}, [[]], [1, 2, 3], ["full_attention"] * 3, {"a": 1}, {"block_size": "8", "topk": [2]}),
)
MORE = (
    *("num_labels", "id2label", "moba", "layer_types", "sliding_window", "rope_parameters", "rope_scaling"),
    *("dtype", "torch_dtype", "quantization_config", "auto_map", "transformers_weights", "head_dim"),
    *("text_config", "vision_config", "attn_implementation", "_attn_implementation", "pad_token_id"),
)


def mutate_json(values: Any, rng: random.Random) -> Any:
    """A copy of JSON values with one to three random changes at any depth."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        place = values
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            inner = [key for key in keys if isinstance(place[key], (dict, list)) and place[key]]
            if not inner or rng.random() < 0.6:
                break
            place = place[rng.choice(inner)]
        if isinstance(place, dict) and rng.random() < 0.25:
            place[rng.choice(MORE)] = deepcopy(rng.choice(ODD))
        elif keys and rng.random() < 0.2:
            del place[rng.choice(keys)]
        elif keys:
            place[rng.choice(keys)] = deepcopy(rng.choice(ODD))
    return values


def mutate_bytes(data: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """A copy with one to three bytes changed, inserted or removed, or truncated, between two positions."""
    changed, end = bytearray(data), len(data) if last is None else last
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(first, max(first + 1, min(end, len(changed))))
        kind = rng.randrange(6)
        if kind < 3:
            changed[position : position + 1] = bytes([rng.choice((0, 1, 127, 255, rng.randrange(256)))])
        elif kind == 3:
            changed[position:position] = rng.randbytes(rng.choice((1, 8)))
        elif kind == 4:
            del changed[position : position + rng.choice((1, 8))]
        else:
            number = rng.choice((2**32, 2**63, 2**64 - 1, 2**20))
            changed[position : position + 8] = number.to_bytes(8, "little")
    return bytes(changed)


def mutate_text_json(path: Path, rng: random.Random) -> None:
    """Changes a JSON file: its values with probability 4/5, otherwise its bytes."""
    if rng.random() < 0.8:
        path.write_text(json.dumps(mutate_json(json.loads(path.read_bytes()), rng)))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


class _Slow(BaseException):
    pass


def end_of(arguments: list[str], limit: float = 10.0) -> str:
    """How a command line ends: "done", "told" (one plain line, code 2), or the description of a fault."""
    out, err = io.StringIO(), io.StringIO()

    def late(*_: object) -> None:
        raise _Slow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(arguments)
    except SystemExit as error:
        code = error.code
    except _Slow:
        return f"took more than {limit} s"
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    text = err.getvalue()
    if code == 0:
        return "done"
    if code != 2 or text.count("\n") != 1 or not text.endswith("\n") or not text.startswith("moba-hf: "):
        return f"code {code}, stderr {text[:300]!r}"
    if not text[:-1].isprintable() or out.getvalue().strip():
        return f"printed {text[:300]!r}, {out.getvalue()[:100]!r}"
    if any(name in text for name in ("AttributeError", "KeyError", "IndexError", "AssertionError")):
        return "told (by a foreign error)"
    return "told"


def fuzz(
    count: int, damage: Callable[[random.Random], list[list[str]]], seed: int = 0
) -> tuple[Counter[str], float]:
    """Runs the commands of `count` damages; returns how often each ending occurred and the longest time."""
    ends: Counter[str] = Counter()
    longest = 0.0
    for number in range(count):
        for arguments in damage(random.Random(f"{seed} {number}")):
            start = time.perf_counter()
            end = end_of(arguments)
            longest = max(longest, time.perf_counter() - start)
            known = end in ("done", "told", "told (by a foreign error)")
            ends[end if known else f"{number}: {arguments[0]}: {end}"] += 1
    return ends, longest
