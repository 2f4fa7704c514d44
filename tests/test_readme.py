"""The README and the pages of docs/: their commands exist, their links lead somewhere.

`test_recipes.py` runs the code of the README.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from moba_hf_cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINES = 170


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a given language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """The shell lines of a page, with continued lines joined and comments removed."""
    text = "".join(fenced(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Options and values of `moba-hf` parse, scripts exist, and `make` has the targets."""
    group: Any = typer.main.get_command(app)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(page):
        program, *args = command
        if program == "moba-hf" and args[0].startswith("--"):
            continue
        if program == "moba-hf":
            chosen = group.commands[args[0]]
            with chosen.make_context(args[0], args[1:], resilient_parsing=False) as context:
                assert context.params is not None
        elif program == "make":
            assert args[0] in targets, command
        elif program == "python":
            assert (ROOT / args[0]).is_file() or args[0] == "-m", command
        else:
            assert program in ("pip", "torchrun"), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_inline_scripts_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for script in re.findall(r"`(?:python )?((?:tests|examples)/[\w/]+\.(?:py|ipynb))", text):
        assert (ROOT / script).exists(), script


def test_presets_of_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:default|fine|paper)[\w-]*)`", (ROOT / "README.md").read_text()))
    assert named == {path.stem for path in (ROOT / "configs").glob("*.json")}
    assert os.listdir(ROOT / "docs")
