"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lad_dist.plan.estimate import Plan
from lad_dist.plan.units import duration, size


def tables(plan: Plan) -> RenderableType:
    """Return a plan as tables, without its faults."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    ranks = f"{plan.world} rank{'s' if plan.world > 1 else ''}"
    for line in (f"{plan.job} on {plan.place}, {ranks}", f"data: {plan.data}", f"network: {plan.network}"):
        yield Text(line)
    yield _needs(plan)
    yield Text(f"gradient path: {plan.path}: {plan.why}")
    if plan.durations:
        yield _durations(plan)
        yield _rates(plan)
        yield _scaling(plan)
        yield Text(f"ranks: {plan.advice}")
    for note in plan.notes:
        yield Text(note)


def _needs(plan: Plan) -> Table:
    table = Table("stage", "memory and disk", "where", title_justify="left")
    table.add_column("size", justify="right")
    for need in plan.needs:
        table.add_row(need.stage, need.what, need.where, size(need.bytes))
    return table


def _durations(plan: Plan) -> Table:
    table = Table("stage", "part")
    table.add_column("time", justify="right")
    table.add_column("how")
    stages = dict.fromkeys(d.stage for d in plan.durations)
    for stage in stages:
        parts = [d for d in plan.durations if d.stage == stage]
        for part in parts:
            table.add_row(stage, part.what, duration(part.seconds), part.how)
        if len(parts) > 1:
            table.add_row(stage, "total", duration(sum(p.seconds for p in parts)), "")
    table.add_section()
    table.add_row("all", "", duration(sum(d.seconds for d in plan.durations)), "")
    return table


def _rates(plan: Plan) -> Table:
    table = Table("one step")
    for column in ("images", "time"):
        table.add_column(column, justify="right")
    for rate in plan.rates:
        table.add_row(rate.kind, str(rate.images), duration(rate.seconds))
    return table


def _scaling(plan: Plan) -> Table:
    table = Table()
    for column in ("ranks", "images a step", "path", "iteration", "sums", "efficiency"):
        table.add_column(column, justify="right")
    for row in plan.scaling:
        times = duration(row.seconds), duration(row.communication)
        cells = (f"{row.share:.3g}", row.path, *times, f"{row.efficiency:.0%}")
        table.add_row(str(row.world), *cells, style="bold" if row.world == plan.world else "")
    return table
