"""README.md of a converted checkpoint: the card of its source plus a section about its MoBA settings.

Our section is between two marks. The rest of the source's card is kept byte for byte, except that missing
entries are added to its front matter. Another conversion replaces only our section.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from moba_hf.checkpoints.changes import Changes
from moba_hf.checkpoints.measured import plain
from moba_hf.checkpoints.safetensors_files import read_json_object
from moba_hf.config import MobaConfig
from moba_hf.hf.loading import RECORD

CARD = "README.md"
_TAG = "moba"
_OPENS, _END = "<!-- moba-hf: begin", "<!-- moba-hf: end -->"
_BEGIN = f"{_OPENS}; converting the checkpoint again replaces this section -->"
_BOM = "\ufeff"


@dataclass(frozen=True)
class Card:
    """The contents of our section of a card, apart from the settings.

    Attributes:
        source: name of the source.
        made_by: the commands or calls that made the checkpoint, in order.
        weights: what happened to the weights of the source.
        loader: the class of transformers that loads the checkpoint.
        base_model: "owner/name" of the source on the Hub, for the metadata; "": unknown.
        cost: a Markdown table of measurements; "": none.
    """

    source: str
    made_by: tuple[str, ...]
    weights: str = "its weights unchanged"
    loader: str = "AutoModelForCausalLM"
    base_model: str = ""
    cost: str = ""

    def section(self, changes: Changes) -> str:
        """Our section of the card, including its marks, for a checkpoint with these changes."""
        moba = changes.moba
        parts = [
            _BEGIN,
            "## MoBA",
            f"`{plain(self.source)}`, {self.weights}, set up to use MoBA (Mixture of Block Attention, "
            "[arXiv 2502.13189](https://arxiv.org/abs/2502.13189)) with the package `moba_hf`.",
            " ".join(_words(changes)),
            f"`moba` in `config.json`:\n\n{_fenced('json', json.dumps(moba.to_dict(), indent=2))}",
            "### Load it",
            *_loading(self.loader, changes.remote_code),
        ]
        if self.cost:
            parts += ["### What it costs", self.cost, "Measured with `moba-hf eval` for these settings."]
        parts += [
            "### How it was made",
            *(_fenced(_language(call), plain(call)) for call in self.made_by),
            _END,
        ]
        return "\n\n".join(parts)

    def metadata(self) -> dict[str, Any]:
        """Our entries of the front matter."""
        named = {"base_model": self.base_model} if self.base_model else {}
        return {"library_name": "transformers", **named, "tags": [_TAG]}

    def text(self, source_text: str | None, section: str) -> str:
        """The complete card.

        Args:
            source_text: the card of the source; None: it has none.
            section: our section.

        Raises:
            ValueError: the marks of our section in `source_text` are incomplete.
        """
        given = source_text or ""
        mark = _BOM if given.startswith(_BOM) else ""
        given = given.removeprefix(mark)
        newline = "\r\n" if "\r\n" in given else "\n"
        front, rest = _with_front_matter(given, self.metadata(), newline)
        section = section.replace("\n", newline)
        place = _find_section(rest)
        if place is not None:
            return mark + front + rest[: place[0]] + section + rest[place[1] :]
        gap = newline if rest and not rest.startswith(("\n", "\r")) else ""
        return mark + front + newline + section + newline + gap + rest

    def record(self, section: str) -> dict[str, Any]:
        """The entries of a folder's record that `recorded` reads."""
        known = {name: value for name, value in asdict(self).items() if value}
        source = known.pop("source")
        return {"source": source, "card": {**known, "sha256": _digest(section)}}

    @classmethod
    def recorded(cls, folder: Path) -> tuple[Card, str] | None:
        """The `Card` of a converted folder and the hash of our section; None: the folder has no card.

        Raises:
            ValueError: the record of the folder is damaged.
        """
        path = folder / RECORD
        record = read_json_object(path) if path.is_file() else {}
        if "card" not in record:
            return None
        try:
            found = {"source": record["source"], **record["card"]}
            digest = found.pop("sha256")
            return cls(**{**found, "made_by": tuple(map(str, found["made_by"]))}), digest
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: its entry 'card' is invalid ({type(error).__name__}: {error})"
            ) from error


