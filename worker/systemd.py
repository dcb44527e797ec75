"""Telling systemd how the service is (sd_notify). Used by service.py; does nothing where systemd is not.

Ours, because the protocol is one datagram, and the library for it (sdnotify) has had no release since 2016.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator


def notify(state: str) -> bool:
    """Send e.g. `READY=1`, `WATCHDOG=1` or `STOPPING=1`; whether it went out, or nobody wants it.

    Never raises and never waits: a deaf systemd must not stop the worker.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return True
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0)  # the queue of a reader that is behind fills up, and sending would wait for it
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def reloading(say_ready: Callable[[], None]) -> Iterator[None]:
    """While the block runs, systemd shows the service as reloading. Only for a service that has said READY=1."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        yield
    finally:
        say_ready()


def watchdog_interval() -> float | None:
    """Seconds between two signs of life systemd wants, halved for safety; None when it wants none."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    is_ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 2_000_000 if microseconds.isdigit() and is_ours else None
