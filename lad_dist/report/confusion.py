"""Confusion matrices by class and by groups of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from lad_dist.data.longtail import head_medium_tail
from lad_dist.report import tables
from lad_dist.report.contents import Contents
from lad_dist.report.drawing import Frame, svg, text, text_width, upright_title
from lad_dist.results import TITLES

NUMBERS_UP_TO = 12  # classes; up to this, cells have room for a number
CELLS_UP_TO = 30  # classes; up to this, classes are named and drawn cell by cell
MOST_CELLS = 100  # a side; neighbouring classes are drawn together above this
MOST_OFTEN = 10  # pairs of classes that are listed as confused most often
_LEVELS = 10  # of colour, if there are too many cells to draw one by one


def confusion_chart(
    title: str, names: Sequence[str], shares: Sequence[Sequence[float]], bands: Sequence[tuple[str, float]]
) -> Markup:
    """Draw a confusion matrix: row = true class, column = predicted class, both in the given order (largest first).

    shares: of the images of the true class, as fractions. bands: (name, number of classes) in that order. Colour grows
    with the square root of the share, so that small shares remain visible.
    """
    classes, few = len(names), len(names) <= CELLS_UP_TO
    shown = [name if len(name) <= 10 else name[:9] + "…" for name in names] if few else []
    labels = max([text_width(name) for name in (*shown, *(name for name, _ in bands))])
    side, left, top = 360.0, 36 + labels, 46.0
    frame = Frame(left, top, left + side, top + side, (0, classes), (classes, 0))
    slot = side / classes
    upright = few and max(map(text_width, shown)) > slot - 2
    most = 0.55 if classes <= NUMBERS_UP_TO else 1.0  # a number must stay readable on its cell
    parts = [_confusion_cells(names, shares, frame, slot, most) if few else _confusion_levels(shares, frame, slot)]
    parts.append(
        f'<rect class="edge" x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
        + _confusion_bands(bands, frame, labelled=not few)
    )
    for c, name in enumerate(shown):
        x, y = frame.px(c + 0.5), frame.bottom + 15
        parts.append(text(left - 6, frame.py(c + 0.5) + 4, name, "end"))
        parts.append(text(x, y, name, "end", f"rotate(-45 {x:.1f} {y:.1f})") if upright else text(x, y, name, "middle"))
    below = labels * 0.75 + 32 if upright else 38
    parts += [
        upright_title(frame, "true class"),
        text(left + side / 2, frame.bottom + below, "predicted class", "middle"),
    ]
    parts.append(_share_legend(left, most))
    return svg(title, round(left + side + 14), round(frame.bottom + below + 10), parts)


def _confusion_cells(
    names: Sequence[str], shares: Sequence[Sequence[float]], frame: Frame, slot: float, most: float
) -> str:
    parts = []
    for true, row in enumerate(shares):
        for said, share in enumerate(row):
            if share <= 0:
                continue
            x, y, percent = frame.px(said), frame.py(true), 100 * share
            about = f"{names[true]} predicted as {names[said]}: {percent:.1f} %"
            parts.append(
                f'<rect class="fill s1" x="{x:.1f}" y="{y:.1f}" width="{slot:.1f}" height="{slot:.1f}" '
                f'fill-opacity="{most * math.sqrt(share):.3f}"><title>{escape(about)}</title></rect>'
            )
            if len(names) <= NUMBERS_UP_TO and percent >= 0.5:
                x, y = x + slot / 2, y + slot / 2 + 4
                parts.append(f'<text class="cell" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{percent:.0f}</text>')
    return "".join(parts)


def _confusion_levels(shares: Sequence[Sequence[float]], frame: Frame, slot: float) -> str:
    """Draw many classes: one path per colour level; shares below the first level are omitted."""
    paths: list[list[str]] = [[] for _ in range(_LEVELS + 1)]
    for true, row in enumerate(shares):
        for said, share in enumerate(row):
            level = round(_LEVELS * math.sqrt(share))
            if level:
                paths[level].append(f"M{frame.px(said):.1f} {frame.py(true):.1f}h{slot:.2f}v{slot:.2f}h-{slot:.2f}z")
    return "".join(
        f'<path class="fill s1" fill-opacity="{level / _LEVELS:.2f}" d="{"".join(cells)}"/>'
        for level, cells in enumerate(paths)
        if cells
    )


def _confusion_bands(bands: Sequence[tuple[str, float]], frame: Frame, labelled: bool) -> str:
    parts, start = [], 0.0
    for name, size in bands:
        if not size:
            continue
        x, y = frame.px(start), frame.py(start)
        if start:
            parts.append(f'<line class="divider" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
            parts.append(f'<line class="divider" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if labelled:
            parts.append(text(frame.px(start + size / 2), frame.bottom + 17, name, "middle"))
            parts.append(text(frame.left - 6, frame.py(start + size / 2) + 4, name, "end"))
        start += size
    return "".join(parts)


def _share_legend(left: float, most: float) -> str:
    parts, x = [text(left, 14, "share of the true class's images")], left
    for percent in (1, 10, 50, 100):
        parts.append(
            f'<rect class="fill s1" x="{x:.1f}" y="22" width="14" height="14" '
            f'fill-opacity="{most * math.sqrt(percent / 100):.3f}"/>'
        )
        parts.append(text(x + 19, 33, f"{percent} %"))
        x += 19 + text_width(f"{percent} %") + 16
    return "".join(parts)


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix by class, and by groups: (true group, percentages predicted as each group).

    ``pairs``, if there are many classes: those confused most often, (true class, predicted class, percentage).
    """

    title: str
    chart: Markup
    note: str
    groups: list[tuple[str, list[str]]]
    pairs: list[tuple[str, str, str]]


