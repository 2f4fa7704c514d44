"""Synthetic retrieval tasks in the style of RULER: needles, key-value pairs, variable tracking.

The wording and the score (the share of expected strings found in the answer) follow RULER (arXiv 2404.06654).
The texts and random choices are our own, so the numbers are not comparable with published ones. Each context
is read once; several questions are asked about it, each on a copy of the same cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import attention, family_of
from moba_hf.evaluate.results import Store
from moba_hf.hf.cache import MobaCache
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.output_head import check_virtual_tokens, inner_model, logits_limit
from moba_hf.hf.prefill import DENSE_TAIL, attending_everything, tail_begin
from moba_hf.op.shared_rule import SharedRule
from moba_hf.progress import progress

_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "The clouds are white and the river is cold. "
)
_NAMES = (
    "amber basil cedar delta ember fjord grove haven iris jade koala lemon maple north ocean pearl quartz",
    "river sage tulip umber violet willow xenon yarrow zephyr anchor bridge castle dragon eagle forest fern",
)
_WORDS = " ".join(_NAMES).split()
_PAIRS = 1000  # up to this many names have two words, more have four
# Cached tokens over all rows of a batch of questions, at most, on a GPU and on a CPU.
_ROW_TOKENS = (1 << 18, 1 << 15)


@dataclass(frozen=True)
class Sample:
    """A context and questions about it.

    Attributes:
        context: the text to read.
        questions: `(question, expected strings, depth)`; the depth of the answer is from 0 (start) to 1.
    """

    context: str
    questions: tuple[tuple[str, tuple[str, ...], float], ...]


@dataclass(frozen=True)
class SampleSize:
    """How much of a task is asked.

    Attributes:
        contexts: number of contexts.
        questions: number of questions about each context.
        seed: seed of the first context; those of the others follow.
        depths: where in a context the answers lie, see `make_sample`; None: spread out.
    """

    contexts: int = 4
    questions: int = 8
    seed: int = 0
    depths: Sequence[float] | None = None


@dataclass(frozen=True)
class TaskScore:
    """Mean score of a task at one length, with a 95 % Wilson interval.

    Attributes:
        task: name of the task.
        length: tokens in a context.
        samples: number of questions.
        score: mean score, from 0 to 1.
        low, high: bounds of the interval.
        by_depth: `(depth, score)` of every question.
    """

    task: str
    length: int
    samples: int
    score: float
    low: float
    high: float
    by_depth: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def score_answer(answer: str, expected: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of `expected` found in `answer`, ignoring case."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def wilson(score: float, samples: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion `score` observed in `samples` trials."""
    z = 1.959964
    middle = score + z * z / (2 * samples)
    spread = z * math.sqrt(score * (1 - score) / samples + z * z / (4 * samples * samples))
    return (max(0.0, (middle - spread) / (1 + z * z / samples)), (middle + spread) / (1 + z * z / samples))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(100000, 1000000))


