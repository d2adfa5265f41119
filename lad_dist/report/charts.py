"""Charts as inline SVG. Colours are CSS variables of the page, so one drawing serves light, dark and print.

Coordinates are the SVG's own: x to the right, y down. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from lad_dist.report.history import Curve, smoothed, thinned

RAW_POINTS, SMOOTH_POINTS = 600, 240
_CHARACTER = 6.9  # width of a usual character of the charts' text, about; fonts differ


@dataclass(frozen=True)
class Line:
    """One line of a chart. ``colour`` is a CSS class (s1, s2, s3). ``band`` holds (x, low, high)."""

    name: str
    colour: str
    curve: Curve
    smooth: bool = True  # draw the curve faintly, and its running mean over it
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Frame:
    """The plotting area inside a drawing, and the ranges of its axes."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (self.right - self.left)

    def py(self, y: float) -> float:
        return self.bottom - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (self.bottom - self.top)


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
    """Lines over x, with axes, units and a legend. Empty where no line has a point.

    scale: what y is multiplied with (100 for percent). reference: (y, text) of a dashed horizontal line.
    limits: the y axis must span at least this. Values far above all others are cut off, and the chart says how many.
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
            + _text(frame.right - 2, y - 5, reference[1], "end")
        )
    parts += [_drawn(line, frame) for line in lines]
    parts.append(_legend([(line.name, line.colour) for line in lines], frame.left, 14))
    if above:
        parts.append(_text(frame.right, 14, f"{above} value{'s' if above > 1 else ''} above the axis", "end"))
    return _svg(title, width, height, parts)


def _scaled(line: Line, scale: float) -> Line:
    curve: Curve = [(x, None if y is None else y * scale) for x, y in line.curve]
    return Line(line.name, line.colour, curve, line.smooth, [(x, a * scale, b * scale) for x, a, b in line.band])


def _y_range(lines: Sequence[Line]) -> tuple[float, float, int]:
    """The smallest and largest y to show, and how many values lie above (only where they dwarf all others)."""
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
    """A polyline that is broken where a value is missing; a lone point becomes a dot."""
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
        parts.append(_text(frame.left - 7, at + 4, _number(y, y_ticks), "end"))
    for x in x_ticks:
        at = frame.px(x)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>')
        parts.append(_text(at, frame.bottom + 17, _number(x, x_ticks), "middle"))
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    if x_title:
        parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 37, x_title, "middle"))
    parts.append(_upright(frame, y_title))
    return "".join(parts)


def _upright(frame: Frame, title: str) -> str:
    middle = (frame.top + frame.bottom) / 2
    return f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(title)}</text>'


def _legend(entries: Sequence[tuple[str, str]], left: float, y: float) -> str:
    parts, x = [], left
    for name, colour in entries:
        parts.append(f'<rect class="fill {colour}" x="{x:.1f}" y="{y - 9}" width="10" height="10" rx="2"/>')
        parts.append(_text(x + 15, y, name))
        x += 15 + _width(name) + 18
    return "".join(parts)


# --- accuracy by class --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSeries:
    """Accuracies (fractions) by class, mean and standard deviation over seeds (None: one seed), in drawing order."""

    name: str
    colour: str
    mean: Sequence[float]
    std: Sequence[float] | None


BARS_UP_TO = 30  # classes; beyond, running means over the classes are drawn


def class_chart(
    title: str,
    names: Sequence[str],
    counts: Sequence[int],
    series: Sequence[ClassSeries],
    bands: Sequence[tuple[str, int]],
    width: int,
) -> Markup:
    """Accuracy by class above the training images by class; classes in the order given, largest first.

    bands: (name, how many classes) from the left. width: of the drawing; a narrow one serves small screens.
    """
    classes, bars = len(names), len(names) <= BARS_UP_TO
    slot = (width - 76) / max(classes, 1)
    shown = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    upright = bars and max(map(_width, shown)) > slot - 4
    below = (max(map(_width, shown)) * 0.75 + 24) if upright else 24
    top, height = 50.0, 230.0
    accuracy = Frame(62, top, width - 14, top + height, (0, classes), (0, 100))
    images = Frame(
        62,
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
                _text(x, y, name, "end", f"rotate(-45 {x:.1f} {y:.1f})") if upright else _text(x, y, name, "middle")
            )
    else:
        parts.append(
            _text(
                (images.left + images.right) / 2, images.bottom + 17, f"{classes} classes, by training images", "middle"
            )
        )
    parts.append(_legend([(s.name, s.colour) for s in series], accuracy.left, 14))
    return _svg(title, width, round(images.bottom + below), parts)


def _bands(bands: Sequence[tuple[str, int]], frame: Frame, bottom: float) -> str:
    parts, start = [], 0
    for name, size in bands:
        if not size:
            continue
        left, right = frame.px(start), frame.px(start + size)
        parts.append(_text((left + right) / 2, frame.top - 10, name, "middle"))
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
    mean: Curve = []
    for c in range(len(curve)):
        near = s.mean[max(c - half, 0) : c + half + 1]
        mean.append((c + 0.5, 100 * sum(near) / len(near)))
    return _path(curve, frame, f"raw {s.colour}") + _path(mean, frame, f"line {s.colour}")


def _count_bars(names: Sequence[str], counts: Sequence[int], frame: Frame, slot: float) -> str:
    powers = [p for p in range(6) if p <= frame.y[1]]
    parts = []
    for p in powers:
        y = frame.py(p)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(frame.left - 7, y + 4, f"{10**p:,}", "end"))
    for c, count in enumerate(counts):
        y, x = frame.py(max(math.log10(max(count, 1)), 0.03)), frame.px(c) + slot * 0.1
        parts.append(
            f'<rect class="fill count" x="{x:.1f}" y="{y:.1f}" width="{slot * 0.8:.2f}" '
            f'height="{frame.bottom - y:.1f}"><title>{escape(names[c])}: {count:,} training images</title></rect>'
        )
        if slot > _width(f"{count:,}") + 2:
            parts.append(_text(frame.px(c + 0.5), y - 4, f"{count:,}", "middle"))
    parts.append(_upright(frame, "images (log)"))
    return "".join(parts)


# --- small parts --------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """``about`` round numbers from at or below ``low`` to at or above ``high``, or within them where ``whole``."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(math.ceil(step), 1)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, among: Sequence[float]) -> str:
    """A tick's text: as many decimals as its neighbours need, a true minus sign."""
    step = abs(among[1] - among[0]) if len(among) > 1 else abs(value) or 1.0
    if value and (step < 1e-4 or step >= 1e7):
        return f"{value:.3g}".replace("-", "−")
    decimals = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return f"{value:,.{decimals}f}".replace("-", "−")


def _width(text: str) -> float:
    """About how wide a text is: a page has no fonts of its own that could be measured beforehand."""
    return sum(_CHARACTER * (0.55 if c in "fijlrtI.,:' " else 1.4 if c in "mwMW" else 1.0) for c in text)


def _text(x: float, y: float, text: str, anchor: str = "start", transform: str = "") -> str:
    turned = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    # Safe: every text above went through ``escape``; the rest are numbers and this file's own names.
    return Markup(f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}">{body}</svg>')  # noqa: S704