def read_card(folder: Path) -> str | None:
    """The card in a folder; None: there is none.

    Raises:
        ValueError: it is not UTF-8 text, or the marks of our section are incomplete or in the front matter.
    """
    path = folder / CARD
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, but the model card needs this name")
    if not path.exists():
        return None
    try:
        text = path.read_bytes().decode()
        place, front = _find_section(text), REGEX_YAML_BLOCK.search(text.removeprefix(_BOM))
        if place is not None and front is not None and place[0] < front.end():
            raise ValueError(f"the mark '{_OPENS} ... -->' must not be in the front matter")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return text


def check_card(folder: Path, source: Path | None) -> bool:
    """Returns whether the conversion wrote a card into `folder`, and if so, checks the card.

    Args:
        folder: the converted folder.
        source: the folder of the source; None: a source without a card.

    Raises:
        ValueError: our section is not the recorded one, or the rest is not the card of the source.
    """
    recorded, path = Card.recorded(folder), folder / CARD
    if recorded is None:
        return False
    card, digest = recorded
    text = read_card(folder)
    if text is None:
        raise ValueError(f"{path}: is missing")
    place = _find_section(text)
    section = "" if place is None else text[slice(*place)].replace("\r\n", "\n")
    if _digest(section) != digest:
        raise ValueError(f"{path}: the section between the moba-hf marks has been changed")
    if text != card.text(None if source is None else read_card(source), section):
        raise ValueError(f"{path}: differs from the source outside the moba-hf marks")
    return True


def with_settings(folder: Path, moba: MobaConfig, call: str) -> dict[Path, str]:
    """The new contents of the files that name the settings of a converted folder, for other settings.

    Measurements are omitted, because they belong to the previous settings.

    Args:
        folder: the converted folder.
        moba: the new settings, which are also written to config.json.
        call: the command or call that sets them.

    Returns:
        Text by path; empty if no conversion wrote a card or our section was removed from it.

    Raises:
        ValueError: the card or the record is damaged.
    """
    recorded, text = Card.recorded(folder), read_card(folder)
    if recorded is None or text is None or _find_section(text) is None:
        return {}
    card = replace(recorded[0], made_by=(*recorded[0].made_by, call), cost="")
    section = card.section(Changes.recorded(folder, moba))
    record = {**read_json_object(folder / RECORD), **card.record(section)}
    return {
        folder / CARD: card.text(text, section),
        folder / RECORD: json.dumps(record, indent=2) + "\n",
    }


def config_call(moba: MobaConfig) -> str:
    """A Python expression for the settings, without `backend`, which is not stored in checkpoints."""
    values = {
        one.name: (getattr(moba, one.name), one.default) for one in fields(moba) if one.name != "backend"
    }
    given = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
    return f"MobaConfig({', '.join(given)})"


def _digest(section: str) -> str:
    return hashlib.sha256(section.encode()).hexdigest()


def _find_section(text: str) -> tuple[int, int] | None:
    """Begin and end of our section; None: there is none. Raises ValueError if its marks do not match."""
    begin, end = text.find(_OPENS), text.find(_END)
    if begin < 0 and end < 0:
        return None
    if not 0 <= begin < end or text.count(_OPENS) != 1 or text.count(_END) != 1:
        raise ValueError(f"the marks '{_OPENS} ... -->' and '{_END}' must occur once, in this order")
    return begin, end + len(_END)


def _with_front_matter(text: str, wanted: dict[str, Any], newline: str) -> tuple[str, str]:
    """The front matter of a card, with the missing `wanted` entries added, and the rest of the card."""
    found = REGEX_YAML_BLOCK.search(text)
    if found is None:
        return f"---{newline}{ModelCardData(**wanted).to_yaml(newline)}{newline}---{newline}", text
    head, block, tail, end = found.groups()
    return head + _completed(block, wanted, newline) + tail + ("" if end else newline), text[found.end() :]


