"""The contract for every adapter, ours or third-party: `check_adapter(MyAdapter, tiny_config)`.

Checks that compare two ways of computing the same thing (padded or alone, in chunks or at once) run the stock
implementation first. Its own difference between the two ways sets the tolerance for MoBA. If stock fails (as
with some caches of hybrid models), the check is reported as skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter, has_adapter, trying
from moba_hf.hf.cache_names import CACHE_NAMES, cache_kwargs
from moba_hf.hf.patching import patch_model, unpatch_model, use_moba
from moba_hf.op.reference import moba_attention_ref
from moba_hf.probes import Call, build_model, capture

__all__ = ["Report", "build_model", "capture", "check_adapter"]

LENGTH = 61
SMALL = MobaConfig(block_size=7, topk=3, sink_blocks=1)
COVERING = MobaConfig(block_size=7, topk=64)
# Relative to the largest value compared: fp32 rounding, and a difference too large for rounding.
_ROUNDING, _DIFFERENT = 2e-5, 2e-3


@dataclass
class Report:
    """The result of `check_adapter`.

    Attributes:
        passed: names of the checks that passed.
        skipped: checks that the stock model fails as well: name -> what happened.
        packing: "separate" if packed documents give the same logits as each document alone, else the message
            of the ValueError that refuses them.
    """

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    packing: str = ""


def check_adapter(adapter_cls: type[Adapter], tiny_config: Any, *, installed: bool = False) -> Report:
    """Raises AssertionError unless a model of `tiny_config` keeps the contract when it runs MoBA.

    Args:
        adapter_cls: the adapter to check; it need not be installed.
        tiny_config: a transformers config of the family, small enough to build on the CPU, with at least one
            layer eligible for MoBA, positions for 128 tokens and attention dropout 0. It may be composite.
        installed: also require that the adapter is found through its entry point.
    """
    adapter = adapter_cls()
    text_config = adapter.text_config(tiny_config)
    model_type = tiny_config.model_type
    if installed:
        found = type(_call("lookup", find_adapter, model_type))
        _require(
            found is adapter_cls,
            "lookup",
            f"{model_type!r} gives {found.__name__}; register {adapter_cls.__name__} as {model_type!r} under "
            '[project.entry-points."moba_hf.patches"]',
        )
        _call("lookup", find_adapter, text_config.model_type)
    tried = {model_type}
    if not has_adapter(text_config.model_type):
        tried.add(text_config.model_type)
    report = Report(passed=["lookup"] if installed else [])
    with trying(adapter, tried), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        case = _Case(adapter, build_model(tiny_config), report)
        for check in _CHECKS:
            name = check.__name__.removeprefix("_check_")
            _call(name, check, case)
            if name not in report.skipped:
                report.passed.append(name)
    return report


class _Case:
    """A model with stock attention and ways to run it; every check leaves the model unchanged."""

    def __init__(self, adapter: Adapter, model: Any, report: Report) -> None:
        self.adapter, self.model, self.report = adapter, model, report
        self.config = adapter.text_config(model.config)
        self.eligible = adapter.eligible_layers(self.config)
        special = {v for k, v in vars(model.config).items() if k.endswith("token_id") and isinstance(v, int)}
        usable = torch.tensor([i for i in range(1, self.config.vocab_size) if i not in special])
        self.ids = usable[torch.randint(len(usable), (2, LENGTH))]

    def logits(self, ids: Tensor, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Logits `(batch, length, vocab)`; positions start at 0 unless given."""
        if positions is None:
            positions = torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1)
        kwargs.setdefault("use_cache", any(name in kwargs for name in CACHE_NAMES))
        return self.model(input_ids=ids, position_ids=positions, **kwargs).logits

    def calls(self) -> list[Call]:
        """The calls of attention when MoBA runs a single row."""
        with use_moba(self.model, SMALL), capture(NAME) as calls:
            self.logits(self.ids[:1])
        return calls

    def generate(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """Tokens `(batch, 8)` generated greedily."""
        kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
        return self.model.generate(ids, max_new_tokens=8, **kwargs)[:, ids.shape[1] :]

    def agree(self, name: str, ways: Callable[[], tuple[Tensor, Tensor]], meaning: str) -> None:
        """Requires that two ways of computing the same thing agree about as well as under stock attention."""
        try:
            first, second = ways()
        except Exception as error:  # stock may raise anything
            self.report.skipped[name] = f"the stock model raises {type(error).__name__}: {error}"
            return
        noise = _distance(first, second)
        if noise > _DIFFERENT:
            self.report.skipped[name] = f"the stock model differs by {noise:.1e}"
            return
        with use_moba(self.model, SMALL):
            distance = _distance(*ways())
        allowed = 8 * noise + _ROUNDING
        _require(
            distance <= allowed,
            name,
            f"{meaning}: they differ by {distance:.1e} (stock: {noise:.1e}, allowed {allowed:.1e})",
        )


def _check_facts(case: _Case) -> None:
    """The adapter names exactly the layers that call attention, and no window layer as eligible."""
    layers = dict(case.adapter.attention_layers(case.model))
    _require(
        bool(case.eligible), "facts", "no layer is eligible: use a tiny_config with a full-attention layer"
    )
    missing = sorted(set(case.eligible) - set(layers))
    _require(not missing, "facts", f"eligible layers {missing} are not among attention_layers(model)")
    count = case.adapter.num_layers(case.config)
    _require(max(layers) < count, "facts", f"layer {max(layers)} exists, but num_layers says {count}")
    calls = case.calls()
    called = {call.layer for call in calls}
    _require(called == set(layers), "facts", f"attention is called by layers {sorted(called)}, not {layers}")
    for call in calls:
        index = call.layer
        window = call.kwargs.get("sliding_window") or getattr(call.module, "sliding_window", None)
        _require(
            not window or index not in case.eligible,
            "facts",
            f"layer {index} has a sliding window of {window}, so stock_reason must give a reason for it",
        )


def _check_projection(case: _Case) -> None:
    """The output projection named by the adapter runs once per call, on the outputs of all heads."""
    widths: dict[int, list[int]] = {index: [] for index in case.eligible}
    hooks = []
    for index, module in case.adapter.attention_layers(case.model):
        if index in widths:
            project = case.adapter.output_projection(module)

            def keep(_: nn.Module, args: tuple[Tensor, ...], seen: list[int] = widths[index]) -> None:
                seen.append(args[0].shape[-1])

            hooks.append(project.register_forward_pre_hook(keep))
    try:
        calls = case.calls()
    finally:
        for hook in hooks:
            hook.remove()
    for call in calls:
        expected = [call.out.shape[2] * call.out.shape[3]]
        found = widths.get(call.layer, expected)
        message = f"output_projection of layer {call.layer} got inputs of widths {found}, not {expected}"
        _require(found == expected, "projection", message)


def _check_covering(case: _Case) -> None:
    """If topk covers all blocks, the logits equal those of stock attention."""
    stock = case.logits(case.ids)
    with use_moba(case.model, COVERING):
        distance = _distance(case.logits(case.ids), stock)
    _require(distance <= _ROUNDING, "covering", f"with topk over all blocks, logits differ by {distance:.1e}")


def _check_sparse(case: _Case) -> None:
    """With a small topk, each eligible layer gives the same output as the reference on its q, k, v."""
    dense = case.logits(case.ids[:1])
    with use_moba(case.model, SMALL), capture(NAME) as calls:
        distance = _distance(case.logits(case.ids[:1]), dense)
    _require(distance > _DIFFERENT, "sparse", "a small topk changes nothing: MoBA did not run")
    rule: dict[str, Any] = {x: getattr(SMALL, x) for x in ("block_size", "topk", "sink_blocks")}
    for call in calls:
        if call.layer not in case.eligible:
            continue
        q, k, v = (x[0].transpose(0, 1) for x in (call.q, call.k, call.v))
        expected, _ = moba_attention_ref(q, k, v, softmax_scale=call.scaling, **rule)
        distance = _distance(call.out[0], expected)
        message = f"layer {call.layer} differs from the reference by {distance:.1e}"
        _require(distance <= _ROUNDING, "sparse", message)


def _check_stock_layers(case: _Case) -> None:
    """Stock layers give the same output as sdpa with its own mask on the same q, k, v."""
    with capture("sdpa") as stock:
        case.logits(case.ids[:1])
    masks = {call.module: call.mask for call in stock}
    for call in case.calls():
        if call.layer not in case.eligible:
            mask = masks[call.module]
            expected, _ = sdpa_attention_forward(call.module, call.q, call.k, call.v, mask, **call.kwargs)
            distance = _distance(call.out, expected)
            message = f"layer {call.layer} must stay stock, but differs by {distance:.1e}"
            _require(distance <= _ROUNDING, "stock_layers", message)


def _check_other_towers(case: _Case) -> None:
    """`patch_model` changes only the text model."""
    with use_moba(case.model, SMALL):
        for name, module in case.model.named_modules():
            config = getattr(module, "config", None)
            implementation = getattr(config, "_attn_implementation", None)
            text = config in (case.config, case.model.config)
            _require(text or implementation != NAME, "other_towers", f"{name or 'the model'} runs MoBA too")


def _check_padding(case: _Case) -> None:
    """A row padded on either side equals the row alone."""
    short = LENGTH - 24
    mask = torch.ones(2, LENGTH, dtype=torch.long)

    def side(left: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        real = slice(LENGTH - short, None) if left else slice(0, short)

        def ways() -> tuple[Tensor, Tensor]:
            padded, ids = mask.clone(), case.ids.clone()
            padded[1], ids[1] = 0, 0
            padded[1, real], ids[1, real] = 1, case.ids[1, :short]
            positions = (padded.cumsum(1) - 1).clamp(min=0)
            together = case.logits(ids, positions, attention_mask=padded)
            alone = case.logits(case.ids[:1])[0], case.logits(case.ids[1:, :short])[0]
            return torch.cat([together[0], together[1, real]]), torch.cat(alone)

        return ways

    case.agree("padding", side(left=True), "a left-padded batch must equal its rows alone")
    case.agree("padding", side(left=False), "a right-padded batch must equal its rows alone")


def _check_packing(case: _Case) -> None:
    """Packed documents give the same logits as each alone, or the call raises ValueError; they never mix."""
    cuts = [0, 20, 21, LENGTH]
    spans = list(pairwise(cuts))
    positions = torch.cat([torch.arange(end - begin) for begin, end in spans])[None]
    with use_moba(case.model, SMALL):
        alone = torch.cat([case.logits(case.ids[:1, begin:end])[0] for begin, end in spans])
        try:
            packed = case.logits(case.ids[:1], positions)[0]
        except ValueError as error:
            case.report.packing = str(error)
            return
    case.report.packing = "separate"
    distance = _distance(packed, alone)
    _require(distance <= _ROUNDING, "packing", f"packed documents differ from single ones by {distance:.1e}")


def _in_chunks(case: _Case, cache: Any, sizes: list[int]) -> Tensor:
    parts, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)[None]
        ids = case.ids[:1, start : start + size]
        parts.append(case.logits(ids, positions, **cache_kwargs(case.model, cache)))
        start += size
    return torch.cat(parts, dim=1)


def _check_chunked(case: _Case) -> None:
    """A prefill in chunks, with chunk borders inside blocks, equals one in a single call."""

    def ways() -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=case.model.config)
        return _in_chunks(case, cache, [26, 2, LENGTH - 28]), case.logits(case.ids[:1])

    case.agree("chunked", ways, "a prefill in chunks must equal one in a single call")


