"""What a conversion changes in config.json, and how the folder records it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_hf.checkpoints.context_length import CHANGED, ContextLength, with_context
from moba_hf.checkpoints.model_config import CONFIG, with_moba
from moba_hf.checkpoints.safetensors_files import read_json_object
from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.loading import RECORD, auto_class
from moba_hf.hf.remote_code import AUTO_MAP, MODULE, auto_map, module_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OPTION = "--remote-code (remote_code=True)"
_INSTEAD = "convert without it, and load with 'import moba_hf'"


@dataclass(frozen=True)
class Changes:
    """What a conversion changes.

    Attributes:
        moba: the settings to store.
        context: a longer context; None: unchanged.
        remote_code: add the module that lets `trust_remote_code=True` load the checkpoint.
    """

    moba: MobaConfig
    context: ContextLength | None = None
    remote_code: bool = False

    @classmethod
    def recorded(cls, folder: Path, moba: MobaConfig) -> Changes:
        """The changes that a converted folder records; `moba` is from its config.json.

        Raises:
            ValueError: the record is damaged.
        """
        path = folder / RECORD
        record = read_json_object(path) if path.is_file() else {}
        known = record.get("context")
        try:
            context = None if known is None else ContextLength(**known)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: its entry 'context' is invalid ({error})") from error
        return cls(moba, context, record.get("remote_code") is True)

    def record(self) -> dict[str, Any]:
        """The record that `recorded` reads, with the entries of config.json that change."""
        names = [NAME, "attn_implementation"]
        names += CHANGED if self.context else ()
        names += [AUTO_MAP] if self.remote_code else ()
        return {
            "changed": {CONFIG: names},
            **({"context": asdict(self.context)} if self.context else {}),
            **({"remote_code": True} if self.remote_code else {}),
        }

    def apply(self, values: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
        """The JSON of a config with the changes.

        Args:
            values: the JSON of config.json; not modified.
            config: the config that transformers reads from it.

        Raises:
            ValueError: the context cannot be extended, or no module can load the model.
        """
        adapter = find_adapter(config.model_type)
        key = adapter.nested_key(config)
        longer = with_context(values, adapter.text_config(config), self.context, key)
        converted = with_moba(longer, self.moba, key)
        return {**converted, AUTO_MAP: auto_map(*_classes(config))} if self.remote_code else converted

    def module(self, config: PreTrainedConfig) -> str | None:
        """The source of the module for `config`; None: no module is wanted."""
        return module_text(*_classes(config)) if self.remote_code else None


def check_no_code(source: Path, files: Iterable[Path], config: PreTrainedConfig) -> None:
    """Raises ValueError if the source contains code, which our module would replace or make trusted.

    Args:
        source: the folder; the module of an earlier conversion is accepted.
        files: its files, relative to it.
        config: its config.
    """
    classes = _classes(config)
    found, wanted = getattr(config, AUTO_MAP, None), auto_map(*classes)
    if found is not None and found != wanted:
        raise ValueError(
            f"{source / CONFIG}: already has an auto_map ({found}), which {_OPTION} would replace; {_INSTEAD}"
        )
    for name in sorted(files):
        code = name.suffix == ".py" and name.parent == Path()
        if code and (str(name) != MODULE or (source / name).read_bytes() != module_text(*classes).encode()):
            raise ValueError(
                f"{source / name}: is code of the source, which trust_remote_code=True would run too, so "
                f"{_OPTION} is not allowed; {_INSTEAD}"
            )
        # of the tokenizer or processor, which may also be code of another repository
        settings = name.suffix == ".json" and name.stem.endswith("_config") and name.parent == Path()
        if settings and AUTO_MAP in read_json_object(source / name):
            raise ValueError(
                f"{source / name}: has an auto_map, whose code trust_remote_code=True would run too, so "
                f"{_OPTION} is not allowed; {_INSTEAD}"
            )


def loading_class(config: PreTrainedConfig) -> str:
    """Name of the class of transformers that loads a model of `config`: an auto class if possible."""
    import transformers

    auto, given, named = _class_names(config)
    return auto if named == given or not hasattr(transformers, str(named)) else str(named)


def _classes(config: PreTrainedConfig) -> tuple[str, str]:
    """The auto class that loads a model of `config`, and the class that it returns.

    Raises:
        ValueError: config.json names another class.
    """
    auto, given, named = _class_names(config)
    if given is None or named != given:
        raise ValueError(
            f"{_OPTION} is for models that {auto} loads ({given}), but this checkpoint is a {named}; "
            f"{_INSTEAD}"
        )
    return auto, given


def _class_names(config: PreTrainedConfig) -> tuple[str, str | None, str | None]:
    """The auto class for a config, the class that it returns, if any, and the class in config.json."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    auto = auto_class(config).__name__
    tables: dict[str, Any] = {
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    table = tables[auto]
    given = table[type(config)].__name__ if type(config) in table else None
    return auto, given, (getattr(config, "architectures", None) or [given])[0]
