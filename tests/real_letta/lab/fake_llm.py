"""The stand-in model of the lab: an OpenAI-compatible endpoint that answers what the prompt tells it to.

`python fake_llm.py PORT`, with the Python of the server's own virtual environment. The reply is the words
"tok000001 tok000002 ...", one word with its space per streamed delta, so that loss or repetition is visible at a
glance. Directives anywhere in the last user message:

    [n=200]       words to stream (default 40)
    [delay=0.02]  seconds between words (default 0.01)
    [think=10]    words of reasoning first (default 0)
    [tool=NAME]   call tool NAME with no arguments, unless the last message is already a tool's result
    [fail=50]     break the answer off after 50 words, as [failmode=...] says:
    [failmode=x]  close: drop the connection (default); error: an error object in the stream; status: HTTP 500 at once
    [pause=5@20]  sleep 5 s after word 20
    [hold=ab@20]  after word 20, which is not the last, wait until somebody POSTs to /go_on/ab; at most a minute
    [text=abc]    this text in place of the words, one character per delta; _ is a space, Python escapes are decoded
"""

import asyncio
import json
import re
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "fake-1"
LONGEST_HOLD_SECONDS = 60


@dataclass(frozen=True)
class Script:
    """What the prompt's directives ask for."""

    words: list[str]
    delay: float
    thinking: int
    tool: str
    fail_after: int | None
    fail_mode: str
    pause: float
    pause_after: int
    hold: str
    hold_after: int | None

    @classmethod
    def of(cls, prompt: str) -> "Script":
        """Read the directives; the last one of a kind counts."""
        given = dict(re.findall(r"\[(\w+)=([^\]]*)\]", prompt))
        pause, _, pause_after = given.get("pause", "0@0").partition("@")
        hold, _, hold_after = given.get("hold", "").partition("@")
        if "text" in given:
            text = given["text"].replace("_", " ").encode("ascii", "backslashreplace").decode("unicode_escape")
            words = list(text)
        else:
            words = [f"tok{number:06d} " for number in range(1, int(given.get("n", "40")) + 1)]
        return cls(
            words=words,
            delay=float(given.get("delay", "0.01")),
            thinking=int(given.get("think", "0")),
            tool=given.get("tool", ""),
            fail_after=int(given["fail"]) if "fail" in given else None,
            fail_mode=given.get("failmode", "close"),
            pause=float(pause),
            pause_after=int(pause_after),
            hold=hold,
            hold_after=int(hold_after) if hold else None,
        )


class Holds:
    """Where answers wait for a word from outside, each under the name its prompt gives."""

    def __init__(self) -> None:
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def release(self, name: str) -> None:
        """Let the answers of this name go on, also those that come later."""
        self._released[name].set()

    async def wait(self, name: str) -> None:
        """Return when it is released."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_HOLD_SECONDS):
                await self._released[name].wait()


class Completion:
    """One answer: the frame all its pieces share, and the pieces."""

    def __init__(self, request: dict[str, Any], holds: Holds) -> None:
        self._holds = holds
        messages = request.get("messages", [])
        self.script = Script.of(_last_user_message(messages))
        self.calls_tool = bool(self.script.tool) and messages[-1].get("role") != "tool"
        self.frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.get("model", MODEL),
        }
        produced = len(self.script.words)
        self.usage = {"prompt_tokens": 11, "completion_tokens": produced, "total_tokens": 11 + produced}
        function = {"name": self.script.tool, "arguments": "{}"}
        self.tool_call = {"id": f"call_{uuid.uuid4().hex[:20]}", "type": "function", "function": function}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        await asyncio.sleep(self.script.delay * len(self.script.words))
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.script.words)}
        if self.calls_tool:
            message = {"role": "assistant", "content": None, "tool_calls": [self.tool_call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if self.calls_tool else "stop"}
        return {**self.frame, "object": "chat.completion", "usage": self.usage, "choices": [choice]}

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        yield self._delta({"role": "assistant", "content": ""})
        for number in range(1, self.script.thinking + 1):
            yield self._delta({"reasoning_content": f"think{number:06d} "})
            await asyncio.sleep(self.script.delay)
        if self.calls_tool:
            yield self._delta({"tool_calls": [{"index": 0, **self.tool_call}]})
            yield self._delta({}, "tool_calls")
        else:
            for number, word in enumerate(self.script.words, 1):
                if number - 1 == self.script.hold_after:
                    await self._holds.wait(self.script.hold)
                if number - 1 == self.script.fail_after:
                    if self.script.fail_mode != "error":
                        raise ConnectionAbortedError
                    yield _event({"error": {"message": "fake failure", "type": "server_error", "code": 500}})
                    return
                yield self._delta({"content": word})
                if self.script.delay:
                    await asyncio.sleep(self.script.delay)
                if number == self.script.pause_after:
                    await asyncio.sleep(self.script.pause)
            yield self._delta({}, "stop")
        yield _event({**self.frame, "object": "chat.completion.chunk", "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**self.frame, "object": "chat.completion.chunk", "choices": [choice]})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _last_user_message(messages: list[dict[str, Any]]) -> str:
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    content = contents[-1] if contents else ""
    if isinstance(content, list):
        content = " ".join(part.get("text", "") for part in content)
    return str(content)


async def _models(_: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "lab"}]})


async def _chat(request: Request) -> Response:
    body = await request.json()
    answer = Completion(body, request.app.state.holds)
    if answer.script.fail_after is not None and answer.script.fail_mode == "status":
        return JSONResponse({"error": {"message": "fake failure", "type": "server_error"}}, status_code=500)
    if body.get("stream"):
        return StreamingResponse(answer.pieces(), media_type="text/event-stream")
    return JSONResponse(await answer.whole())


async def _go_on(request: Request) -> Response:
    request.app.state.holds.release(request.path_params["name"])
    return JSONResponse({})


app = Starlette(
    routes=[
        Route("/v1/models", _models),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/go_on/{name}", _go_on, methods=["POST"]),
    ],
)
app.state.holds = Holds()

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
