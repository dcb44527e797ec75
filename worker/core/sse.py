"""Server-Sent Events framing: bytes in, events out. Used by letta/client.py.

Ours and not httpx-sse's because one event must have a size limit that is counted while its bytes come in (I8);
httpx-sse is the oracle this decoder is tested against.
"""

import msgspec

_BOM = b"\xef\xbb\xbf"
MAX_LINES = 10_000
"""An event of more lines is over the limit like a too large one: each costs many times its bytes (I8)."""


class SseEvent(msgspec.Struct, frozen=True, gc=False):
    """One event as framed on the wire.

    `data` is the text after `data: ` as bytes, several data lines joined by LF. Of an event over the limit, in bytes
    or in lines, only its first bytes are kept, from `data:` on, and `is_oversized` is set.
    """

    data: bytes
    event: str = ""
    is_oversized: bool = False


class SseDecoder:
    """Splits a response body into events, however its bytes are cut into pieces.

    Lines end with LF, CRLF or CR and with nothing else: Letta sends U+2028 and U+0085 raw inside a line
    (letta-protocol j). An event that the end of the body cuts short is never given out.
    """

    def __init__(self, max_event_bytes: int, kept_of_oversized: int = 4096) -> None:
        self._max_event_bytes = max_event_bytes
        self._kept_of_oversized = min(kept_of_oversized, max_event_bytes)
        self._buffer = bytearray()
        self._searched = 0
        self._is_start = True
        self._ends_with_cr = False
        self._is_skipping = False

    def feed(self, received: bytes) -> list[SseEvent]:
        """Take the next bytes of the body and return the events they complete, in order."""
        if not received:
            return []
        self._append(received)
        end = self._buffer.rfind(b"\n\n", max(0, self._searched - 1))
        if end < 0:
            self._searched = len(self._buffer)
            return self._refuse_when_too_long()
        complete = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._searched = len(self._buffer)
        events = []
        for block in complete.split(b"\n\n"):
            event_bytes = block.strip(b"\n")
            if self._is_skipping:
                self._is_skipping = False
            elif len(event_bytes) > self._max_event_bytes:
                events.append(self._oversized(event_bytes))
            elif (event := self._event_of(event_bytes)) is not None:
                events.append(event)
        return events + self._refuse_when_too_long()

    def _append(self, received: bytes) -> None:
        if self._is_start:
            # Only the very first bytes may be a byte order mark, and they may come one by one.
            self._buffer += received
            if len(self._buffer) < len(_BOM) and _BOM.startswith(self._buffer):
                return
            received = bytes(self._buffer).removeprefix(_BOM)
            self._buffer.clear()
            self._is_start = False
        if self._ends_with_cr or b"\r" in received:
            received = self._with_line_feeds(received)
        self._buffer += received

    def _with_line_feeds(self, received: bytes) -> bytes:
        if self._ends_with_cr and received.startswith(b"\n"):
            received = received[1:]  # the second half of a CRLF whose first half was a line end already
        self._ends_with_cr = received.endswith(b"\r")
        return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _refuse_when_too_long(self) -> list[SseEvent]:
        if self._is_skipping:
            del self._buffer[:-1]  # the LF that may be the first half of the blank line
            self._searched = 0
            return []
        if len(self._buffer) <= self._max_event_bytes:
            return []
        event_bytes = self._buffer.strip(b"\n")  # not the event's: blank lines, half a blank line
        if len(event_bytes) <= self._max_event_bytes:
            return []
        self._is_skipping = True
        return [self._oversized(event_bytes), *self._refuse_when_too_long()]

    def _event_of(self, block: bytes) -> SseEvent | None:
        if block.startswith(b"data: ") and b"\n" not in block:
            return SseEvent(block[6:])
        if block.count(b"\n") >= MAX_LINES:
            return self._oversized(block)
        name = ""
        data: list[bytes] = []
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value.decode("utf-8", "replace")
        return SseEvent(b"\n".join(data), name) if data else None

    def _oversized(self, event_bytes: bytes | bytearray) -> SseEvent:
        return SseEvent(bytes(event_bytes[: self._kept_of_oversized]), is_oversized=True)
