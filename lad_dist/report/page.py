"""Report of a run: ``report/index.html``, one self-contained page, and the synthetic images as PNG files.

Everything comes from the run folder's files. Missing parts are omitted, and the page says so.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from lad_dist import __version__, recipe_file, results, rundir
from lad_dist.data.longtail import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, head_medium_tail
from lad_dist.recipe import Recipe
from lad_dist.report import confusion, contents, figures, pictures, published, tables
from lad_dist.report.contents import Contents
from lad_dist.results.paired import added
from lad_dist.rundir import RunDir

INDEX, SYNTHETIC, INITIAL = "index.html", "synthetic.png", "initial.png"


def write_report(recipe: Recipe, run: RunDir) -> None:
    """Publish ``report/index.html`` and, if there is a distilled set, ``report/synthetic.png`` and ``initial.png``.

    Raises:
        DistilledError: the distilled set is damaged.
        RunDirError: the results file is damaged.
        StorageError: a file cannot be written.
    """
    found = contents.read(recipe, run)
    shown = pictures.gallery(found.distilled) if found.distilled else None
    if shown:
        for name, title, images in (
            (SYNTHETIC, "synthetic images", shown.synthetic_GMHHC),
            (INITIAL, "the real images they started from", shown.initial_GMHHC),
        ):
            with rundir.published(run.report / name) as temporary:
                temporary.write_bytes(pictures.png_grid(shown, f"{recipe.name}: {title}", images))
    with rundir.published(run.report / INDEX) as temporary:
        temporary.write_text(render(found, shown), encoding="utf-8")


def render(found: Contents, shown: pictures.Gallery | None) -> str:
    """Return the page as HTML text."""
    class_table, script = figures.class_table(found), Markup("")
    if class_table is not None and class_table["searched"]:
        script = Markup(files(__package__).joinpath("templates", "search.js").read_text(encoding="utf-8"))  # noqa: S704 - this package's own
    return template("page.html").render(
        search_script=script,
        script_policy=_script_policy(script),
        run=found,
        recipe=found.recipe,
        lead=_lead(found),
        missing=_missing(found),
        results=_results(found),
        published=_published(found),
        groups=_groups(found),
        class_charts=figures.class_charts(found),
        class_table=class_table,
        confusions=confusion.confusion_charts(found),
        distill_charts=figures.distill_charts(found),
        alignment_charts=figures.alignment_charts(found),
        expert_charts=figures.expert_charts(found),
        experts_seen=found.history.experts_seen,
        gallery=_gallery(shown),
        costs=_costs(found),
        facts=_facts(found),
        version=__version__,
        recipe_text=recipe_file.dump(found.recipe),
        synthetic_file=SYNTHETIC,
        initial_file=INITIAL,
    )


def template(name: str) -> Template:
    """Return a template of ``templates/``, with autoescaping and errors on undefined variables."""
    environment = Environment(
        loader=PackageLoader("lad_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _script_policy(script: str) -> Markup:
    """Return what the page's Content-Security-Policy adds for its script, which alone may run; empty without one."""
    if not script:
        return Markup("")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup("; script-src 'sha256-{}'").format(digest)


def _lead(found: Contents) -> list[tuple[str, str]]:
    """Return the figures at the top: label, value."""
    accuracy: dict[str, str] = {}
    for line in tables.result_lines(results.summary(found.rows)):
        accuracy.setdefault(line.key, line.figures[0])  # the first architecture: ConvNet if measured
    lead = [(results.TITLES[key], f"{accuracy[key]} %") for key in tables.MAIN_SOURCES if key in accuracy]
    if found.counts:
        total, made = sum(found.counts), found.recipe.ipc * len(found.counts)
        lead.append(("Training images", f"{total:,} → {made:,}"))
    return lead


def _missing(found: Contents) -> list[str]:
    """List what this run lacks so far, one sentence each."""
    notes = []
    if found.distilled is None:
        done, total = max(found.history.iterations, default=0), found.recipe.distill.iterations
        notes.append(f"There is no distilled set yet ({done:,} of {total:,} iterations are recorded).")
    wanted = found.wanted
    for source in wanted:
        networks = len(results.networks(found.recipe, source))
        have = results.planned_among(found.rows, source, found.recipe)
        if have < networks:
            notes.append(f"{tables.source_name(source)}: {have} of {networks} networks are measured.")
    return notes


def _results(found: Contents) -> dict[str, Any] | None:
    if not found.rows:
        return None
    groups, by_count = tables.count_group_lines(found.rows)
    trained = {row["source"]: row.get("train_images") for row in found.rows}
    pairs = [key[:2] for key in results.by_way(found.rows)]
    mixed = dict.fromkeys(source for source, architecture in pairs if pairs.count((source, architecture)) > 1)
    selection = next((row["selection"] for row in found.rows if row["source"] == "distilled"), None)
    summaries = results.summary(found.rows)
    lines = tables.result_lines(summaries)
    kinds = {(line.seeds, line.architecture) for line in lines}
    return {
        "first": tables.first_lines(found.rows),
        "added": added(found.rows),
        "headings": (*tables.headings(), "epochs, lr"),
        "lines": [replace(line, figures=(*line.figures, line.trained)) for line in lines],
        "protocol_notes": [*tables.protocol_notes(found.rows), *tables.unpaired_notes(found.rows)],
        "uniform": "{} {} networks with different seeds each".format(*kinds.pop()) if len(kinds) == 1 else "",
        "count_headings": tables.headings(groups),
        "count_lines": by_count if groups else [],
        "calibration_headings": tables.headings(tables.CALIBRATION),
        "calibration_lines": tables.calibration_lines(summaries),
        "label_notes": tables.label_notes(found.rows),
        "trained": [(tables.source_name(s), n) for s, n in trained.items() if n is not None],
        "selection": tables.SELECTION.get(selection, selection) if selection else None,
        "optimistic": selection == "test-as-published",
        "split": " and ".join(sorted({row["split"] for row in found.rows})),
        "mixed": [tables.source_name(s) for s in mixed],
    }


