"""systemd as a service sees it: a datagram socket that is told how it goes; for tests/system."""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
from pathlib import Path

from tests.support.lives import until


class Systemd:
    """The other end of NOTIFY_SOCKET, as systemd has it."""

    def __init__(self) -> None:
        # Not in the test's own folder: a socket's path must be shorter than that may be.
        self._folder = tempfile.TemporaryDirectory(prefix="notify-")
        self.path = Path(self._folder.name) / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """Everything heard so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self._socket.recv(4096).decode())
        return self.heard

    async def hears(self, word: str, times: int = 1, seconds: float = 10.0) -> None:
        """Wait until this was said so many times more."""
        before = self.listen().count(word)
        await until(lambda: self.listen().count(word) >= before + times, seconds)

    def said(self, name: str) -> list[str]:
        """The values that a variable of the protocol had so far, e.g. of STATUS."""
        lines = [line for message in self.listen() for line in message.split("\n")]
        return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]

    def fill(self) -> int:
        """Leave no room for more until it listens; return how many messages that took."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
            sender.settimeout(0)
            for count in itertools.count():
                try:
                    sender.sendto(b"filler", str(self.path))
                except BlockingIOError:
                    return count
        raise AssertionError

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._folder.cleanup()
