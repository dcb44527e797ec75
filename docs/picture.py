"""Makes docs/demo.svg, the picture of the README, from a real demo: `python -m docs.picture` (half a minute).

It shows the demo's own screen at the moment when a killed worker was furthest behind, and the proof that was printed.
"""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.text import Text

from worker.demo import demo
from worker.demo.screen import Scene, Screen

WIDTH = 100
KILLS = 3


class RememberingScreen(Screen):
    """Keeps the moment at which the file was furthest behind the server, after the first kills."""

    behind = 0
    kept: Text | None = None

    def show(self, scene: Scene) -> None:
        """Show it, and keep it."""
        super().show(scene)
        behind = scene.served - scene.stored
        if len(self._notes) == KILLS and behind > RememberingScreen.behind:
            RememberingScreen.behind, RememberingScreen.kept = behind, rendered(self._picture(scene))


def rendered(picture: object) -> Text:
    """What it looks like now; later the notes are others."""
    with io.StringIO() as file:
        console = Console(file=file, width=WIDTH, force_terminal=True, color_system="truecolor")
        console.print(picture)
        return Text.from_ansi(file.getvalue())


def main() -> None:
    """Perform the demo and write the picture."""
    said = io.StringIO()
    console = Console(file=said, width=WIDTH, force_terminal=True, color_system="truecolor")
    with patch.object(demo, "Screen", RememberingScreen):
        if not asyncio.run(demo.run(console, kills=KILLS, keep=None, seed=1)):
            raise SystemExit("the demo does not hold")
    proof = said.getvalue().rpartition("\x1b[?25h")[2].partition("\nLook at it")[0]
    recorded = Console(record=True, width=WIDTH, file=io.StringIO())
    recorded.print(Text.assemble(("$ ", "dim"), "make demo\n"), RememberingScreen.kept or "", Text.from_ansi(proof))
    picture = recorded.export_svg(title="letta-ingest demo", font_aspect_ratio=0.61)
    # No picture of ours loads anything from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL).replace("Fira Code, ", "")
    (Path(__file__).parent / "demo.svg").write_text(picture)


if __name__ == "__main__":
    main()
