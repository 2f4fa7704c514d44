"""The task "code-lookup": complete a line that was defined earlier in a codebase.

Real source files form a context of a given length. Lines with random names and values (constants and function
signatures) are inserted at evenly spaced depths. After the context, each line is begun again and the model
must complete it; the context is read once, and each question runs on a copy of its cache. An answer counts
only if all of its tokens are right.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from moba_hf.config import MobaConfig
from moba_hf.evaluate.lookups import Definition, Definitions, Ids, context_with_definitions, newline_tokens
from moba_hf.evaluate.passes import attention, identity_of
from moba_hf.evaluate.repositories import Repository
from moba_hf.evaluate.results import Store
from moba_hf.evaluate.tasks import SampleSize, TaskScore, ask, can_batch, context_cache, read, wilson
from moba_hf.progress import progress

CODE_LOOKUP = "code-lookup"
QUESTIONS = 16  # about one context, unless one says otherwise
_KINDS = ("signature", "string", "signature", "number")  # cycled through: half constants, half signatures
_CPU_ROW_TOKENS = 1 << 15


@dataclass(frozen=True)
class LookupScore(TaskScore):
    """A score with its parts; the interval allows for correlation between questions about one context.

    Attributes:
        by_kind: kind of definition -> share answered correctly.
        by_context: share answered correctly in each context.
    """

    by_kind: dict[str, float]
    by_context: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def sliding_window(config: MobaConfig) -> MobaConfig:
    """A sliding window with as many blocks per query as `config`: the own block and those just before it."""
    assert config.topk is not None
    return replace(
        config, sink_blocks=0, local_blocks=config.topk - 1, gate="mean", full_attention_layers=(), layers=()
    )


def make_context(
    tokenizer: Any, repositories: Sequence[Repository], length: int, *, questions: int = 16, seed: int = 0
) -> tuple[Ids, list[tuple[Definition, float]]]:
    """Token ids of a context, and its definitions with their depths.

    A question and its answer fit after the context within `length` tokens. `seed` shuffles the repositories
    and chooses the file of the first one at which the context starts.

    Raises:
        ValueError: not enough source text for `length`.
    """
    rng = np.random.default_rng([seed, length])
    made = Definitions(tokenizer, held_out=True).draw(rng, questions, _KINDS)
    depths = [(i + 0.5) / questions for i in range(questions)]
    order = [repositories[i] for i in rng.permutation(len(repositories))]
    first = int(rng.choice(order[0].files))
    whole = np.concatenate([order[0].ids[first:], *(one.ids for one in order[1:]), order[0].ids[:first]])
    size = length - max(len(one.ids) for one in made)
    ids = context_with_definitions(whole, newline_tokens(tokenizer), size, made, depths)
    return ids, list(zip(made, depths, strict=True))


@torch.no_grad()
def answers_right(
    model: Any,
    context: Ids,
    definitions: Sequence[Definition],
    config: MobaConfig | None,
    dense_question: bool = True,
) -> list[bool]:
    """Whether greedy decoding gives each definition's answer after `context (length,)`.

    Args:
        config: MoBA settings for the context; None: dense attention.
        dense_question: questions attend every key; False: they follow the settings, like the context. Answer
            tokens always follow the decoding settings.
    """
    device = model.device
    ids = torch.from_numpy(context.astype(np.int64)).to(device)
    right = [False] * len(definitions)
    with attention(model, config):
        cache = context_cache(model, config)
        read(model, ids[None], cache)
        rows = _rows_at_once(cache, len(ids), device)
        by_length: dict[int, list[int]] = {}
        for i, one in enumerate(definitions):
            by_length.setdefault(len(one.question), []).append(i)
        for group in by_length.values():
            for begin in range(0, len(group), rows):
                part = group[begin : begin + rows]
                asked = [torch.tensor(definitions[i].question, device=device) for i in part]
                longest = max(len(definitions[i].answer) for i in part)
                answers = ask(model, cache, ids, asked, longest, None, dense=dense_question)
                for i, answer in zip(part, answers, strict=True):
                    wanted = list(definitions[i].answer)
                    right[i] = answer[: len(wanted)] == wanted
    return right


def _rows_at_once(cache: Any, length: int, device: torch.device) -> int:
    """Number of questions to batch, each of which needs a copy of `cache`."""
    if not can_batch(cache):
        return 1
    if device.type != "cuda":
        return max(1, _CPU_ROW_TOKENS // length)
    size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return max(1, int(torch.cuda.mem_get_info(device)[0] * 0.3 // size))


def run_code_lookup(
    model: Any,
    tokenizer: Any,
    repositories: Sequence[Repository],
    length: int,
    config: MobaConfig | None = None,
    size: SampleSize | None = None,
    *,
    dense_question: bool = True,
    store: Store | None = None,
    what: str = "",
) -> LookupScore:
    """Score of `model` on contexts of `length` tokens with hidden definitions.

    Args:
        config: MoBA settings; None: dense.
        size: how much is asked, the depths left out; None: 8 contexts with 16 questions each.
        dense_question: see `answers_right`.
        store: keeps finished contexts, so that an interrupted run can be resumed.
        what: the text of the progress bar.

    Raises:
        ValueError: no contexts, questions or sources.
    """
    size = size or SampleSize(contexts=8, questions=QUESTIONS)
    contexts, questions, seed = size.contexts, size.questions, size.seed
    if contexts < 1 or questions < 1:
        raise ValueError(f"contexts and questions must be at least 1, got {contexts} and {questions}")
    if not repositories:
        raise ValueError(f"task {CODE_LOOKUP!r} needs source files: pass --sources FOLDER")
    store = Store(None, {}) if store is None else store
    name = "dense" if config is None else str(sorted(config.to_dict().items()))
    read_from = identity_of(*(torch.from_numpy(one.ids.astype(np.int64)) for one in repositories))
    marks: list[list[Any]] = []
    for number in progress(range(contexts), what or f"{CODE_LOOKUP}, {length:,} tokens", " contexts"):

        def one(number: int = number) -> list[list[Any]]:
            ids, asked = make_context(
                tokenizer, repositories, length, questions=questions, seed=seed + number
            )
            definitions = [definition for definition, _ in asked]
            right = answers_right(model, ids, definitions, config, dense_question)
            return [[d.kind, depth, float(x)] for (d, depth), x in zip(asked, right, strict=True)]

        key = f"{CODE_LOOKUP}/{length}/{questions}/{seed + number}/{name}/{dense_question}/{read_from}"
        marks.append(store.get(key, one))
    return _score(length, marks)


def _score(length: int, marks: list[list[Any]]) -> LookupScore:
    flat = [mark for context in marks for mark in context]
    means = [statistics.fmean(mark for _, _, mark in context) for context in marks]
    score, count = statistics.fmean(mark for _, _, mark in flat), len(flat)
    # Questions about one context are correlated. The design effect, the variance of the context means over
    # its value for independent questions, gives the effective number of questions.
    chance = score * (1 - score) * len(marks) / count
    effect = max(1.0, statistics.variance(means) / chance) if chance and len(means) > 1 else 1.0
    kinds = dict.fromkeys(kind for kind, _, _ in flat)
    return LookupScore(
        CODE_LOOKUP,
        length,
        count,
        score,
        *wilson(score, max(1, round(count / effect))),
        tuple((depth, mark) for _, depth, mark in flat),
        {kind: statistics.fmean(mark for k, _, mark in flat if k == kind) for kind in kinds},
        tuple(means),
    )
