"""Writes the tables of docs/ that are made of the code: `make reference`. tests/test_reference.py compares.

A page has a place for each, between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is by hand.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from typer.core import TyperOption
from typer.main import get_command

from worker.cli import cli
from worker.config import Config
from worker.logs import EVENTS, LINES_A_MINUTE

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def events() -> str:
    """The log events."""
    lines = ["| event | level | fields | meaning |", "| --- | --- | --- | --- |"]
    for name, event in EVENTS.items():
        fields = ", ".join(f"`{field}`" for field in event.fields.split())
        repeated = f" (at most {LINES_A_MINUTE} a minute)" if event.is_repeated else ""
        lines.append(f"| `{name}` | {', '.join(event.levels.split())} | {fields} | {event.meaning}{repeated} |")
    return "\n".join(lines)


def commands() -> str:
    """Every command with its options."""
    group: Any = get_command(cli)
    context = group.make_context("letta-ingest", [], resilient_parsing=True)
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        lines = [f"## {name}\n", inspect.cleandoc(command.help or ""), "", "| option | meaning |", "| --- | --- |"]
        for option in command.params:
            if isinstance(option, TyperOption):
                written = ", ".join(f"`{word}`" for word in option.opts)
                value = "" if option.is_flag else f" `{(option.metavar or option.name).upper()}`"
                default = "" if option.is_flag or option.default is None else f" (default {option.default})"
                lines.append(f"| {written}{value} | {option.help}{default} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def configuration() -> str:
    """Every setting with its default, from the code, and its reason, from the example."""
    parts = []
    reasons = reasons_of(DOCS.parent / "config.example.toml")
    for section, field in Config.model_fields.items():
        model: Any = field.annotation
        lines = [f"## {section}\n", "| key | default | meaning |", "| --- | --- | --- |"]
        for key, setting in model.model_fields.items():
            default = setting.default.get_secret_value() if key == "url" else setting.default
            shown = "" if default is None else f"`{json.dumps(default)}`".replace("()", "[]")
            lines.append(f"| `{key}` | {shown} | {reasons[f'{section}.{key}']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def reasons_of(example: Path) -> dict[str, str]:
    """What the example says of each setting: the comment of its paragraph, below the section's heading."""
    found: dict[str, str] = {}
    section = ""
    for paragraph in example.read_text().split("\n\n"):
        prose, names = list[str](), list[str]()
        for line in paragraph.splitlines():
            if heading := re.fullmatch(r"\[(\w+)\]", line):
                section, prose = heading[1], []
            elif setting := re.match(r"(?:# )?(\w+) = ", line):
                names.append(setting[1])
            else:
                prose.append(line.removeprefix("# "))
        found |= {f"{section}.{name}": " ".join(prose).rstrip(":") for name in names}
    return found


TABLES = {"events": events, "commands": commands, "configuration": configuration}


def generated(page: str) -> str:
    """The page with its tables as the code knows them. Raises KeyError for a table that nobody makes."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> None:
    """Write every page anew that has such a place."""
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text()
        if page != generated(page):
            path.write_text(generated(page))
            print(f"{path.name} is renewed")


if __name__ == "__main__":
    main()
