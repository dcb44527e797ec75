"""What HTTP itself is like: headers, redirects, what counts as JSON (letta-protocol j)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.behaviour.server import Script
from tests.demo.wire import raw

if TYPE_CHECKING:
    import httpx

    from tests.behaviour.server import LettaUnderTest

NOT_AN_OBJECT = (
    "[{'type': 'model_attributes_type', 'loc': ('body',), 'msg': 'Input should be a valid dictionary or object to"
    " extract fields from', 'input': %s}]"
)


async def test_redirects(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A wrong slash at the end is a 307 without a body, to an absolute address made of the Host header."""
    run = await letta.start(Script(words=1))

    answers = {
        "/v1/runs/?limit=1": await raw(letta.url, "GET", "/v1/runs?limit=1"),
        run.stream: await raw(letta.url, "POST", f"{run.stream}/", "{}"),
        f"/v1/runs/{run.id}": await raw(letta.url, "GET", f"/v1/runs/{run.id}/"),
        "/v1/conversations/": await raw(letta.url, "GET", "/v1/conversations"),
    }
    followed = await client.post(f"{run.stream}/", json={"starting_after": 2}, follow_redirects=True)

    for place, answer in answers.items():
        head, _, body = answer.lower().partition("\r\n\r\n")
        assert head.startswith("http/1.1 307 temporary redirect\r\n")
        assert f"\r\nlocation: http://letta{place}\r\n" in f"{head}\r\n"
        assert ("\r\ncontent-length: 0\r\n" in f"{head}\r\n", body) == (True, "")
    assert followed.text.count("data: ") == 3


async def test_nothing_is_compressed(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Whatever encodings are accepted, streams and lists come as they are, and streams without a length."""
    run = await letta.start(Script(words=1))
    accepts = {"accept-encoding": "gzip, deflate, br"}

    streamed = await client.post(run.stream, json={}, headers=accepts)
    listed = await client.get("/v1/runs/", headers=accepts)

    assert "content-encoding" not in streamed.headers
    assert "content-encoding" not in listed.headers
    assert (streamed.headers["transfer-encoding"], streamed.headers.get("content-length")) == ("chunked", None)
    assert listed.headers["content-length"] == str(len(listed.content))


@pytest.mark.parametrize(
    ("body", "content_type", "input_"),
    [
        ('{"starting_after":2}', "text/plain", "b'{\"starting_after\":2}'"),
        ('{"starting_after":2}', "application/x-www-form-urlencoded", "b'{\"starting_after\":2}'"),
        ("[1]", "application/json", "[1]"),
        ("7", "application/json; charset=utf-8", "7"),
    ],
)
async def test_body_that_is_no_object(
    letta: LettaUnderTest, client: httpx.AsyncClient, body: str, content_type: str, input_: str
) -> None:
    """A body that is not called JSON by its content type, or is no object, is a 422."""
    run = await letta.start(Script(words=1))

    answer = await client.post(run.stream, content=body, headers={"content-type": content_type})

    assert (answer.status_code, answer.json()) == (422, {"trace_id": "", "detail": NOT_AN_OBJECT % input_})
