"""Nothing is installed with the worker that nobody decided on: the part of an audit that needs no network."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILDERS = {"pip", "hatchling", "editables", "trove-classifiers", "tomlkit"}
"""They make the package, and what they need for it."""


def pinned() -> dict[str, Version]:
    """The versions of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+]+)", line) for line in lines]
    assert all(pairs), "a pin is `name==version`, without an index, a path, a hash or a range"
    return {canonicalize_name(pair[1]): Version(pair[2]) for pair in pairs if pair}


def decided(section: str) -> set[str]:
    """The packages a section of docs/dependencies.md says yes to, or names at all."""
    text = (ROOT / "docs" / "dependencies.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|([^|]*)\|", text, re.MULTILINE)[1:]
    said_yes = [names for names, verdict in rows if not set(names) <= set("- ") and "**no**" not in verdict]
    return {
        canonicalize_name(Requirement(name).name) for names in said_yes for name in re.split(r",\s*(?=\S+$)", names)
    }


def direct() -> set[str]:
    """What the worker itself needs."""
    return {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}


def groups() -> list[str]:
    """What development needs besides."""
    return [text for name in ("test", "check") for text in PROJECT["dependency-groups"][name]]


def needed_by(requirements: Iterable[str]) -> dict[str, set[str]]:
    """Every package these need here, with what they are asked to be; by what the installed ones say of themselves."""
    found: dict[str, set[str]] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        asked, extra = waiting.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        is_new = name not in found
        found.setdefault(name, set()).add(str(asked.specifier))
        for wanted in {"", *asked.extras} if is_new or asked.extras else ():
            waiting += [(Requirement(text), wanted) for text in metadata.requires(asked.name) or ()]
    return found


def test_each_dependency_is_decided_on() -> None:
    """docs/dependencies.md gives a reason for each package the worker needs, and for no other."""
    assert decided("At run time") == direct()


def test_nothing_else_is_installed_with_it() -> None:
    """constraints.txt names what the dependencies need, and nothing that no dependency needs."""
    needed = needed_by([*PROJECT["project"]["dependencies"], *groups()])
    assert needed.keys() <= pinned().keys()
    assert pinned().keys() - needed.keys() == BUILDERS


def test_pins_are_what_is_allowed() -> None:
    """Each pinned version is one that all who need the package allow: CI tests what a user may get."""
    versions = pinned()
    needed = needed_by([*PROJECT["project"]["dependencies"], *groups()])
    for name, asked in needed.items():
        for specifier in asked:
            assert Requirement(f"{name}{specifier}").specifier.contains(versions[name], prereleases=True), name


def test_worker_imports_only_what_it_declares() -> None:
    """No module leans on a package that is there only because another one needs it."""
    owners = metadata.packages_distributions()
    imported: dict[str, str] = {}
    for path in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "migrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            imported |= {module.split(".")[0]: str(path.relative_to(ROOT)) for module in modules}
    for module, path in imported.items():
        if module not in {*sys.stdlib_module_names, "worker", "__future__"}:
            names = {canonicalize_name(name) for name in owners.get(module, [module])}
            assert names & direct(), f"{path} imports {module}"
