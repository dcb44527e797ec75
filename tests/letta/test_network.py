"""TLS is verified, and proxies are taken from the environment as every other tool takes them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.letta.wire import SECRET, relaying
from worker.errors import ConfigError, TroubleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from worker.demo.fake_letta import FakeLetta
    from worker.letta.client import LettaClient

    Opened = Callable[..., AbstractAsyncContextManager[LettaClient]]

TLS = Path(__file__).parent / "tls"  # made for these tests and for nothing else; good for a hundred years


@pytest.fixture
def tls() -> ssl.SSLContext:
    """What a server with our certificate needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    return context


def port_of(letta: FakeLetta) -> int:
    """The port FakeLetta listens on."""
    return int(letta.url.rpartition(":")[2])


async def test_unknown_certificate_is_refused(letta: FakeLetta, opened: Opened, tls: ssl.SSLContext) -> None:
    """A server whose certificate nobody vouches for never sees a request, and so no key (I10)."""
    async with relaying(port_of(letta), tls) as relay, opened(base_url=f"https://127.0.0.1:{relay.port}") as client:
        with pytest.raises(TroubleError, match=r"CERTIFICATE_VERIFY_FAILED|certificate"):
            await client.server_version()

    assert relay.heads == []


async def test_own_authority_is_accepted(letta: FakeLetta, opened: Opened, tls: ssl.SSLContext) -> None:
    """`ca_file` names who vouches for a private server."""
    settings = {"ca_file": TLS / "certificate.pem"}
    async with relaying(port_of(letta), tls) as relay:
        for host in ("127.0.0.1", "localhost"):
            async with opened(base_url=f"https://{host}:{relay.port}", **settings) as client:
                assert await client.server_version() == "0.16.8"
    assert len(relay.heads) == 2


async def test_certificate_of_another_host(letta: FakeLetta, opened: Opened, tls: ssl.SSLContext) -> None:
    """A certificate we trust, but for another host, is refused."""
    async with (
        relaying(port_of(letta), tls) as relay,
        opened(base_url=f"https://127.0.0.2:{relay.port}", ca_file=TLS / "certificate.pem") as client,
    ):
        with pytest.raises(TroubleError):
            await client.server_version()

    assert relay.heads == []


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_ca_file_of_no_use(opened: Opened, tmp_path: Path, content: str | None) -> None:
    """A `ca_file` that is missing or holds no certificate is a fault of the configuration, with its key."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ConfigError, match=r"letta\.ca_file"):
        async with opened(ca_file=path):
            pass


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_proxy_is_used(letta: FakeLetta, opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The environment's proxy is asked for the server's whole address."""
    async with relaying(port_of(letta)) as relay:
        monkeypatch.setenv(name, f"http://127.0.0.1:{relay.port}")
        async with opened(base_url="http://letta.invalid:8283") as client:
            assert await client.server_version() == "0.16.8"

    assert relay.heads[0].startswith(b"GET http://letta.invalid:8283/v1/health/ HTTP/1.1\r\n")


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "localhost,127.0.0.1"])
async def test_no_proxy_is_respected(
    letta: FakeLetta, opened: Opened, monkeypatch: pytest.MonkeyPatch, exempt: str
) -> None:
    """A server that NO_PROXY names is asked directly."""
    async with relaying(port_of(letta)) as relay:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{relay.port}")
        monkeypatch.setenv("NO_PROXY", exempt)
        async with opened() as client:
            assert await client.server_version() == "0.16.8"

    assert relay.heads == []


@pytest.mark.filterwarnings("ignore:BasicAuth is deprecated", "ignore:The 'proxy_auth' parameter")  # by httpx-aiohttp
async def test_proxy_credentials_are_not_shown(
    letta: FakeLetta, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy's password reaches the proxy and no error (I10)."""
    async with relaying(port_of(letta)) as relay:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:{SECRET}-proxy@127.0.0.1:{relay.port}")
        async with opened(base_url="http://letta.invalid") as client:
            await client.server_version()
    assert b"proxy-authorization: basic " in relay.heads[0].lower()

    async with opened(base_url="http://letta.invalid") as client:
        with pytest.raises(TroubleError) as raised:
            await client.server_version()
    assert SECRET not in str(raised.value)
