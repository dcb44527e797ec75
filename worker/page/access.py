"""Who is shown the page. Pure. Used by routes.py.

Transcripts are private. Elsewhere than on loopback a token is asked for; on loopback a name that a stranger's page may
point here (DNS rebinding) is refused.
"""

import hmac
import ipaddress
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import msgspec
from aiohttp import BasicAuth
from pydantic import SecretStr


class Refusal(msgspec.Struct, frozen=True):
    """What is answered instead of the page."""

    status: HTTPStatus
    text: str
    headers: Mapping[str, str] = {}


class Access(msgspec.Struct, frozen=True):
    """`token`: asked for where there is one. `is_loopback`: only this machine reaches the address."""

    transcripts: bool
    is_loopback: bool
    token: SecretStr | None

    def refusal(self, headers: Mapping[str, str], what: Literal["page", "transcript"]) -> Refusal | None:
        """Why a request with these headers is not shown this; None: it is."""
        if self.transcripts and self.is_loopback and not _is_local(headers.get("Host", "")):
            text = "This address shows transcripts, and is only called localhost or 127.0.0.1."
            return Refusal(HTTPStatus.MISDIRECTED_REQUEST, text)
        if self.token is not None and not _holds(headers.get("Authorization", ""), self.token):
            asks = {"WWW-Authenticate": 'Basic realm="letta-ingest", charset="UTF-8"'}
            return Refusal(HTTPStatus.UNAUTHORIZED, "The password, or the bearer token, is service.page_token.", asks)
        if what == "transcript" and not self.transcripts:
            return Refusal(HTTPStatus.FORBIDDEN, "Transcripts are not shown: service.transcripts is false.")
        return None


def _is_local(host: str) -> bool:
    """A Host header that names this machine in a way that no name server decides; the port may be a tunnel's."""
    named = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if named.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(named).is_loopback
    except ValueError:
        return False


def _holds(authorization: str, token: SecretStr) -> bool:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = BasicAuth.decode(authorization, encoding="utf-8").password
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.get_secret_value().encode())
