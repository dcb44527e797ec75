"""Draws the samples of a soak: one panel for each figure, one line for each database."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.soak.sampling import Sample

PANELS = {
    "memory": "memory, MiB",
    "descriptors": "file descriptors",
    "connections": "connections",
    "tasks": "tasks",
    "unfinished": "unfinished runs",
    "chunks": "chunks stored, millions",
}
COLOURS = ("#1d4ed8", "#b45309")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 180, 44, 30, 26


def chart(samples: Mapping[str, Sequence[Sample]]) -> str:
    """An SVG."""
    panels = "\n".join(
        f'<g transform="translate({WIDTH * (number % 3)} {HEIGHT * (number // 3)})">{_panel(name, title, samples)}</g>'
        for number, (name, title) in enumerate(PANELS.items())
    )
    legend = "".join(
        f'<text x="{LEFT + 110 * number}" y="{2 * HEIGHT + 18}" fill="{colour}">{database}</text>'
        for number, (database, colour) in enumerate(zip(samples, COLOURS, strict=False))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {2 * HEIGHT + 30}" font-family="sans-serif"'
        f' font-size="11" fill="#374151">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{panels}\n{legend}\n'
        "</svg>\n"
    )


def _panel(name: str, title: str, samples: Mapping[str, Sequence[Sample]]) -> str:
    scale = 1e-6 if name == "chunks" else 1.0
    top = max(getattr(sample, name) * scale for taken in samples.values() for sample in taken) or 1.0
    end = max(taken[-1].minutes for taken in samples.values())
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM
    lines = "".join(
        '<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"/>'.format(
            " ".join(
                f"{LEFT + width * s.minutes / end:.1f},{TOP + height * (1 - getattr(s, name) * scale / top):.1f}"
                for s in taken
            ),
            colour,
        )
        for taken, colour in zip(samples.values(), COLOURS, strict=False)
    )
    return (
        f'<text x="{LEFT}" y="18">{title}</text>'
        f'<path d="M{LEFT} {TOP}V{TOP + height}H{LEFT + width}" fill="none" stroke="#d1d5db"/>'
        f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{top:,.4g}</text>'
        f'<text x="{LEFT - 5}" y="{TOP + height}" text-anchor="end">0</text>'
        f'<text x="{LEFT + width}" y="{TOP + height + 14}" text-anchor="end">{end:.0f} min</text>{lines}'
    )
