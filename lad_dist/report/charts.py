"""Charts as inline SVG. Colours are CSS variables of the page, so one drawing serves light, dark and print.

Coordinates are SVG coordinates: x to the right, y down. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

from lad_dist.report.drawing import Frame, svg, text, text_width, tick_text, ticks, upright_title
from lad_dist.report.history import Curve, smoothed, thinned

RAW_POINTS, SMOOTH_POINTS = 600, 240


@dataclass(frozen=True)
class Line:
    """One line of a chart. ``colour`` is a CSS class (s1, s2, s3). ``band`` holds (x, low, high)."""

    name: str
    colour: str
    curve: Curve
    smooth: bool = True  # draw the curve faintly, overlaid with its running mean
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    scale: float = 1.0,
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Draw lines over x, with axes, units and a legend; empty if no line has a point.

    scale: factor for y (100 for percent). reference: (y, text) of a dashed horizontal line. limits: minimum span of the
    y axis. Values far above all others are cut off; the chart states how many.
    """
    lines = [_scaled(line, scale) for line in lines]
    lines = [line for line in lines if any(y is not None for _, y in line.curve)]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.curve]
    low, high, above = _y_range(lines)
    for y in (*(limits or ()), *((reference[0],) if reference else ())):
        low, high = min(low, y), max(high, y)
    y_ticks = ticks(low, high, 5)
    width, height = 480, 280
    frame = Frame(70, 30, width - 14, height - 46, (min(xs), max(xs)), (min(low, y_ticks[0]), max(high, y_ticks[-1])))
    parts = [_grid(frame, ticks(*frame.x, 5, whole=True), y_ticks, x_title, y_title)]
    if reference:
        y = frame.py(reference[0])
        parts.append(
            f'<line class="reference" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            + text(frame.right - 2, y - 5 if y - 18 > frame.top else y + 14, reference[1], "end")
        )
    parts += [_drawn(line, frame) for line in lines]
    parts.append(_legend([(line.name, line.colour) for line in lines], frame.left, 14))
    if above:
        parts.append(text(frame.right, 14, f"{above} value{'s' if above > 1 else ''} above the axis", "end"))
    return svg(title, width, height, parts)


def _scaled(line: Line, scale: float) -> Line:
    curve: Curve = [(x, None if y is None else y * scale) for x, y in line.curve]
    return Line(line.name, line.colour, curve, line.smooth, [(x, a * scale, b * scale) for x, a, b in line.band])


def _y_range(lines: Sequence[Line]) -> tuple[float, float, int]:
    """Return the smallest and largest y to show, and the number of values above (only if they dwarf all others)."""
    values = sorted(y for line in lines for _, y in line.curve if y is not None)
    values_and_bands = values + [v for line in lines for _, a, b in line.band for v in (a, b)]
    low, high = min(values_and_bands), max(values_and_bands)
    usual = values[min(int(len(values) * 0.99), len(values) - 1)]
    span = usual - values[0]
    if span > 0 and high > usual + 2 * span:
        high = usual + 0.2 * span
    if high == low:
        low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    return low, high, sum(v > high for v in values)


def _drawn(line: Line, frame: Frame) -> str:
    parts = []
    if line.band:
        edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        points = " ".join(f"{frame.px(x):.1f},{_clamped(y, frame):.1f}" for x, y in edge)
        parts.append(f'<polygon class="band {line.colour}" points="{points}"/>')
    if line.smooth:
        parts.append(_path(thinned(line.curve, RAW_POINTS), frame, f"raw {line.colour}"))
        parts.append(_path(thinned(smoothed(line.curve), SMOOTH_POINTS), frame, f"line {line.colour}"))
    else:
        parts.append(_path(thinned(line.curve, RAW_POINTS), frame, f"line {line.colour}"))
    return "".join(parts)


def _clamped(y: float, frame: Frame) -> float:
    return frame.py(min(max(y, frame.y[0]), frame.y[1]))


