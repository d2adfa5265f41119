# /// script
# dependencies = ["pyte>=0.8", "playwright>=1.40", "rich"]
# ///
"""Makes docs/images from real runs: ``python docs/make_pictures.py {terminal,ray}``; needs lad-dist[all] beside the above.

terminal   the screen of `lad-dist run digits-lt`, as docs/images/run.svg (rich's export of what pyte's terminal shows)
ray        Ray's dashboard while a fleet trains experts, as docs/images/ray-*.png (needs Chromium)
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent / "images"
LAD = [sys.executable, "-m", "lad_dist.cli"]
COLUMNS, ROWS = 100, 200  # one screen holds all of the run's lines
FLEET = ["experts", "digits-lt", "--fleet", "on", "--set", "experts.count=8", "--set", "experts.epochs=300",
         "--set", "experts.classifier_epochs=100"]  # fmt: skip


def terminal(file: Path) -> None:
    """Export the last screen of a run."""
    with tempfile.TemporaryDirectory() as folder:
        shown = screen_of([*LAD, "run", "digits-lt"], Path(folder))
    text = as_svg("$ lad-dist run digits-lt", shown)
    file.write_text(text, encoding="utf-8")


def screen_of(command: list[str], folder: Path) -> Any:
    """Run a command in a terminal; return pyte's screen at its end."""
    import pyte

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color", "COLORTERM": ""}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=environment)
    os.close(follower)
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        stream.feed(piece)
    os.close(leader)
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n" + "\n".join(screen.display))
    return screen


def as_svg(prompt: str, screen: Any) -> str:
    """Return rich's SVG of a screen, with the reader's own font instead of one from another host."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(prompt, "bold"))
    last = max(row for row, line in enumerate(screen.display) if line.strip())
    for row in range(last + 1):
        cells = screen.buffer[row]
        line = Text(no_wrap=True)
        for style, run in groupby((cells[column] for column in range(COLUMNS)), style_of):
            line.append("".join(cell.data for cell in run), style)
        line.rstrip()
        console.print(line)
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="lad-dist", code_format=template)


def style_of(cell: Any) -> Any:
    """Return the rich style of a terminal's cell."""
    from rich.style import Style

    names = {"default": None, "brown": "yellow", "brightbrown": "bright_yellow"}
    color = names.get(cell.fg, cell.fg)
    if color is not None:
        color = f"#{color}" if re.fullmatch("[0-9a-f]{6}", color) else re.sub("^bright(?!_)", "bright_", color)
    return Style(color=color, bold=cell.bold or None, italic=cell.italics or None, underline=cell.underscore or None)


def ray(folder: Path) -> None:
    """Take pictures of Ray's dashboard while experts are trained: its token dialog, the actors, an actor's log."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with fleet() as (address, token), sync_playwright() as play:
        shown = play.chromium.launch(executable_path=browser)
        page = shown.new_page(viewport={"width": 1280, "height": 600})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/#/actors")
        page.get_by_role("dialog").wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "ray-token.png", clip={"x": 260, "y": 120, "width": 760, "height": 360})
        page.get_by_role("dialog").get_by_role("textbox").fill(token)
        page.get_by_role("dialog").get_by_role("button").last.click()
        page.get_by_text("expert-0000").first.wait_for()
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / "ray-actors.png", full_page=True)
        page.get_by_role("link", name="Log").last.click()
        page.get_by_text("STDOUT").first.click()
        page.wait_for_timeout(5000)
        page.mouse.wheel(0, 2000)  # the log is at the end of the page
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "ray-log.png")
        shown.close()


@contextmanager
def fleet() -> Iterator[tuple[str, str]]:
    """Start a fleet in a folder that goes with it; yield its dashboard's address and token."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*LAD, *FLEET, "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="")
                if found := re.search(r"dashboard: (http://[\w.:]+) \(its token: in (\S+)\)", line):
                    time.sleep(25)  # the first pair at work
                    yield found[1], Path(found[2]).read_text()
                    return
            sys.exit("the fleet has no dashboard")
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Make one picture or set of pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["terminal", "ray"])
    parser.add_argument("--out", type=Path, default=IMAGES)
    asked = parser.parse_args()
    if asked.which == "terminal":
        terminal(asked.out / "run.svg")
    else:
        ray(asked.out)


if __name__ == "__main__":
    main()
