"""The structure of the repository: layers, packages, public names, side effects of the import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moba_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moba_hf"

# Imports point down only: a module may import those on the lines below its own.
LAYERS = [
    {"bench"},
    {"calibrate", "plot_bench", "plots", "testing", "training", "__init__"},
    {"evaluate", "plot_style"},
    {"checkpoints.verify", "checkpoints.inspection", "hf.generation", "hf.saved_cache"},
    {"checkpoints.convert"},
    {"checkpoints.fingerprint"},
    {"checkpoints.load"},
    {"checkpoints.model_card"},
    {"checkpoints.changes", "checkpoints.measured"},
    {"checkpoints.model_config", "checkpoints.folders"},
    {"hf.patching", "hf.prefill"},
    {"probes"},
    {"hf.attention"},
    {"hf.layer_plan", "hf.mask", "hf.rope"},
    {"hf.rows"},
    {"hf.device_rows"},
    {"hf.layout"},
    {"hf.loading"},
    {"hf.cache", "hf.default_cache"},
    {"hf.dynamic_layer", "hf.static_layer"},
    {"hf.cache_layer", "hf.recent_queries"},
    {"op.shared_prompt"},
    {"hf.places", "hf.adapter", "hf.cache_names", "hf.identity", "hf.output_head", "hf.spans", "op.dense"},
    {"op.ops", "op.checks"},
    {"op.inputs"},
    {"op.block_means", "op.shared_ops"},
    {"op.operators"},
    {"op.triton_backend", "op.flash"},
    {"op.backends"},
    {"op.shared_backends"},
    {"op.shared_decode"},
    {
        "kernels",
        "op.portable",
        "op.portable_decode",
        "op.shared_portable",
        "op.shared_portable_backward",
        "op.shared_reference",
    },
    {"op.portable_select", "op.shared_problems"},
    {"op.shared"},
    {"op.reference", "op.sequences"},
    {"files", "progress"},
    {"hf.parallel", "hf.remote_code"},
    {"checkpoints.safetensors_files", "checkpoints.gguf_files", "checkpoints.context_length"},
    {"checkpoints.gguf_header"},
    {"config", "hf.cache_names"},
    {"op.layer_rule"},
    {"op.backend_table", "op.gates", "op.shared_rule"},
    {"op.declare", "op.numerics", "op.registry"},
]
# Packages whose modules have their own layers; any other package counts as one part.
SPLIT = {"hf", "op", "checkpoints"}
WITHOUT_TRANSFORMERS = {"op", "kernels", "config"}
MAX_FILE_BYTES = 1_000_000


def modules() -> list[Path]:
    """Python files of the package, except those behind the two links."""
    linked = (PACKAGE / "patches", PACKAGE / "configs")
    return [p for p in sorted(PACKAGE.rglob("*.py")) if not any(p.is_relative_to(link) for link in linked)]


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, except imports for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def part(path: Path) -> str:
    """The module or subpackage of moba_hf that a file belongs to."""
    first, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    return f"{first}.{rest[0]}" if first in SPLIT else first


def layer(name: str) -> int:
    """The line of `LAYERS` that names a module; lower layers come later in the list."""
    lines = [i for i, line in enumerate(LAYERS) if name in line]
    assert lines, f"moba_hf.{name} is in no layer: add it to LAYERS of tests/test_layout.py"
    return lines[0]


def ours(names: Iterator[str]) -> set[str]:
    """The modules of moba_hf among imported names; a public name belongs to "__init__"."""
    found = [name.split(".")[1:] for name in names if name.startswith("moba_hf.")]
    files = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    parts = {".".join(each[:2]) if each[0] in SPLIT else each[0] for each in found}
    return {name if name.split(".")[0] in files else "__init__" for name in parts}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
class TestImports:
    def test_point_down_only(self, path: Path) -> None:
        here = part(path)
        if here.endswith("__init__") and here != "__init__":  # of a split package: it only re-exports
            assert not ours(imports(path))
            return
        for name in ours(imports(path)) - {here, "configs", "patches"}:
            same_line = layer(name) == layer(here)
            assert layer(name) > layer(here) or same_line, f"{here} imports {name}, which is above it"

    def test_transformers_and_typer_stay_above(self, path: Path) -> None:
        packages = {name.split(".")[0] for name in imports(path)}
        if part(path).split(".")[0] in WITHOUT_TRANSFORMERS:
            assert "transformers" not in packages
        assert "typer" not in packages
        assert "moba_hf_cli" not in packages


@pytest.mark.parametrize("path", sorted((ROOT / "patches").glob("*.py")), ids=lambda p: p.name)
def test_patches_import_the_adapter_and_the_config_only(path: Path) -> None:
    assert ours(imports(path)) <= {"hf.adapter", "config"}


def test_packages_are_the_folders_on_disk() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in [PACKAGE, *PACKAGE.rglob("*")]
        if folder.is_dir() and folder.name != "__pycache__"
    }
    assert set(settings["packages"]) == {*folders, "moba_hf_cli"}
    for package, folder in settings["package-dir"].items():
        link = ROOT / package.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_public_names() -> None:
    assert moba_hf.__all__ == [
        "MobaCache",
        "MobaConfig",
        "convert_checkpoint",
        "moba_attention",
        "patch_model",
        "prefill",
        "select_blocks",
        "unpatch_model",
        "use_moba",
        "use_moba_cache",
    ]
    assert all(hasattr(moba_hf, name) for name in moba_hf.__all__)


def test_importing_registers_moba_wraps_three_methods_and_changes_nothing_else() -> None:
    """Compares transformers' tables and methods and torch's settings before and after, in a new process."""
    program = """
import json, warnings
import torch
import transformers
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def tables():
    return {
        "attention": {k: id(v) for k, v in ALL_ATTENTION_FUNCTIONS._global_mapping.items()},
        "mask": {k: id(v) for k, v in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.items()},
        "cache": {k: id(v) for k, v in getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {}).items()},
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "sdpa": id(torch.nn.functional.scaled_dot_product_attention),
        "model": {k: id(v) for k, v in vars(transformers.PreTrainedModel).items()},
    }

before = tables()
original = vars(transformers.PreTrainedModel)["from_pretrained"].__func__
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import moba_hf
wrapped = vars(transformers.PreTrainedModel)["from_pretrained"].__func__.__wrapped__ is original
print(json.dumps([before, tables(), wrapped]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after, wrapped = json.loads(result.stdout)
    for name in ("attention", "mask"):
        assert set(after[name]) == {*before[name], "moba"}
        del after[name]["moba"]
    methods = after.pop("model")
    changed = {name for name, method in before.pop("model").items() if methods[name] != method}
    assert changed == {"__init__", "from_pretrained", "save_pretrained"}, (
        "moba_hf.hf.loading wraps them alone"
    )
    assert wrapped, "it calls what was there before"
    assert after == before


def test_no_large_file_is_committed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    sizes = {n: (ROOT / n).stat().st_size for n in listed.split("\0") if n and (ROOT / n).is_file()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}