def _check_static_cache(case: _Case) -> None:
    """A static cache longer than the sequence gives the same as a dynamic one, in prefill and decode."""

    def ways() -> tuple[Tensor, Tensor]:
        static = StaticCache(config=case.model.config, max_cache_len=LENGTH + 19)
        dynamic = DynamicCache(config=case.model.config)
        sizes = [LENGTH - 3, 1, 1, 1]
        return _in_chunks(case, static, sizes), _in_chunks(case, dynamic, sizes)

    case.agree("static_cache", ways, "a static cache must equal a dynamic one")


def _check_generate(case: _Case) -> None:
    """Greedy generation gives stock's tokens if topk covers all blocks, and ignores padding."""
    stock = case.generate(case.ids)
    with use_moba(case.model, COVERING):
        tokens = case.generate(case.ids)
    _require(
        torch.equal(tokens, stock), "generate", f"{tokens.tolist()} differs from stock's {stock.tolist()}"
    )
    padded, mask = case.ids.clone(), torch.ones_like(case.ids)
    padded[1, :9], mask[1, :9] = 0, 0

    def ways() -> tuple[Tensor, Tensor]:
        together = case.generate(padded, attention_mask=mask)
        alone = [case.generate(case.ids[:1]), case.generate(case.ids[1:, 9:])]
        return together.float(), torch.cat(alone).float()

    case.agree("generate", ways, "a left-padded batch must generate what its rows generate alone")


