"""The packages as a user gets them: built, installed with pip into an empty virtualenv, run far from the checkout.

The wheel is built from the sdist, so what is missing in the one is missing in the other.

`make wheel` and .ci/run call it. It is a campaign because it downloads every dependency.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

CONFIG = """
[letta]
base_url = "http://127.0.0.1:1"

[watch]
all = true

[storage]
url = "sqlite:///{database}"
"""

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not the checkout, and knows nothing of it."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def sdist(elsewhere: Path) -> Path:
    """The source distribution of this checkout, unpacked; made by the hook that every builder calls (PEP 517)."""
    _run(elsewhere, sys.executable, "-m", "pip", "install", "--quiet", "--target", "builder", "hatchling")
    hook = f"import sys; sys.path.insert(0, {str(elsewhere / 'builder')!r}); from hatchling.build import build_sdist"
    _run(CHECKOUT, sys.executable, "-c", f"{hook}; build_sdist({str(elsewhere / 'dist')!r})")
    (built,) = (elsewhere / "dist").glob("letta_ingest-*.tar.gz")
    with tarfile.open(built) as archive:
        archive.extractall(elsewhere / "source", filter="data")
    (unpacked,) = (elsewhere / "source").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(elsewhere: Path, sdist: Path) -> Path:
    """The wheel, built from the sdist."""
    _run(elsewhere, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", sdist)
    (built,) = (elsewhere / "dist").glob("letta_ingest-*.whl")
    return built


@pytest.fixture(scope="module")
def programs(elsewhere: Path, wheel: Path) -> Path:
    """The programs of a virtualenv that held nothing but pip before the wheel came."""
    venv.create(elsewhere / "venv", with_pip=True)
    programs = elsewhere / "venv" / "bin"
    _run(elsewhere, programs / "python", "-m", "pip", "install", "--quiet", wheel)
    return programs


def test_sdist_holds_what_is_needed_to_work_on_it(sdist: Path) -> None:
    """The sdist holds every file that is kept in git, the hidden ones aside, and its tests run from there."""
    kept = set(_run(CHECKOUT, "git", "ls-files").splitlines())
    missing = {name for name in kept if not name.startswith(".") and not (sdist / name).exists()}
    assert missing == set()
    assert (sdist / "PKG-INFO").exists()
    chosen = ("tests/test_config.py", "tests/test_reference.py", "tests/core/test_sse.py")
    assert " passed" in _run(sdist, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    """The wheel holds the worker with its migrations, and neither tests nor tools."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"worker", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert "worker/migrations/env.py" in names
    assert any(name.startswith("worker/migrations/versions/") for name in names)
    assert {"worker/py.typed", "worker/letta-ingest.service"} <= set(names)
    parts = ("page.css", "page.js", "status.html", "transcript.html")
    assert {f"worker/page/{part}" for part in parts} <= set(names)


def test_installed_command_helps(elsewhere: Path, programs: Path) -> None:
    """The installed `letta-ingest --help` lists its commands and exits 0."""
    assert "migrate" in _run(elsewhere, programs / "letta-ingest", "--help")


def test_installed_command_prints_its_unit(elsewhere: Path, programs: Path) -> None:
    """The installed `letta-ingest service-unit` prints the unit from inside the wheel, with its own path."""
    said = _run(elsewhere, programs / "letta-ingest", "service-unit")
    assert f"ExecStart={programs}/letta-ingest run --config /etc/letta-ingest/config.toml" in said


def test_installed_command_says_its_versions(elsewhere: Path, programs: Path) -> None:
    """The installed `letta-ingest --version` names the version of the package that was built."""
    said = _run(elsewhere, programs / "letta-ingest", "--version").splitlines()
    assert said[0] == f"letta-ingest {version('letta-ingest')}"


def test_installed_package_is_typed(elsewhere: Path, programs: Path) -> None:
    """A type checker takes the types of the installed package for what they are."""
    (elsewhere / "user.py").write_text("from worker.core.sse import SseDecoder\n\nSseDecoder(max_event_bytes='no')\n")
    checker = (sys.executable, "-m", "mypy", "--python-executable", str(programs / "python"), "user.py")
    with pytest.raises(AssertionError, match=r'"SseDecoder" has incompatible type "str"; expected "int"'):
        _run(elsewhere, *checker)


def test_installed_command_migrates(elsewhere: Path, programs: Path) -> None:
    """The installed `letta-ingest migrate` makes the schema from the migrations inside the wheel."""
    database = elsewhere / "letta-ingest.db"
    (elsewhere / "config.toml").write_text(CONFIG.format(database=database))
    _run(elsewhere, programs / "letta-ingest", "migrate", "--config", "config.toml")
    with sqlite3.connect(database) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    assert {"runs", "chunks", "gaps", "rejects", "messages"} <= tables


def test_image_copies_what_the_package_needs(elsewhere: Path) -> None:
    """The package can be built, complete, from the files that deploy/Containerfile copies."""
    context = elsewhere / "context"
    for line in re.findall(r"^COPY (?!--from)(.*)$", (CHECKOUT / "deploy" / "Containerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            to = context / source if target == "./" else context / target
            to.parent.mkdir(parents=True, exist_ok=True)
            if (CHECKOUT / source).is_dir():
                shutil.copytree(CHECKOUT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(CHECKOUT / source, to)
    _run(elsewhere, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "copied", context)
    (copied,) = (elsewhere / "copied").glob("letta_ingest-*.whl")
    (built,) = (elsewhere / "dist").glob("letta_ingest-*.whl")
    assert set(zipfile.ZipFile(copied).namelist()) == set(zipfile.ZipFile(built).namelist())


def _run(folder: Path, *command: str | Path) -> str:
    """Run a command in the folder without our own virtualenv or import path, and return what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited {done.returncode}:\n{done.stdout}"
    return done.stdout
