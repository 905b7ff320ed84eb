"""What the README says about agents: snippets that a client can read, and tools that exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from outlive.scripts.cli import cli
from outlive.scripts.doors.bridge import PROGRESS_PAUSE, SILENCE_MAX
from outlive.scripts.doors.catalogue import TOOLS
from outlive.scripts.doors.endpoint import PATH, TOKEN_VARIABLE

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Agents through MCP\n")[1].split("\n## ")[0]

FENCED = re.findall(r"^```(json|toml)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
SNIPPETS = [
    *((kind, text) for kind, text in FENCED),
    *(("json", text) for text in re.findall(r"`(\{.*\})` \|$", SECTION, re.M)),
]
SHELL = re.findall(r"`((?:claude|codex) mcp add .*?)`", SECTION)
COMMAND_LINES = re.findall(r"`(outlive mcp [^`]*)`", SECTION)


def server_of(kind: str, text: str) -> dict[str, Any]:
    """Return what a snippet says of the server `outlive`."""
    snippet = tomllib.loads(text) if kind == "toml" else json.loads(text)
    ((key, servers),) = snippet.items()
    assert key in ("mcpServers", "servers", "mcp_servers", "mcp")
    ((name, server),) = servers.items()
    assert name == "outlive"
    assert isinstance(server, dict)
    return server


def understood(words: list[str]) -> None:
    """Have the command line understand `outlive WORDS`."""
    assert words[:2] == ["outlive", "mcp"], words
    cli.commands["mcp"].make_context("mcp", words[2:])


@pytest.mark.parametrize(("kind", "text"), SNIPPETS)
def test_each_snippet_is_what_its_client_reads(kind: str, text: str) -> None:
    server = server_of(kind, text)
    if "url" in server:
        assert server["url"].endswith(PATH)
        assert server["headers"] == {"Authorization": f"Bearer ${{{TOKEN_VARIABLE}}}"}
    elif isinstance(server["command"], list):
        understood(server["command"])
    else:
        understood([server["command"], *server["args"]])


def test_there_are_snippets_for_the_clients_that_are_named() -> None:
    assert len(SNIPPETS) == 5
    assert len(SHELL) == 2
    for line in SHELL:
        client, _, command = line.partition(" -- ")
        assert client.split()[1:] == ["mcp", "add", "outlive"]
        understood(command.split())
    assert COMMAND_LINES
    for line in COMMAND_LINES:
        understood(line.split())


def test_each_tool_is_there_and_what_is_mapped_to_is_one() -> None:
    tables = SECTION.split("|---|---|\n")
    assert re.findall(r"^\| `(\w+)` \|", tables[2], re.MULTILINE) == list(TOOLS)
    arguments = {name for tool in TOOLS.values() for name in tool.to_builtins()["inputSchema"]["properties"]}
    for row in re.findall(r"^\| .* \| (.*) \|$", tables[3], re.MULTILINE):
        for word in re.findall(r"`(\w+)`", row):
            assert word in TOOLS or word in arguments or word == "bash", row


def test_the_numbers_are_those_of_the_bridge() -> None:
    assert f"longer than {SILENCE_MAX:.0f} seconds" in SECTION
    assert f"every {PROGRESS_PAUSE:.0f} seconds" in SECTION