def _completed(block: str, wanted: dict[str, Any], newline: str) -> str:
    """Adds missing entries to the YAML of a front matter.

    Lines are only added, not rewritten, because parsing and dumping YAML loses comments and turns the
    language "no" into `false`. If a line cannot be added, the block stays unchanged.
    """
    known = _metadata(block)
    if known is None:
        return block
    lacking = {
        name: value for name, value in wanted.items() if not re.search(rf"(?m)^['\"]?{name}['\"]?\s*:", block)
    }
    if lacking:
        lines = ModelCardData(**lacking).to_yaml(newline)
        longer = f"{block}{newline}{lines}" if block.strip() else lines
        if _is_same(_metadata(longer), {**known, **lacking}):
            block, known = longer, {**known, **lacking}
    tags = known.get("tags")
    if isinstance(tags, list) and _TAG not in tags:
        longer = re.sub(r"(?m)^(tags:[ \t]*\r?\n)([ \t]*)- ", rf"\1\2- {_TAG}{newline}\2- ", block, count=1)
        longer = re.sub(r"(?m)^tags:[ \t]*\[", f"tags: [{_TAG}, ", longer, count=1)
        if _is_same(_metadata(longer), {**known, "tags": [_TAG, *tags]}):
            return longer
    return block


def _is_same(found: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether two front matters have the same entries.

    They are compared as YAML, which writes a shared value once: `==` would follow every alias, which takes
    forever with aliases of aliases and never ends with an alias of itself.
    """
    return found is not None and yaml_dump(found) == yaml_dump(wanted)


def _metadata(block: str) -> dict[str, Any] | None:
    """The entries of a front matter; None: it is invalid."""
    try:
        found: dict[str, Any] = ModelCard(f"---\n{block}\n---\n", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # invalid YAML, values of a wrong type, invalid names
        return None
    return found


def _words(changes: Changes) -> list[str]:
    """The settings in sentences."""
    moba = changes.moba
    if moba.tile > 1:
        most = "" if moba.topk is None else f", at most {moba.topk}"
        found = [
            f"Each tile of {moba.tile} neighbouring queries attends to the blocks of {moba.block_size:,} "
            f"tokens with at least {moba.threshold:g} times the largest attention mass{most}. This is not "
            "the paper's MoBA."
        ]
        found += [f"One query in {moba.sample} is used to choose for its tile."] if moba.sample > 1 else []
        found += (
            [f"Queries before position {moba.dense_below:,} attend to every key."] if moba.dense_below else []
        )
    else:
        found = [
            f"A query attends to at most {moba.topk} blocks of {moba.block_size:,} tokens, including its own."
        ]
        if moba.gate != "mean":
            found += [f"Blocks are scored by their {moba.gate}, which is not the paper's MoBA."]
    kept = [("first", moba.sink_blocks), ("preceding", moba.local_blocks)]
    always = " and ".join(f"the {count} {name}" for name, count in kept if count)
    found += [f"Always attended: {always}."] if always else []
    if moba.full_attention_layers:
        layers = ", ".join(map(str, moba.full_attention_layers))
        found += [f"Layers that keep full attention: {layers} (negative numbers count from the last layer)."]
    if moba.layers:
        found += [f"Layers with their own settings: {', '.join(str(index) for index, _ in moba.layers)}."]
    reads = "attends to every cached key" if moba.decode == "full" else "chooses blocks too"
    found += [f"Reading a prompt is sparse; generating a token {reads}."]
    if changes.context is not None:
        found += [
            f"The context is extended to {changes.context.length:,} tokens (rope: {changes.context.rope}), "
            "which reduces quality until the model is trained on it."
        ]
    return found


def _loading(loader: str, remote_code: bool) -> list[str]:
    """How to load the checkpoint, with and without the package."""
    auto = f"from transformers import {loader}"
    load = f'model = {loader}.from_pretrained("path/to/this/folder"'
    parts = [
        "With MoBA (`pip install moba-hf`):",
        _fenced("python", f"import moba_hf\n{auto}\n\n{load})"),
    ]
    if remote_code:
        parts += [
            "The same without the import, through the module in this folder; `moba-hf` must be installed:",
            _fenced("python", f"{auto}\n\n{load}, trust_remote_code=True)"),
        ]
    return [
        *parts,
        "Without `moba_hf`, the same weights with full attention:",
        _fenced("python", f'{auto}\n\n{load}, attn_implementation="sdpa")'),
    ]


def _language(call: str) -> str:
    return "bash" if call.startswith("moba-hf ") else "python"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