def _path(curve: Curve, frame: Frame, css: str) -> str:
    """Draw a polyline, broken at missing values; an isolated point becomes a dot."""
    pieces: list[list[str]] = [[]]
    for x, y in curve:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{frame.px(x):.1f} {_clamped(y, frame):.1f}")
    d = "".join(f"M{piece[0]}L{' '.join(piece[1:] or piece)}" for piece in pieces if piece)
    return f'<path class="{css}" d="{d}"/>'


def _grid(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str, y_title: str) -> str:
    parts = []
    for y in y_ticks:
        at = frame.py(y)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text(frame.left - 7, at + 4, tick_text(y, y_ticks), "end"))
    for x in x_ticks:
        at = frame.px(x)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>')
        parts.append(text(at, frame.bottom + 17, tick_text(x, x_ticks), "middle"))
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    if x_title:
        parts.append(text((frame.left + frame.right) / 2, frame.bottom + 37, x_title, "middle"))
    parts.append(upright_title(frame, y_title))
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]], left: float, y: float) -> str:
    parts, x = [], left
    for name, colour in entries:
        parts.append(f'<rect class="fill {colour}" x="{x:.1f}" y="{y - 9}" width="10" height="10" rx="2"/>')
        parts.append(text(x + 15, y, name))
        x += 15 + text_width(name) + 18
    return "".join(parts)


# --- accuracy by class --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSeries:
    """Accuracies (fractions) by class, in drawing order: mean and standard deviation over seeds (None: one seed)."""

    name: str
    colour: str
    mean: Sequence[float]
    std: Sequence[float] | None


BARS_UP_TO = 30  # classes; above this, running means over the classes are drawn


def class_chart(
    title: str,
    names: Sequence[str],
    counts: Sequence[int],
    series: Sequence[ClassSeries],
    bands: Sequence[tuple[str, int]],
    width: int,
) -> Markup:
    """Draw accuracy by class above the training images by class, in the given class order, largest first.

    bands: (name, number of classes) from the left. width: of the drawing; use a narrow one for small screens.
    """
    classes, bars = len(names), len(names) <= BARS_UP_TO
    slot = (width - 84) / max(classes, 1)
    shown = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    upright = bars and max(map(text_width, shown)) > slot - 4
    below = (max(map(text_width, shown)) * 0.75 + 24) if upright else 24
    top, height = 50.0, 230.0
    accuracy = Frame(70, top, width - 14, top + height, (0, classes), (0, 100))
    images = Frame(
        70,
        accuracy.bottom + 34,
        width - 14,
        accuracy.bottom + 34 + 76,
        (0, classes),
        (0, max(math.log10(max(*counts, 1)) * 1.12, 1.0)),
    )
    parts = [_grid(accuracy, (), ticks(0, 100, 5), "", "accuracy (%)"), _bands(bands, accuracy, images.bottom)]
    parts += [
        _class_bars(s, i, len(series), names, accuracy, slot) if bars else _class_line(s, accuracy)
        for i, s in enumerate(series)
    ]
    parts.append(_count_bars(names, counts, images, slot))
    if bars:
        for c, name in enumerate(shown):
            x, y = images.px(c + 0.5), images.bottom + 16
            parts.append(
                text(x, y, name, "end", f"rotate(-45 {x:.1f} {y:.1f})") if upright else text(x, y, name, "middle")
            )
    else:
        parts.append(
            text(
                (images.left + images.right) / 2, images.bottom + 17, f"{classes} classes, by training images", "middle"
            )
        )
    parts.append(_legend([(s.name, s.colour) for s in series], accuracy.left, 14))
    return svg(title, width, round(images.bottom + below), parts)


