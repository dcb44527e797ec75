"""The demo as a new user runs it: a process of its own, without a terminal, as in the log of a CI job."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_demo_proves_itself(tmp_path: Path) -> None:
    """I1, I3: the demo kills its worker in mid-stream, counts every chunk once, exits 0 and leaves its file."""
    done = demo(tmp_path, "--kills", "1", "--keep", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "0 lost, 0 doubled, 0 altered" in done.stdout
    assert "1 by SIGKILL, 1 in the middle of a run" in done.stdout
    served = re.search(r"chunks +([\d,]+) on the server", done.stdout)
    assert served is not None
    with closing(sqlite3.connect(tmp_path / "kept" / "letta-ingest.db")) as connection:
        ((stored,),) = connection.execute("SELECT count(*) FROM chunks")
    assert stored == int(served.group(1).replace(",", ""))
    again = demo(tmp_path, "--keep", "kept")
    assert (again.returncode, again.stdout) == (2, "")
    assert "kept" in again.stderr


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it where a folder is called `worker`, with a server of the user's own in the environment."""
    (folder / "worker").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-P", "-m", "worker", "demo", *options],
        check=False,
        cwd=folder,
        env={"LETTA_BASE_URL": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
