"""The server's side of the promise: runs under the machine's control, and what of them a reader can still get.

Used by promise.py, which decides what happens, and by promise_oracle.py, which compares. FakeLetta does the serving.
What it never does, because nobody could tell from the bytes on the wire, are A1 to A3 of tests/core/server_model.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from worker.demo.fake_letta import FakeLetta
from worker.demo.fake_run import compact

if TYPE_CHECKING:
    from worker.demo.fake_run import Entry, FakeRun

Unreadable = Literal["no JSON", "no object", "absurd number", "other run"]
Ending = Literal["completed", "completed twice", "failed", "failed at its start", "cancelled", "orphaned"]


class AgeingLetta(FakeLetta):
    """A FakeLetta in which three hours pass at once for some runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.expired: set[str] = set()

    def is_expired(self, run: FakeRun) -> bool:
        """Tell whether the run's stream is refused for its age."""
        return run.id in self.expired or super().is_expired(run)


@dataclass
class Talk:
    """One run, what was done to it, and the truth about it."""

    letta: AgeingLetta
    run: FakeRun
    is_open: bool = True
    """The agent goes on writing; else nothing more comes, whatever the server calls the run."""
    is_repeated: bool = False
    unreadable: dict[int, bytes] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    """Written after the server had called the run over: a worker may have given it up by then."""
    hidden: dict[int, Entry] = field(default_factory=dict)
    """Entries that readers skip for now, at their numbers."""

    # ---- what happens to it ----

    def say(self, count: int) -> None:
        """Write chunks of every kind."""
        for _ in range(count):
            match len(self.run.history) % 7:
                case 2:
                    self.run.think("hm \u2028 ")
                case 4:
                    self.run.call_tool("look", '{"where":"there"}')
                case 5:
                    self.run.tool_return("nothing")
                case _:
                    self.run.say(f"tok{len(self.run.history):04d} é\0 ")

    def garble(self, kind: Unreadable) -> None:
        """Write an entry that cannot become a row; no two are the same (A1)."""
        place = len(self.run.history)
        payload = {"message_type": "assistant_message", "content": f"bad {place}", "seq_id": -place, "run_id": None}
        match kind:
            case "no JSON":
                text = f'{{"broken":{place}'
            case "no object":
                text = f"[{place}]"
            case "absurd number":
                text = compact(payload)
            case "other run":
                text = compact(payload | {"seq_id": None, "run_id": f"run-of-somebody-else-{place}"})
        seq_id = self.run.write(f"data: {text}\n\n")
        self.unreadable[seq_id] = self.payloads()[seq_id].encode()

    def repeat(self, length: int) -> None:
        """Write the last batch again, as redis-py does when the reply to it was lost: numbers go backwards."""
        last = len(self.payloads())
        self.run.repeat(last - length, last)
        self.is_repeated = True

    def losable(self) -> list[int]:
        """Places in the log of chunks that stand between two others (A2, A3)."""
        known = {entry.seq_id for entry in self.run.history if self.is_numbered(entry)}
        return [
            place
            for place, entry in enumerate(self.run.log)
            if entry.data and not entry.complete and {entry.seq_id - 1, entry.seq_id, entry.seq_id + 1} <= known
        ]

    def lose(self, choice: int) -> None:
        """Let readers skip one."""
        places = self.losable()
        place = places[choice % len(places)]
        entry = self.run.log[place]
        self.hidden[entry.seq_id] = entry
        self.run.log[place] = dataclasses.replace(entry, data="")

    def returnable(self) -> list[int]:
        """Places in the log of what readers skip."""
        hidden = {entry.index for entry in self.hidden.values()}
        return [place for place, entry in enumerate(self.run.log) if entry.index in hidden]

    def give_back(self) -> None:
        """Serve it after all."""
        place = self.returnable()[0]
        self.run.log[place] = self.hidden.pop(self.run.log[place].seq_id)
        self.run.wake_readers()

    def sendable(self) -> bool:
        """Something that readers skip can come late."""
        return self.is_open and bool(self.hidden)

    def send_late(self) -> None:
        """Write it again, behind what is there."""
        _, entry = self.hidden.popitem()
        self.run._append(entry.seq_id, entry.data, complete=False)

    def trimmable(self) -> list[int]:
        """Numbered entries that can become the first one (A2, A3)."""
        if not self.run.log:
            return []
        first = self.run.log[0].seq_id
        return [
            entry.seq_id
            for entry in self.run.log
            if entry.seq_id > first and self.is_numbered(entry) and not (entry.complete and self.is_repeated)
        ]

    def trim(self, choice: int) -> None:
        """Drop the oldest entries."""
        targets = self.trimmable()
        self.run.trim(targets[choice % len(targets)])

    def forget(self) -> None:
        """Lose the whole stream, as an evicted key or a Redis without persistence does; nothing is written any more."""
        self.run.forget()
        self.is_open = False

    def end(self, ending: Ending) -> None:
        """Bring the run to an end, or leave it without one."""
        self.is_open = False
        match ending:
            case "completed":
                self.run.complete()
            case "completed twice":
                first = self.run.stop_reason("end_turn")
                self.run.repeat(first, first)
                second = self.run.usage()
                self.run.repeat(first, second)
                self.run.write_done()
                self.run._end("completed", "end_turn")
            case "failed":
                self.run.fail("the model hung up")
            case "failed at its start":
                self.run.fail_to_start("no Redis")
            case "cancelled":
                self.run.cancel()
            case "orphaned":
                pass

    def finish_cancel(self) -> None:
        """Write the chunks that were still under way, and the stored end."""
        before = len(self.run.history)
        self.say(2)
        self.run.finish_cancel()
        self.late |= {entry.seq_id for entry in self.run.history[before:]}

    # ---- the truth about it ----

    @property
    def has_end(self) -> bool:
        """The terminal marker was written."""
        return any(entry.complete for entry in self.run.history)

    def is_numbered(self, entry: Entry) -> bool:
        """The wire shows its number."""
        return '"seq_id":null' in entry.data and entry.seq_id not in self.unreadable

    def payloads(self) -> dict[int, str]:
        """Every number that ever was in the log, and what a reader gets under it."""
        return dict(self.run.expected_rows(ever_logged=True))

    def servable(self) -> dict[int, bool]:
        """Numbers a reader can get, in their order, right now; whether the wire shows them."""
        found: dict[int, bool] = {}
        if self.letta.is_expired(self.run):
            return found
        for entry in self.run.log:
            if entry.data and entry.payload != "[DONE]" and entry.seq_id > max(found, default=0):
                found[entry.seq_id] = self.is_numbered(entry)
            if entry.complete:
                break
        return found