def _published(found: Contents) -> dict[str, Any] | None:
    """Return published figures beside the run's own, if data set, imbalance factor and IPC match."""
    figures_of_cell = published.beside(found.recipe, found.counts)
    if not figures_of_cell:
        return None
    summaries = results.summary(row for row in found.main_rows if row["split"] == "test")
    model = found.recipe.model
    return {
        "lines": tables.published_lines(figures_of_cell, summaries),
        "citation": published.CITATION,
        "own": f"depth {model.depth}, width {model.width}",
    }


def _groups(found: Contents) -> list[dict[str, Any]]:
    """Return both groupings of the classes, with their class counts and ranges of training images."""
    if not found.counts:
        return []
    rules = {"many": f"more than {MANY_SHOT_ABOVE} training images", "few": f"fewer than {FEW_SHOT_BELOW}"}
    out = []
    for grouping, heading in (
        ("by_thirds", "by thirds of the classes, ordered by training images"),
        ("by_count", "by number of training images, as the long-tail literature does"),
    ):
        members = head_medium_tail(found.counts)[grouping]
        rows = [
            (name, len(of), _range([found.counts[c] for c in of]), _listed([found.class_names[c] for c in of]))
            for name, of in members.items()
            if of
        ]
        note = {
            "by_count": f"many: {rules['many']}; medium: {FEW_SHOT_BELOW} to {MANY_SHOT_ABOVE}; few: {rules['few']}"
        }
        out.append({"heading": heading, "rows": rows, "note": note.get(grouping, "")})
    return out


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{high:,}" if low == high else f"{high:,} to {low:,}"


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _gallery(shown: pictures.Gallery | None) -> dict[str, Any] | None:
    if shown is None:
        return None
    rows = [
        {
            "name": name,
            "count": f"{count:,}",
            "synthetic": pictures.data_uris(synthetic, shown.lossless),
            "initial": pictures.data_uris(initial, shown.lossless),
        }
        for name, count, synthetic, initial in zip(
            shown.names, shown.counts, shown.synthetic_GMHHC, shown.initial_GMHHC, strict=True
        )
    ]
    images = int(shown.synthetic_GMHHC.shape[1])
    return {
        "rows": rows,
        "limited": shown.limited,
        "lossless": shown.lossless,
        "images": images,
        "cell": max(40, min(72, 440 // images)),
    }


def _costs(found: Contents) -> dict[str, Any]:
    stages = list(found.history.costs.values())
    rows = [
        (
            c.stage,
            tables.duration(c.seconds),
            str(c.attempts),
            tables.gigabytes(c.host_bytes),
            tables.gigabytes(c.device_bytes),
            c.last_error or "",
        )
        for c in stages
    ]
    rates = [
        (name, f"{value:.3g}" if value < 100 else f"{value:,.0f}")
        for name, value in found.history.median_rate().items()
    ]
    started = found.history.distill_started
    return {
        "rows": rows,
        "rates": rates,
        "total": tables.duration(sum(c.seconds for c in stages)) if stages else None,
        "device": any(c.device_bytes is not None for c in stages),
        "stopped": [c for c in stages if c.last_error],
        "shared": found.distilled is not None and not found.history.expert_epochs,
        "path": f"Gradient path {started['gradient']}: {started['why']}."
        if started and "gradient" in started and "why" in started
        else None,
    }


def _facts(found: Contents) -> list[tuple[str, str]]:
    """Return provenance: label, value."""
    r, meta, data = found.recipe, found.distilled.meta if found.distilled else None, found.history.data
    versions = dict(meta.versions if meta else {})
    measured = {f"{name} {version}" for row in found.rows for name, version in (row.get("versions") or {}).items()}
    facts = [
        ("Job", r.name),
        ("Recipe hash", r.recipe_hash()),
        ("Experts hash", r.experts_hash()),
        ("Data fingerprint", meta.data_fingerprint if meta else data.get("fingerprint", "") if data else ""),
        ("Seeds", f"{r.seed} (distillation and evaluation), {r.experts.seed} (experts)"),
        ("Iteration of the set", _iteration(found)),
        ("Learned alpha", f"{meta.lr:.6g}" if meta else ""),
        ("Initial set", "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in meta.label_source.items()) if meta else ""),
        ("Made with", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("Measured with", ", ".join(sorted(measured))),
        (
            "Host and device",
            ", ".join(sorted({f"{row['host']} ({row['device']})" for row in found.rows if row.get("host")})),
        ),
        ("Recorded", " to ".join(_when(t) for t in (found.history.began, found.history.ended) if t is not None)),
    ]
    return [(label, value) for label, value in facts if value]


def _iteration(found: Contents) -> str:
    """Name the set's iteration and their total; empty for an imported set, which no iteration of this run made."""
    meta = found.distilled.meta if found.distilled else None
    if meta is None or meta.imported:
        return ""
    return f"{meta.iteration:,} of {found.recipe.distill.iterations:,}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