def _bands(bands: Sequence[tuple[str, int]], frame: Frame, bottom: float) -> str:
    parts, start = [], 0
    for name, size in bands:
        if not size:
            continue
        left, right = frame.px(start), frame.px(start + size)
        parts.append(text((left + right) / 2, frame.top - 10, name, "middle"))
        if start:
            parts.append(f'<line class="divider" x1="{left:.1f}" x2="{left:.1f}" y1="{frame.top - 18}" y2="{bottom}"/>')
        start += size
    return "".join(parts)


def _class_bars(s: ClassSeries, i: int, of: int, names: Sequence[str], frame: Frame, slot: float) -> str:
    bar, parts = slot * 0.8 / of, []
    for c, mean in enumerate(s.mean):
        x, y = frame.px(c) + slot * 0.1 + i * bar, frame.py(100 * mean)
        std = s.std[c] if s.std is not None else None
        about = f"{names[c]}: {s.name} {100 * mean:.1f} %" + (f" ± {100 * std:.1f}" if std is not None else "")
        parts.append(
            f'<rect class="fill {s.colour}" x="{x:.1f}" y="{y:.1f}" width="{max(bar - 1, 1):.1f}" '
            f'height="{frame.bottom - y:.1f}"><title>{escape(about)}</title></rect>'
        )
        if std:
            middle = x + max(bar - 1, 1) / 2
            ends = (_clamped(100 * (mean - std), frame), _clamped(100 * (mean + std), frame))
            parts.append(
                f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
    return "".join(parts)


def _class_line(s: ClassSeries, frame: Frame) -> str:
    curve: Curve = [(c + 0.5, 100 * mean) for c, mean in enumerate(s.mean)]
    half = max(len(curve) // 40, 1)
    sums = [0.0]
    for accuracy in s.mean:
        sums.append(sums[-1] + accuracy)
    mean: Curve = []
    for c in range(len(curve)):
        low, high = max(c - half, 0), min(c + half + 1, len(curve))
        mean.append((c + 0.5, 100 * (sums[high] - sums[low]) / (high - low)))
    return _path(thinned(curve, RAW_POINTS), frame, f"raw {s.colour}") + _path(
        thinned(mean, SMOOTH_POINTS), frame, f"line {s.colour}"
    )


def _count_bars(names: Sequence[str], counts: Sequence[int], frame: Frame, slot: float) -> str:
    powers = [p for p in range(6) if p <= frame.y[1]]
    parts = []
    for p in powers:
        y = frame.py(p)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(frame.left - 7, y + 4, f"{10**p:,}", "end"))
    if len(counts) > BARS_UP_TO:
        return "".join([*parts, _count_area(counts, frame), upright_title(frame, "images (log)")])
    for c, count in enumerate(counts):
        y, x = frame.py(max(math.log10(max(count, 1)), 0.03)), frame.px(c) + slot * 0.1
        parts.append(
            f'<rect class="fill count" x="{x:.1f}" y="{y:.1f}" width="{slot * 0.8:.2f}" '
            f'height="{frame.bottom - y:.1f}"><title>{escape(names[c])}: {count:,} training images</title></rect>'
        )
        if slot > 1.2 * text_width(f"{count:,}"):
            parts.append(text(frame.px(c + 0.5), y - 4, f"{count:,}", "middle"))
    parts.append(upright_title(frame, "images (log)"))
    return "".join(parts)


def _count_area(counts: Sequence[int], frame: Frame) -> str:
    """Draw many bars as one outline, of no more steps than the drawing has pixels; a step is its largest class."""
    steps = min(len(counts), round(frame.right - frame.left))
    edges = [i * len(counts) // steps for i in range(steps + 1)]
    points = []
    for start, end in pairwise(edges):
        y = frame.py(max(math.log10(max(*counts[start:end], 1)), 0.03))
        points.append(f"{frame.px(start):.1f} {y:.1f}H{frame.px(end):.1f}")
    outline = "L".join(points)
    return f'<path class="fill count" d="M{frame.left:.1f} {frame.bottom:.1f}L{outline}V{frame.bottom:.1f}z"/>'