def _check_swap(case: _Case) -> None:
    """Switching MoBA on and off restores the logits bit for bit, also after an error in `use_moba`."""
    before = case.logits(case.ids)
    patch_model(case.model, SMALL)
    on = case.logits(case.ids)
    unpatch_model(case.model)
    _require(torch.equal(case.logits(case.ids), before), "swap", "unpatch_model does not restore the logits")
    with suppress(KeyError), use_moba(case.model, SMALL):
        again = case.logits(case.ids)
        raise KeyError
    _require(torch.equal(again, on), "swap", "switching on a second time gives other logits")
    _require(torch.equal(case.logits(case.ids), before), "swap", "use_moba does not restore the logits")


def _check_save(case: _Case) -> None:
    """A model saved with `config.moba` and loaded with attn_implementation="moba" gives the same bits.

    Only fused experts may round differently, since their kernels depend on the memory layout of the weights.
    """
    key = case.adapter.nested_key(case.model.config)
    choice = NAME if key is None else {key: NAME}
    with tempfile.TemporaryDirectory() as folder, use_moba(case.model, SMALL):
        expected = case.logits(case.ids)
        case.model.save_pretrained(folder)
        loaded = type(case.model).from_pretrained(folder, attn_implementation=choice, dtype=torch.float32)
        text_config = case.adapter.text_config(loaded.config)
        kept = MobaConfig.from_dict(getattr(text_config, "moba", {}))
        _require(kept == SMALL, "save", f"config.moba came back as {kept}")
        weights = loaded.state_dict()
        for name, weight in case.model.state_dict().items():
            _require(torch.equal(weight, weights[name]), "save", f"{name} came back different")
        again = _Case(case.adapter, loaded.eval(), case.report).logits(case.ids)
    allowed = _ROUNDING if any(weight.ndim == 3 for weight in weights.values()) else 0.0
    distance = _distance(again, expected)
    _require(distance <= allowed, "save", f"the logits of the reloaded model differ by {distance:.1e}")


_CHECKS: list[Callable[[_Case], None]] = [
    _check_facts,
    _check_projection,
    _check_covering,
    _check_sparse,
    _check_stock_layers,
    _check_other_towers,
    _check_padding,
    _check_packing,
    _check_chunked,
    _check_static_cache,
    _check_generate,
    _check_swap,
    _check_save,
]


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest difference relative to the largest value; infinite for unequal shapes or non-finite values."""
    if first.shape != second.shape or not bool(first.isfinite().all() & second.isfinite().all()):
        return float("inf")
    return float((first - second).abs().max() / second.abs().max().clamp(min=1e-30))


def _call(name: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{name}: raised {type(error).__name__}: {error}") from error


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise AssertionError(f"{name}: {message}")
