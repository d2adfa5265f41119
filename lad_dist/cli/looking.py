"""The read-only verbs: runs, and what ships with lad-dist."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JsonOption


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until every stage is done.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Interval of --watch.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show what a run has done, what it is doing, and its results so far."""
    from lad_dist import status as of_runs
    from lad_dist.errors import RecipeError

    if as_json and watch:
        raise RecipeError("--json: prints one document; valid: without --watch")
    if as_json:
        return terminal.print_json(of_runs.read_status(folder).document())
    if not watch:
        of_runs.print_status(of_runs.read_status(folder), terminal.stdout())
        return
    with terminal.until_interrupted():  # SIGTERM too: the live view hides the cursor, and must restore it
        of_runs.watch(folder, terminal.stdout(), every)


def view(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 0,
    every: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Interval of the page's reload.")] = 5.0,
) -> None:
    """Serve a run's report on this machine's loopback address, as it is now, until Ctrl-C."""
    import threading

    from lad_dist.view import served

    with terminal.until_interrupted(), served(folder, port, every) as address:
        typer.echo(f"{address}\n(Ctrl-C ends it; from another machine: ssh -L PORT:127.0.0.1:PORT)")
        threading.Event().wait()


def tensorboard(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Continue until every stage is done.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Interval of --watch.")] = 5.0,
) -> None:
    """Write a run's losses, alpha and accuracies for TensorBoard, into DIR/tensorboard (needs the package tensorboard)."""
    from lad_dist.status.tensorboard import write

    with terminal.until_interrupted():
        write(folder, every if watch else None, lambda text: terminal.stdout().print(text, soft_wrap=True))


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also make a page: results, curves and images side by side.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the results of several runs in one table, and, with --out, on one page."""
    from lad_dist.status import compare_document, compare_notes, compare_table

    screen, table = terminal.stdout(), compare_table(folders)
    if as_json:
        terminal.print_json(compare_document(folders))
    else:
        screen.print(table)
        for note in compare_notes(folders):
            screen.print(note, soft_wrap=True)
    if out is not None:
        from lad_dist.report.compare import write_comparison

        out = out.expanduser()
        write_comparison(folders, out)
        if not as_json:
            screen.print(f"page: {out}", soft_wrap=True)


def jobs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD...]", help="Only recipes whose names contain all words; `show NAME` prints one."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One entry per recipe.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the recipes that ship with lad-dist, by data set; those that differ only in imbalance factor and IPC share an entry."""
    from itertools import groupby

    from lad_dist import catalog, recipe_file
    from lad_dist.errors import RecipeError

    wanted = words or []
    if wanted[:1] == ["show"] and as_json:
        raise RecipeError("--json: lists recipes; valid: without show, which prints a recipe's YAML")
    if wanted[:1] == ["show"]:
        for name in wanted[1:]:
            typer.echo(catalog.find_job(name).recipe.read_text(encoding="utf-8"), nl=False)
        if not wanted[1:]:
            raise RecipeError("jobs show: no recipe named; valid: `lad-dist jobs show digits-lt`")
        return
    found = {name: file for name, file in catalog.jobs().items() if all(word in name for word in wanted)}
    if not found:
        raise RecipeError(f"jobs: no recipe's name has {' and '.join(wanted)} in it; `lad-dist jobs` lists them")
    if as_json:
        return terminal.print_json([_described(name, file) for name, file in found.items()])
    for title, members in groupby(sorted(found, key=catalog.data_set), catalog.data_set):
        families = dict[tuple[str, str], list[str]]()
        for name in members:
            family = name if every or wanted else catalog.family(name)
            families.setdefault((family, catalog.purpose(found[name])), []).append(name)
        entries = []
        for (family, purpose), names in families.items():
            recipes = [recipe_file.load(found[name]) for name in names]
            natural = recipes[0].data.imbalance == "natural"
            factor = "natural" if natural else f"factor {_each(f'{r.data.imbalance_factor:g}' for r in recipes)}"
            ipc = f"IPC {_each(str(r.ipc) for r in recipes)}"
            entries.append((family if len(names) > 1 else names[0], f"{factor:<30}{ipc}", purpose))
        _print_entries(entries, title)
    if not wanted:
        terminal.stdout().print("\njobs WORD... filters; jobs --all: an entry each; jobs show NAME: its YAML")


def _print_entries(entries: Iterable[tuple[str, str, str]], title: str = "") -> None:
    """Print (name, figures, purpose) entries of two lines or more, below a title."""
    from rich.padding import Padding
    from rich.text import Text

    screen = terminal.stdout()
    if title:
        screen.print(Text(title, "bold underline"))
    for name, figures, purpose in entries:
        screen.print(Text.assemble("  ", (f"{name:<28}", "bold"), figures))
        screen.print(Padding(Text(purpose, "dim"), (0, 0, 0, 6), expand=False))


def _described(name: str, file: Path) -> dict[str, Any]:
    """Return what ``jobs --json`` prints of a recipe."""
    from lad_dist import catalog, recipe_file

    recipe = recipe_file.load(file)
    natural = recipe.data.imbalance == "natural"
    return {
        "name": name,
        "purpose": catalog.purpose(file),
        "dataset": recipe.data.dataset,
        "imbalance_factor": None if natural else recipe.data.imbalance_factor,
        "ipc": recipe.ipc,
        "method": recipe.method,
        "file": str(file),
    }


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def clusters(as_json: JsonOption = False) -> None:
    """List the cluster profiles that ship with lad-dist; ``--on NAME`` chooses one."""
    from lad_dist import catalog, recipe_file
    from lad_dist.profile import Profile

    rows = []
    for name, file in catalog.profiles().items():
        profile = recipe_file.validated(Profile, recipe_file.read_document(file), str(file))
        rows.append((name, catalog.purpose(file), profile.launcher, profile.device))
    if as_json:
        return terminal.print_json(
            [dict(zip(("name", "purpose", "launcher", "device"), row, strict=True)) for row in rows]
        )
    _print_entries((name, f"launcher {launcher:<8}device {device}", about) for name, about, launcher, device in rows)