def _keys(rng: random.Random, count: int) -> list[str]:
    """`count` distinct names of two words each, or of four if `count` is above `_PAIRS`."""
    if count <= _PAIRS:
        return rng.sample([f"{a}-{b}" for a in _WORDS for b in _WORDS if a != b], count)
    size = len(_WORDS)
    numbers = rng.sample(range(size**4), count)
    return ["-".join(_WORDS[n // size**i % size] for i in range(4)) for n in numbers]


def _insert(haystack: Sequence[str], lines: Sequence[tuple[float, str]]) -> str:
    """The sentences of `haystack` with each of `lines` inserted at its depth."""
    places: dict[int, list[str]] = {}
    for depth, line in lines:
        places.setdefault(round(depth * len(haystack)), []).append(line)
    out: list[str] = []
    for i in range(len(haystack) + 1):
        out += places.get(i, [])
        out += haystack[i : i + 1]
    return " ".join(out)


def _needles(rng: random.Random, haystack: Sequence[str], depths: Sequence[float]) -> Sample:
    keys, values = _keys(rng, len(depths)), [_number(rng) for _ in depths]
    lines = [
        (d, f"One of the special magic numbers for {k} is: {v}.")
        for d, k, v in zip(depths, keys, values, strict=True)
    ]
    text = "Some special magic numbers are hidden within the following text.\n" + _insert(haystack, lines)
    ask = "\nWhat is the special magic number for {0} mentioned in the text? "
    ask += "The special magic number for {0} is:"
    questions = zip(keys, values, depths, strict=True)
    return Sample(text, tuple((ask.format(k), (v,), d) for k, v, d in questions))


def _key_values(rng: random.Random, haystack: Sequence[str], depths: Sequence[float]) -> Sample:
    count = max(len(depths), len(haystack))
    keys, values = _keys(rng, count), [_number(rng) for _ in range(count)]
    lines = "\n".join(f'"{k}": "{v}",' for k, v in zip(keys, values, strict=True))
    asked = [min(len(keys) - 1, int(d * len(keys))) for d in depths]
    ask = '\nThe line of one key in the object above is asked.\n"{0}": "'
    questions = tuple((ask.format(keys[i]), (values[i],), d) for i, d in zip(asked, depths, strict=True))
    return Sample("A JSON object:\n{\n" + lines + "\n}", questions)


def _variables(rng: random.Random, haystack: Sequence[str], depths: Sequence[float]) -> Sample:
    """Chains of four assignments; the depth of a chain is that of its last assignment."""
    lines: list[tuple[float, str]] = []
    questions = []
    for depth in depths:
        names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(4)]
        value = str(rng.randrange(10000, 100000))
        lines.append((depth * 0.25, f"VAR {names[0]} = {value}."))
        lines += [
            (depth * (i + 2) / 5 if i < 3 else depth, f"VAR {names[i]} = VAR {names[i - 1]}.")
            for i in range(1, 4)
        ]
        ask = f"\nFind all variables that are assigned the value {value} in the text. They are: "
        questions.append((ask, tuple(names), depth))
    text = "Memorize and track the chains of variable assignment in the following text.\n"
    return Sample(text + _insert(haystack, sorted(lines)), tuple(questions))


_Maker = Callable[[random.Random, Sequence[str], Sequence[float]], Sample]
# name -> maker, maximum number of tokens in an answer
TASKS: dict[str, tuple[_Maker, int]] = {
    "needle": (_needles, 10),
    "multi-needle": (_needles, 10),
    "key-value": (_key_values, 10),
    "variables": (_variables, 30),
}


def make_sample(
    task: str,
    tokenizer: Any,
    length: int,
    *,
    questions: int = 8,
    seed: int = 0,
    depths: Sequence[float] | None = None,
) -> Sample:
    """A sample of `task` whose context fills `length` tokens as nearly as possible without exceeding it.

    Args:
        questions: number of questions, with answers spread over the context; "needle" always has one.
        depths: depths of the answers, from 0 (start) to 1, one question each; replaces `questions`.

    Raises:
        ValueError: an unknown task, depths out of range, or a length too short for the questions.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    if depths is not None and not (depths and all(0 <= d <= 1 for d in depths)):
        raise ValueError(f"depths must be numbers from 0 to 1, got {depths}")
    if task == "needle":
        questions = 1
        if depths is not None and len(depths) > 1:
            raise ValueError(f"a context of task 'needle' takes one depth, got {depths}")
    rng = random.Random(f"{task}/{length}/{seed}")
    if depths is None:
        depths = [(i + rng.random()) / questions for i in range(questions)]
    state = rng.getstate()
    unit = [s.strip() + "." for s in _NOISE.split(".") if s.strip()]

    def build(sentences: int) -> Sample:
        rng.setstate(state)
        return TASKS[task][0](rng, [unit[i % len(unit)] for i in range(sentences)], depths)

    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(tokenizer(build(middle).context).input_ids) <= length
        low, high = (middle, high) if fits else (low, middle)
    sample = build(low)
    if len(tokenizer(sample.context).input_ids) > length:
        raise ValueError(f"{length} tokens are too few for task {task!r} with {len(depths)} questions")
    return sample


@torch.no_grad()
def answer_questions(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    new_tokens: int,
    config: MobaConfig | None,
    dense_tail: int = DENSE_TAIL,
) -> list[str]:
    """Greedy answers to the questions of `sample`, whose context is read once.

    Reads context and question as `moba_hf.prefill` reads a prompt: the last `dense_tail` tokens, question
    included, attend every key. Questions are batched, each row with a copy of the cache.

    Args:
        config: MoBA settings for context and questions; None: dense.
        dense_tail: number of tokens that attend every key; 0: none.
    """
    device = model.device
    context: Tensor = tokenizer(sample.context, return_tensors="pt").input_ids.to(device)
    asked = [
        tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids[0].to(device)
        for question, _, _ in sample.questions
    ]
    answers: list[list[int]] = []
    with attention(model, config):
        cache, length = context_cache(model, config), context.shape[1]
        tail = length
        if dense_tail:
            tail = min(length, tail_begin(model, length + min(map(len, asked)), dense_tail))
        for part, dense in ((context[:, :tail], False), (context[:, tail:], True)):
            if part.shape[1]:
                with attending_everything(model, dense):
                    read(model, part, cache)
        rows = max(1, _ROW_TOKENS[device.type == "cpu"] // length) if can_batch(cache) else 1
        for start in range(0, len(asked), rows):
            some = asked[start : start + rows]
            end = tokenizer.eos_token_id
            answers += ask(model, cache, context[0], some, new_tokens, end, dense=dense_tail > 0)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def context_cache(model: Any, config: MobaConfig | None) -> Cache:
    """An empty cache for a context that `model` reads under `config` (None: dense).

    Sparse steps of a shared choice hear earlier queries, which only a `MobaCache` keeps.
    """
    if config is not None and config.decode == "sparse":
        adapter, text = family_of(model)
        layers = adapter.num_layers(text)
        if any(isinstance(config.for_layer(i, layers), SharedRule) for i in range(layers)):
            return MobaCache(model.config)
    return DynamicCache(config=model.config)


def can_batch(cache: Cache) -> bool:
    """Whether rows of a batch can be made from copies of `cache`, as `ask` does with several questions."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def read(model: Any, ids: Tensor, cache: Cache) -> None:
    """Reads `ids (1, length)` into `cache`, without computing logits."""
    check_virtual_tokens(model)
    decoder = inner_model(model).base_model
    decoder(input_ids=ids, **cache_kwargs(decoder, cache))


def ask(
    model: Any,
    cache: Any,
    context: Tensor,
    asked: Sequence[Tensor],
    new_tokens: int,
    end: int | None,
    *,
    dense: bool,
) -> list[list[int]]:
    """Greedy answers, as token ids, to the questions `asked`.

    All rows of the batch must read equally many tokens. So a row with a shorter question has the last tokens
    of the context removed from its cache (which is padded on the left instead) and reads them again.

    Args:
        cache: the cache of `context`; it is copied, not changed.
        context: token ids, `(length,)`.
        asked: token ids of each question.
        new_tokens: maximum length of an answer.
        end: token that ends an answer; None: none does.
        dense: the questions attend every key. Answer tokens always follow the decoding settings.
    """
    length, longest = len(context), max(map(len, asked))
    spare = [longest - len(ids) for ids in asked]
    ids = torch.stack([torch.cat([context[length - s :], q]) for s, q in zip(spare, asked, strict=True)])
    copy = deepcopy(cache) if len(asked) == 1 else _padded_rows(cache, spare)
    left = torch.tensor(spare, device=ids.device)[:, None]
    last: dict[str, Any] = logits_limit(inner_model(model), 1)
    slots = torch.arange(length + longest + new_tokens, device=ids.device)
    mask = (slots >= left).long() if any(spare) else None
    answers: list[list[int]] = [[] for _ in asked]
    at = length
    for _ in range(new_tokens):
        seen = at + ids.shape[1]
        where = {"position_ids": slots[at:seen] - left, **last}
        if mask is not None:
            where["attention_mask"] = mask[:, :seen]
        with attending_everything(model, dense and at == length):
            outputs = model(input_ids=ids, **cache_kwargs(model, copy), **where)
        ids, at = outputs.logits[:, -1].argmax(1, keepdim=True), seen
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            if not answer or answer[-1] != end:
                answer.append(token)
        if all(answer[-1] == end for answer in answers):
            break
    return answers


def _padded_rows(cache: Any, spare: Sequence[int]) -> Any:
    """A cache whose row i is `cache` without its last `spare[i]` tokens, padded on the left."""
    copy = DynamicCache()
    for i, layer in enumerate(cache.layers):
        keys, values = (
            torch.cat([F.pad(x[:, :, : x.shape[2] - s], (0, 0, s, 0)) for s in spare])
            for x in (layer.keys, layer.values)
        )
        copy.update(keys, values, i)
    return copy


def run_task(
    model: Any,
    tokenizer: Any,
    task: str,
    length: int,
    config: MobaConfig | None = None,
    size: SampleSize | None = None,
    *,
    store: Store | None = None,
    what: str = "",
) -> TaskScore:
    """Score of `model` on samples of `task` at `length` tokens under `config` (None: dense).

    Args:
        size: how much is asked; None: the defaults of `SampleSize`. "needle" makes `contexts` contexts for
            each depth.
        store: keeps finished contexts, so that an interrupted run can be resumed.
        what: the text of the progress bar.
    """
    size = size or SampleSize()
    if size.contexts < 1:
        raise ValueError(f"contexts must be at least 1, got {size.contexts}")
    store = Store(None, {}) if store is None else store
    name = "dense" if config is None else str(sorted(config.to_dict().items()))
    places = [None if size.depths is None else tuple(size.depths)]
    if size.depths is not None and task == "needle":
        places = [(depth,) for depth in size.depths]
    marks: list[list[float]] = []
    samples = [(i, place) for i in range(size.contexts) for place in places]
    for i, place in progress(samples, what or f"{task}, {length:,} tokens", " contexts"):

        def one(number: int = i, place: tuple[float, ...] | None = place) -> list[list[float]]:
            given: dict[str, Any] = {"questions": size.questions, "seed": size.seed + number, "depths": place}
            sample = make_sample(task, tokenizer, length, **given)
            answers = answer_questions(model, tokenizer, sample, TASKS[task][1], config)
            asked = zip(sample.questions, answers, strict=True)
            return [[depth, score_answer(answer, expected)] for (_, expected, depth), answer in asked]

        key = f"{task}/{length}/{size.questions}/{size.seed + i}/{name}"
        marks += store.get(key if place is None else f"{key}/{place}", one)
    score = sum(mark for _, mark in marks) / len(marks)
    return TaskScore(
        task, length, len(marks), score, *wilson(score, len(marks)), tuple((d, m) for d, m in marks)
    )
