"""What a campaign reports: figures as text and JSON, and a chart of all campaigns of a session."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.demo.proof import Tally

Side = Literal["gone", "durable"]

WIDTH, HEIGHT = 470, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 60, 40, 50
CHUNKS_HEIGHT = 0.7
"""Of the panel, so that the two lines do not lie upon each other."""
KILLS_COLOUR, CHUNKS_COLOUR, DAMAGE_COLOUR = "#b45309", "#1d4ed8", "#15803d"


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it was, when, and what became of the transaction it struck, if it was aimed at one."""

    kind: str
    seconds: float
    side: Side | None
    is_mid_write: bool


@dataclass(frozen=True)
class Point:
    """How things stood at an audit."""

    seconds: float
    kills: int
    stored: int
    lost: int
    doubled: int
    altered: int


@dataclass
class Figures:
    """All of one campaign."""

    database: str
    seed: int
    began_at: float = field(default_factory=time.monotonic)
    kills: list[Kill] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    points: list[Point] = field(default_factory=list)
    restart_seconds: list[float] = field(default_factory=list)
    """From the birth of a worker to the first rows it has stored."""
    blocked_seconds: list[float] = field(default_factory=list)
    """The same of a worker on PostgreSQL, while another one is stopped in its transaction."""
    fewest_live: int = 1_000_000
    sent: int = 0
    sent_again: int = 0
    runs: int = 0
    chunks: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began_at

    def add(self, tally: Tally) -> None:
        """Count runs that are over."""
        for name in ("runs", "chunks", "lost", "doubled", "altered"):
            setattr(self, name, getattr(self, name) + getattr(tally, name))

    @property
    def mid_write(self) -> float:
        """The share of the kills at any moment that landed while rows were being written."""
        landed = [kill.is_mid_write for kill in self.kills if kill.kind == "at any moment"]
        return sum(landed) / len(landed)

    def sides(self, beginning: str) -> set[Side]:
        """On which sides of their commits the kills of these kinds have fallen."""
        return {kill.side for kill in self.kills if kill.kind.startswith(beginning) and kill.side is not None}

    def progress(self) -> str:
        """One line."""
        return (
            f"{self.database:10} {self.seconds():6.0f} s {len(self.kills):5,} kills"
            f" {self.points[-1].stored:9,} chunks stored; {self.runs:5,} runs audited:"
            f" {self.lost} lost, {self.doubled} doubled, {self.altered} altered"
        )

    def as_text(self) -> str:
        """The final table."""
        head = (
            f"\n{self.database}: {len(self.kills):,} kills in {self.seconds() / 60:.1f} min (seed {self.seed}),"
            f" at least {self.fewest_live} runs alive: {self.runs:,} runs, {self.chunks:,} chunks:"
            f" {self.lost} lost, {self.doubled} doubled, {self.altered} altered"
        )
        lines = [head]
        for kind, count in Counter(kill.kind for kill in self.kills).most_common():
            sides = Counter(kill.side for kill in self.kills if kill.kind == kind and kill.side)
            said = ", ".join(f"{number} {side}" for side, number in sides.items())
            said = f"{self.mid_write:.0%} mid-write" if kind == "at any moment" else said
            lines.append(f"  {count:5,}  {kind:40} {said}".rstrip())
        lines += [
            f"  sent again by the server and absorbed: {self.sent_again:,} of {self.sent:,} numbered chunks sent",
            f"  from a worker's start to its first stored rows: {spread(self.restart_seconds)}",
        ]
        if self.blocked_seconds:
            lines.append(f"  the same beside one stopped in its transaction: {spread(self.blocked_seconds)}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        known = {name: value for name, value in vars(self).items() if name != "began_at"}
        return known | {
            "kills": [asdict(kill) for kill in self.kills],
            "points": [asdict(point) for point in self.points],
        }


def spread(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"median {statistics.median(ordered):.2f} s, p99 {p99:.2f} s, longest {ordered[-1]:.2f} s ({len(ordered)})"


def chart(campaigns: Sequence[Figures]) -> str:
    """An SVG: for each campaign kills and stored chunks over time, and what was lost, doubled or altered."""
    panels = "\n".join(panel(figures, number * WIDTH) for number, figures in enumerate(campaigns))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(campaigns)} {HEIGHT}"'
        f' font-family="sans-serif" font-size="11" fill="#374151">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{panels}\n</svg>\n'
    )


def panel(figures: Figures, x: int) -> str:
    """One campaign."""
    points = [Point(0, 0, 0, 0, 0, 0), *figures.points]
    last = points[-1]
    damage = last.lost + last.doubled + last.altered
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def line(values: list[int], colour: str, full: float = 1.0) -> str:
        scale = full * height / max(*values, last.kills if colour == DAMAGE_COLOUR else 1)
        places = (
            f"{LEFT + width * point.seconds / last.seconds:.1f},{TOP + height - value * scale:.1f}"
            for point, value in zip(points, values, strict=True)
        )
        return f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def text(at: tuple[float, float], words: str, colour: str = "#374151", anchor: str = "start") -> str:
        return f'<text x="{at[0]}" y="{at[1]}" fill="{colour}" text-anchor="{anchor}">{words}</text>'

    right, bottom = LEFT + width, TOP + height
    return "\n".join(
        [
            f'<g transform="translate({x})">',
            text((LEFT, 18), f"{figures.database}: {last.kills:,} kills, {last.stored:,} chunks"),
            f'<path d="M{LEFT} {TOP}V{bottom}H{right}V{TOP}" fill="none" stroke="#d1d5db"/>',
            line([point.stored for point in points], CHUNKS_COLOUR, CHUNKS_HEIGHT),
            line([point.kills for point in points], KILLS_COLOUR),
            line([point.lost + point.doubled + point.altered for point in points], DAMAGE_COLOUR),
            text((LEFT - 6, TOP + 8), f"{last.kills:,}", KILLS_COLOUR, "end"),
            text((LEFT - 6, TOP + 22), "kills", KILLS_COLOUR, "end"),
            text((right + 6, bottom - CHUNKS_HEIGHT * height + 4), f"{last.stored / 1000:,.0f} k", CHUNKS_COLOUR),
            text((right + 6, bottom - CHUNKS_HEIGHT * height + 18), "chunks", CHUNKS_COLOUR),
            text((LEFT - 6, bottom), "0", anchor="end"),
            text((right, bottom + 16), f"{last.seconds / 60:.0f} min", anchor="end"),
            text((LEFT, bottom + 34), f"lost, doubled or altered: {damage}", DAMAGE_COLOUR),
            "</g>",
        ]
    )
