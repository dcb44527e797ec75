"""Every deliberate bug of mutants.py, planted in a copy of the project, is noticed by the very test that names it.

`make mutants` runs it. A mutant is killed only if its test was really run and failed in its own body, by the exception
the table says; an error while collecting, a missing test or a broken fixture kills nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.mutants.mutants import MUTANTS, Mutant

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).parents[2]
COPIED = ("worker", "migrations", "tests")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "tmp")
MOST_SECONDS = 60.0
"""The tests have time limits of their own, the longest 20 s; this one is for a bug that blocks even these."""
ALL_SECONDS = 300.0

each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@dataclass(frozen=True)
class Verdict:
    """What a run of pytest came to; `died_of` is the exception that one test failed by, if it failed by its own."""

    exit_code: int | None
    died_of: str | None
    output: str


def run_tests(project: Path, *tests: str, seconds: float = MOST_SECONDS) -> Verdict:
    """Run these tests, and no others, on what is in this folder."""
    report = project / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir=.", "-c", "pyproject.toml", f"--junitxml={report}"]
    # The checkout may be installed in editable mode: only the folder that we start in comes before it.
    environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTEST_ADDOPTS"}}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--basetemp={project / 'tmp'}", *tests],
            cwd=project,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Verdict(None, "TimeoutError", f"stopped after {seconds:.0f} s\n{error.output}")
    is_failed = done.returncode == pytest.ExitCode.TESTS_FAILED
    return Verdict(done.returncode, death_of(report) if is_failed else None, done.stdout)


def death_of(report: Path) -> str | None:
    """The exception a test failed by; None if it was not the test itself that failed, but what it needs."""
    failure = ET.parse(report).find(".//testcase/failure")
    if failure is None:
        return None
    message = failure.get("message", "")
    return "AssertionError" if message.startswith("assert ") else message.split(":")[0].rpartition(".")[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without any bug of ours: all the tests that are to notice one pass in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        shutil.copytree(CHECKOUT / name, folder / name, ignore=NOT_COPIED)
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    verdict = run_tests(folder, *sorted({mutant.killed_by for mutant in MUTANTS}), seconds=ALL_SECONDS)
    assert verdict.exit_code == pytest.ExitCode.OK, verdict.output
    return folder


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that, to be spoilt; without byte code, so that nothing compiled earlier passes for a changed line."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder, ignore=NOT_COPIED)
    yield folder
    shutil.rmtree(folder)


@each_mutant
def test_mutant_fits(mutant: Mutant) -> None:
    """Every bug still changes exactly one line of the code as it is, and leaves Python that compiles."""
    before = (CHECKOUT / mutant.file).read_text()
    after = mutant.planted_in(before)
    compile(after, mutant.file, "exec")
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    assert sum(old != new for old, new in lines) == 1


@pytest.mark.campaign
def test_the_copy_is_what_is_tested(copy: Path) -> None:
    """In a copy whose package cannot be imported nothing can be tested: no test imports from the checkout."""
    (copy / "worker" / "__init__.py").write_text('raise ImportError("this is the copy")\n')
    verdict = run_tests(copy, MUTANTS[0].killed_by)
    assert verdict.exit_code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    assert "this is the copy" in verdict.output


@pytest.mark.campaign
@each_mutant
def test_mutant_is_killed(mutant: Mutant, copy: Path) -> None:
    """The test that a bug names fails on it, and by the exception it says."""
    path = copy / mutant.file
    path.write_text(mutant.planted_in(path.read_text()))
    began = time.monotonic()
    verdict = run_tests(copy, mutant.killed_by)
    seconds = time.monotonic() - began
    assert verdict.died_of == mutant.dies_of, (
        f"{mutant.name}: {mutant.bug}\n{mutant.killed_by} exited with {verdict.exit_code}:\n{verdict.output}"
    )
    print(f"\n{mutant.name:<30} killed in {seconds:4.1f} s by {mutant.killed_by} ", end="")
