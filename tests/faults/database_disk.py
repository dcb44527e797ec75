"""A disk of a few megabytes that is really full when it is full; for tests/faults/test_database*.py.

It is a tmpfs in a mount namespace of its own, which needs no privilege where users may have namespaces, touches no
mount of the machine, and is gone with the process that holds it, however that ends.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from types import TracebackType

HOLD = 'mount -t tmpfs -o size=$1,mode=0777 tmpfs "$2" && echo mounted && read -r _'


class TinyDisk:
    """Enter it; skips the test where it cannot be had. `owner` is the user whose processes use it, if not this one."""

    def __init__(self, folder: Path, megabytes: int, owner: int | None = None) -> None:
        self._folder = folder
        self._size = f"{megabytes}m"
        self._owner = owner
        self.path = folder
        """Where every process of the owner finds it; but SQLite, which resolves links by itself, does not."""

    def __enter__(self) -> Self:
        namespace = ["unshare", "--user", "--map-root-user", "--mount"]
        self._holder = subprocess.Popen(
            [*namespace, "/bin/sh", "-c", HOLD, "disk", self._size, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=self._owner,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "mounted\n":
            _, reason = self._holder.communicate()
            pytest.skip(f"a disk that can be filled needs Linux and user namespaces: {reason.strip()}")
        self.path = Path(f"/proc/{self._holder.pid}/root{self._folder}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._holder.communicate()

    @property
    def inside(self) -> list[str]:
        """What to put in front of a command that is to find it at the folder it was made for."""
        return ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(self._holder.pid)]

    def do(self, command: str) -> str:
        """Do a shell command in it as its owner; return what it complains of."""
        done = subprocess.run(
            ["/bin/sh", "-c", f'cd "$1" && {command}', "disk", str(self.path)],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
            user=self._owner,
        )
        return done.stderr

    def fill(self) -> None:
        """Leave no byte free."""
        complaint = self.do("LC_ALL=C cat /dev/zero > ballast")
        assert "No space left on device" in complaint, complaint

    def make_room(self) -> None:
        """Remove what filled it."""
        complaint = self.do("rm ballast")
        assert not complaint, complaint