def confusion_charts(found: Contents) -> list[Confusion]:
    """Draw the distilled and whole sets' confusion on the first architecture, summed over networks that recorded it."""
    if not found.rows:
        return []
    architecture, counts = found.rows[0]["architecture"], found.counts
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    rank_of = np.empty(len(order), dtype=np.int64)
    rank_of[order] = np.arange(len(order))
    thirds = {name: of for name, of in head_medium_tail(counts)["by_thirds"].items() if of}
    names, bands = [found.class_names[c] for c in order], [(name, len(of)) for name, of in thirds.items()]
    cells = min(len(order), MOST_CELLS)
    out = []
    for key in ("distilled", "full"):
        told = [
            pairs
            for row in found.main_rows
            if (row["source"], row["architecture"]) == (key, architecture) and len(pairs := _pairs(row))
        ]
        if not told:
            continue
        pairs_J3 = np.concatenate(told)
        true_J, said_J, images_J = rank_of[pairs_J3[:, 0]], rank_of[pairs_J3[:, 1]], pairs_J3[:, 2]
        drawn = _added_up(true_J * cells // len(order), said_J * cells // len(order), images_J, cells)
        shares = (drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1)).tolist()
        widths = [(name, size * cells / len(order)) for name, size in bands]
        title = f"Confusion: {TITLES[key][0].lower()}{TITLES[key][1:]}"
        networks = f"{len(told)} networks added up" if len(told) > 1 else "1 network"
        note = f"{architecture}, {networks}. A row is a true class; classes with the most training images first."
        if cells < len(order):
            note += f" Each cell holds {len(order) / cells:.3g} neighbouring classes."
        chart = confusion_chart(title, names if cells == len(order) else [""] * cells, shares, widths)
        often = _most_often(true_J, said_J, images_J, names) if len(order) > CELLS_UP_TO else []
        out.append(Confusion(title, chart, note, _by_group(true_J, said_J, images_J, bands), often))
    return out


def _pairs(row: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Return (true, predicted, images) of a row (J, 3), which has them, a matrix, or neither."""
    if row.get("confusion_pairs"):
        return np.array(row["confusion_pairs"], dtype=np.int64)
    matrix = np.array(row.get("confusion") or np.zeros((0, 0)), dtype=np.int64)
    true_J, said_J = matrix.nonzero()
    return np.stack([true_J, said_J, matrix[true_J, said_J]], axis=1)


def _added_up(
    rows_J: npt.NDArray[np.int64], columns_J: npt.NDArray[np.int64], images_J: npt.NDArray[np.int64], cells: int
) -> npt.NDArray[np.int64]:
    """Return a (cells, cells) matrix of images."""
    flat = np.bincount(rows_J * cells + columns_J, weights=images_J, minlength=cells * cells)
    return flat.reshape(cells, cells).astype(np.int64)


def _by_group(
    true_J: npt.NDArray[np.int64],
    said_J: npt.NDArray[np.int64],
    images_J: npt.NDArray[np.int64],
    bands: Sequence[tuple[str, int]],
) -> list[tuple[str, list[str]]]:
    """Return per true group: the percentage of its images predicted as a class of each group."""
    ends = np.cumsum([size for _, size in bands])
    true_group_J, said_group_J = (np.searchsorted(ends, each, side="right") for each in (true_J, said_J))
    into = _added_up(true_group_J, said_group_J, images_J, len(bands))
    return [
        (name, [tables.percent(int(n) / int(row.sum())) if row.sum() else tables.MISSING for n in row])
        for (name, _), row in zip(bands, into, strict=True)
    ]


def _most_often(
    true_J: npt.NDArray[np.int64],
    said_J: npt.NDArray[np.int64],
    images_J: npt.NDArray[np.int64],
    names: Sequence[str],
) -> list[tuple[str, str, str]]:
    """Return the pairs of classes with the largest share of the true class's images, and its percentage."""
    total_K = np.bincount(true_J, weights=images_J, minlength=len(names))
    pairs, which = np.unique(true_J * len(names) + said_J, return_inverse=True)
    true, said = pairs // len(names), pairs % len(names)
    shares = np.bincount(which, weights=images_J) / total_K[true]
    shares[true == said] = 0
    shown = [(int(true[i]), int(said[i]), float(shares[i])) for i in np.argsort(-shares, kind="stable")[:MOST_OFTEN]]
    return [(names[t], names[s], tables.percent(share)) for t, s, share in shown if share > 0]
