"""The Letta server's own virtual environment: installed once by pip, kept between runs, renewed with its pins."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.real_letta.lab.processes import Child, LabError, run

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_REPOSITORY = Path(__file__).parents[3]
_OLDEST, _NEWEST = (3, 11), (3, 13)  # what letta 0.16.8 runs on
_SAY_EVERY_SECONDS = 15
# Read at import: the tests' own environment is cleaned of everything that begins with LETTA_.
_CACHE_OVERRIDE = os.environ.get("LETTA_INGEST_LAB_CACHE")


def cache_directory() -> Path:
    """Where the environment is kept: LETTA_INGEST_LAB_CACHE, else inside the checkout."""
    return Path(_CACHE_OVERRIDE).absolute() if _CACHE_OVERRIDE else _REPOSITORY / ".cache" / "real_letta"


def server_venv(say: Callable[[str], None]) -> Path:
    """The path of a complete environment, installing it first if need be."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    venv = cache / "venv"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once must not both install
        stamp = venv / "complete"
        python = _server_python()
        wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
        # The second condition fails when the Python it was made with is gone.
        is_usable = stamp.exists() and (venv / "bin" / "python").exists()
        if not is_usable or stamp.read_text() != wanted:
            _install(python, venv, cache / "install.log", say)
            stamp.write_text(wanted)
    return venv


def _server_python() -> str:
    if _OLDEST <= sys.version_info[:2] <= _NEWEST:
        return sys.executable
    for minor in range(_NEWEST[1], _OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        # pyenv puts commands on the PATH for versions that are not active; those only say so.
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    raise LabError("the Letta server needs Python 3.11, 3.12 or 3.13; none of them is on the PATH")


def _install(python: str, venv: Path, log: Path, say: Callable[[str], None]) -> None:
    total = sum("==" in line and ";" not in line for line in REQUIREMENTS.read_text().splitlines())
    say(f"installing letta 0.16.8 and what it runs on ({total} packages, about 900 MB) into {venv}; once, some minutes")
    log.unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    run([python, "-m", "venv", venv], log=log, env=dict(os.environ))
    # --no-compile: what the server imports is compiled when it first starts; all of it would take minutes.
    pip: list[str | Path] = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-compile",
        "--prefer-binary",
    ]
    started = said = time.monotonic()
    install = Child("pip", [*pip, "-r", REQUIREMENTS], log=log, env=dict(os.environ), cwd=log.parent)
    try:
        while install.wait(1) is None:
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                fetched = log.read_text(errors="replace").count("\nCollecting ")
                step = f"fetched {fetched} of {total} packages" if fetched < total else "unpacking"
                say(f"  {said - started:4.0f} s: {step}")
    finally:
        install.kill()
    if install.exit_code != 0:
        raise LabError(f"pip exited with {install.exit_code} (all of its output: {log}):\n{install.log_tail()}")
    say(f"  installed in {time.monotonic() - started:.0f} s")
