"""The systemd unit: what systemd-analyze says of it, and that it agrees with the worker's own constants."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.shell import Shell
from worker import monitor, service, unit
from worker.cli import EXIT_CONFIG
from worker.config import CREDENTIAL_NAME
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

UNIT = Path(__file__).parents[2] / "deploy" / "letta-ingest.service"
MOST_EXPOSURE = 2.0

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here (Debian: the package systemd)"
)


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    """Commands; they reach no server."""
    folder = tmp_path / 'a "folder" of 100% $HOME'
    folder.mkdir()
    async with FakeLetta(seed=1) as letta:
        yield Shell(letta, folder, "sqlite:///letta-ingest.db")


def settings(text: str) -> dict[str, list[str]]:
    """The settings of a unit."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def analyze(*words: str | Path) -> str:
    """What systemd-analyze says, errors included; it must not fail."""
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
async def test_printed_unit_passes_verify(shell: Shell, tmp_path: Path) -> None:
    """`service-unit` prints a unit that systemd accepts without a word, whatever is in the configuration's path."""
    done = await shell.do("service-unit")
    assert done.code == 0, done.err
    printed = tmp_path / "letta-ingest.service"
    printed.write_text(done.out)
    assert analyze("verify", "--man=no", printed) == ""


@needs_systemd
def test_hardening_is_rated() -> None:
    """`systemd-analyze security` rates the unit's exposure 2.0 or better."""
    said = analyze("security", "--offline=yes", "--no-pager", UNIT)
    rated = re.search(r"Overall exposure level for letta-ingest\.service: ([\d.]+)", said)
    assert rated is not None, said
    assert float(rated[1]) <= MOST_EXPOSURE


async def test_printed_unit_names_this_installation(shell: Shell) -> None:
    """`service-unit` prints the unit of deploy/ with its own path and the configuration's, and warns of hidden ones."""
    done = await shell.do("service-unit")
    (command,) = settings(done.out)["ExecStart"]
    config = str(shell.folder / "config.toml").replace('"', r"\"").replace("%", "%%").replace("$", "$$")
    assert command == f'{unit.installed_executable()} run --config "{config}"'
    assert unit.installed_executable().is_file()
    changed = [
        pair for pair in zip(done.out.splitlines(), UNIT.read_text().splitlines(), strict=True) if len(set(pair)) > 1
    ]
    assert [now.partition("=")[0] for now, _ in changed] == ["ExecStart"]
    assert unit.is_hidden(shell.folder) == (str(shell.folder / "config.toml") in done.err)
    plain = await shell.do("service-unit", is_configured=False)
    assert settings(plain.out)["ExecStart"] == [f"{unit.installed_executable()} run --config {unit.CONFIG}"]
    absent = await shell.do("service-unit", "--config", "/absent.toml", is_configured=False)
    assert (absent.code, absent.out) == (EXIT_CONFIG, "")


@pytest.mark.parametrize(
    ("path", "is_hidden"),
    [("/opt/letta/bin/x", False), ("/home/me/x", True), ("/root/x", True), ("/tmp/x", True), ("/tmpfs/x", False)],
)
def test_hidden_paths(path: str, is_hidden: bool) -> None:  # noqa: FBT001
    """A path that ProtectHome= or PrivateTmp= hides from the service is known as such."""
    assert unit.is_hidden(Path(path)) == is_hidden


def test_unit_agrees_with_the_worker() -> None:
    """Times, exit status and credential of the unit are those the worker goes by."""
    values = {name: found[0] for name, found in settings(UNIT.read_text()).items()}
    assert values["Type"] == "notify"
    assert values["TimeoutStartSec"] == "infinity", "READY=1 waits for the server and the database"
    assert int(values["TimeoutStopSec"]) >= 2 * service.DRAIN_SECONDS
    assert 2 <= int(values["WatchdogSec"]) <= monitor.STUCK_SECONDS
    assert values["Restart"] == "always"
    assert values["RestartPreventExitStatus"] == str(EXIT_CONFIG)
    assert values["LoadCredential"].partition(":")[0] == CREDENTIAL_NAME
    assert values["ExecReload"].split()[1:] == ["-HUP", "$MAINPID"]
    assert (values["DynamicUser"], values["StateDirectory"]) == ("yes", "letta-ingest")
