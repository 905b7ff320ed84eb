"""What the README promises, and where it says that it is shown."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import msgspec

from outlive.common.config import Config
from outlive.scripts.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def functions_in(name: str) -> set[str]:
    """Return the names of the functions in test files of this name, in whichever folder."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob(name)]
    nodes = [node for tree in trees for node in tree.body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_promise_names_a_test_that_exists() -> None:
    text = section("What holds")
    promises = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    lists = dict(re.findall(r"^(\d+)\. ((?:.+\n)(?: +`.+\n)*)", text, re.MULTILINE))
    assert promises == [str(number) for number in range(1, len(promises) + 1)]
    assert list(lists) == promises
    for number, named in lists.items():
        shown = re.findall(r"`(\w+\.py)::(\w+)`", named)
        assert shown, f"{number} names no test"
        assert named.count("`") == 2 * len(shown), f"{number} names something else"
        for file, test in shown:
            assert test in functions_in(file), f"{number}: {file}::{test}"


def test_each_key_of_the_configuration_is_there_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`?(.*?)`?)? ?\|", section("Configuration"), re.MULTILINE)
    defaults = {name: "" if value is None else value for name, value in msgspec.structs.asdict(Config()).items()}
    shown = {name: f'"{value}"' if value and isinstance(value, str) else value for name, value in defaults.items()}
    assert dict(rows) == {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in shown.items()
    }


def test_each_command_is_there() -> None:
    text = section("The command line")
    assert [name for name in cli.commands if f"`{name}" not in text] == []
