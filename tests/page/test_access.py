"""Who is shown the page, and who its transcripts: by configuration, name and token."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING

import httpx
import pytest
from pydantic import SecretStr

from tests.support.pages import watching
from tests.support.shell import SECRET
from worker.demo.fake_letta import FakeLetta
from worker.page.access import Access

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TOKEN = f"{SECRET}:with-a-colon"
LOCAL = {"Host": "127.0.0.1:9464"}
PATHS = ("/", "/events", "/conversations", "/conversations/conv-1")


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


def basic(password: str, user: str = "me") -> str:
    """The header a browser sends."""
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def test_transcripts_are_off() -> None:
    """Unless the configuration says so, the page is shown and transcripts are not."""
    access = Access(transcripts=False, is_loopback=True, token=None)
    assert access.refusal({"Host": "status.example.com"}, "page") is None
    refusal = access.refusal(LOCAL, "transcript")
    assert refusal is not None
    assert (refusal.status, refusal.text) == (403, "Transcripts are not shown: service.transcripts is false.")


@pytest.mark.parametrize(
    ("host", "is_shown"),
    [
        ("127.0.0.1:9464", True),
        ("127.0.0.1", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("[::1]:9464", True),
        ("", False),
        ("evil.example.com", False),
        ("evil.example.com:9464", False),
        ("localhost.evil.example.com", False),
        ("127.0.0.1.nip.io:9464", False),
        ("192.168.0.1:9464", False),
        ("[::2]:9464", False),
    ],
)
def test_a_strangers_name(host: str, is_shown: bool) -> None:  # noqa: FBT001
    """With transcripts on loopback, a name that a stranger's page may point here is answered 421, whatever it asks."""
    access = Access(transcripts=True, is_loopback=True, token=None)
    for what in ("page", "transcript"):
        refusal = access.refusal({"Host": host}, what)  # type: ignore[arg-type]
        assert (refusal is None) == is_shown
        assert refusal is None or refusal.status == 421


@pytest.mark.parametrize(
    ("authorization", "is_shown"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (basic(TOKEN), True),
        (basic(TOKEN, user=""), True),
        (None, False),
        ("", False),
        (TOKEN, False),
        ("Bearer", False),
        (f"Bearer {TOKEN[:-1]}", False),
        (f"Bearer {TOKEN}x", False),
        (basic(""), False),
        (basic("é"), False),
        (basic("x", user=TOKEN), False),
        ("Basic !", False),
        (f"Digest {TOKEN}", False),
    ],
)
def test_token(authorization: str | None, is_shown: bool) -> None:  # noqa: FBT001
    """Where there is a token, it is asked for, as a password or as a bearer token; nothing else is let in (I10)."""
    access = Access(transcripts=True, is_loopback=False, token=SecretStr(TOKEN))
    headers = {"Host": "status.example.com"} | ({"Authorization": authorization} if authorization is not None else {})
    for what in ("page", "transcript"):
        refusal = access.refusal(headers, what)  # type: ignore[arg-type]
        assert (refusal is None) == is_shown
        if refusal is not None:
            assert refusal.status == 401
            assert refusal.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert TOKEN not in repr(access)


async def test_worker_asks_for_its_token(letta: FakeLetta, sqlite_url: str, tmp_path: Path) -> None:
    """A worker with a token asks for it on every page, with no word of it anywhere (I10); probes and scrapes go on."""
    (tmp_path / "key").write_text(f"{TOKEN}\n")
    shell, config = watching(letta, tmp_path, sqlite_url, f'transcripts = true, page_token_file = "{tmp_path}/key", ')
    config = config.replace("127.0.0.1:", "0.0.0.0:", 2).replace("0.0.0.0:", "127.0.0.1:", 1) + 'log.level = "debug"\n'
    life = shell.start("run", config=config)
    await shell.until_logged(life, "worker.started")
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False) as client:
        for path in PATHS:
            refused = await client.get(path, headers={"Authorization": "Bearer guessed-and-wrong"})
            assert (refused.status_code, refused.headers["www-authenticate"][:6]) == (401, "Basic ")
            assert refused.headers["cache-control"] == "no-store"
        allowed = {"Authorization": basic(TOKEN)}
        page = await client.get("/", headers=allowed)
        assert (page.status_code, TOKEN in page.text) == (200, False)
        assert (await client.get("/conversations/conv-1", headers=allowed)).status_code == 404
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code in {200, 503}
    assert await shell.stop(life) == 0


async def test_worker_refuses_to_show_everybody(letta: FakeLetta, sqlite_url: str, tmp_path: Path) -> None:
    """Transcripts on every address without a token: `run` and `check` say what to do, and exit 2."""
    shell, config = watching(letta, tmp_path, sqlite_url, "transcripts = true, ")
    config = config.replace(shell.listen, "0.0.0.0:0")
    for command in ("run", "check"):
        done = await shell.do(command, config=config)
        assert done.code == 2
        assert (
            "service: transcripts = true shows what was said to whoever reaches 0.0.0.0:0: set page_token" in done.err
        )
    _, config = watching(letta, tmp_path, sqlite_url, f'page_token_file = "{tmp_path}/none", ')
    for command in ("run", "check"):
        done = await shell.do(command, config=config)
        assert done.code == 2
        assert f"service.page_token_file: cannot use {tmp_path}/none" in done.err
