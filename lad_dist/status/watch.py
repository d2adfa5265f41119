"""Live status of a run, redrawn until every stage is done, or all submitted SLURM jobs are over."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from lad_dist.status.read import Follower
from lad_dist.status.show import print_status, renderables


def watch(folder: Path, console: Console, every: float) -> None:
    """Show the status every ``every`` seconds until it has ``ended``: in place in a terminal, else a block per change.

    Raises:
        RunDirError, RecipeError: as ``read_status`` does.
    """
    follower = Follower(folder)
    if not console.is_terminal or console.is_dumb_terminal:
        return _watch_plainly(follower, console, every)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = follower.read()
            live.update(Group(*renderables(found)), refresh=True)
            if found.ended:
                return
            time.sleep(every)


def _watch_plainly(follower: Follower, console: Console, every: float) -> None:
    shown: tuple[object, ...] | None = None
    while True:
        found = follower.read()
        if found.version != shown:
            shown = found.version
            console.print(f"--- {datetime.now().isoformat(' ', 'seconds')}")
            print_status(found, console)
        if found.ended:
            return
        time.sleep(every)
