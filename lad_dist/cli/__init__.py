"""The command line: ``lad-dist VERB JOB``. Commands only; ``pipeline.py`` describes what they do.

    options.py    options of the verbs that work on a job (JOB, --out, --set, --on, ...), declared once
    demo.py       demo
    init.py       init
    stages.py     run, experts, distill, evaluate, report
    plan.py       plan
    doctor.py     doctor
    cache.py      cache
    cluster.py    logs, cancel, and the other verbs on SLURM
    looking.py    status, view, compare, tensorboard, jobs, clusters
    buffers.py    buffer inspect, verify, compact, prune, export, import
    exchange.py   export, import
    sharing.py    push, pull
    terminal.py   output, and the types of ``errors.py`` as one message and an exit code

A verb is a function, listed in ``VERBS`` in the order of ``--help``. Slow modules are imported inside the functions, so
that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from lad_dist import __version__
from lad_dist.cli import buffers, cache, cluster, demo, doctor, exchange, init, looking, plan, sharing, stages, terminal
from lad_dist.cli.options import default_out, expanded
from lad_dist.cores import wait_asleep

__all__ = ["app", "default_out", "main"]

VERBS: tuple[Callable[..., None], ...] = (
    demo.demo,
    init.init,
    stages.run,
    stages.experts,
    stages.distill,
    stages.evaluate,
    stages.report,
    plan.plan,
    doctor.doctor,
    looking.status,
    cluster.logs,
    cluster.cancel,
    looking.view,
    looking.compare,
    looking.tensorboard,
    exchange.export,
    exchange.import_,
    sharing.push,
    sharing.pull,
    looking.jobs,
    looking.clusters,
    cache.cache,
)
BUFFER_VERBS: tuple[Callable[..., None], ...] = (
    buffers.inspect,
    buffers.verify,
    buffers.compact,
    buffers.prune,
    buffers.export,
    buffers.import_,
)

app = typer.Typer(
    cls=terminal.Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
buffer_app = typer.Typer(no_args_is_help=True, help="Look into a trajectory buffer; exchange it with other tools.")

for verb in VERBS:
    app.command(verb.__name__.rstrip("_"))(expanded(verb))
for verb in BUFFER_VERBS:
    buffer_app.command(verb.__name__.rstrip("_"))(expanded(verb))
app.add_typer(buffer_app, name="buffer")


def main() -> None:
    """Run ``lad-dist``."""
    wait_asleep()
    terminal.tolerate_any_encoding()
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lad-dist {__version__}")
        raise typer.Exit


@app.callback()
def lad_dist(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Distil a long-tailed image data set into a few synthetic images per class."""
