"""Shared parts of all charts: the frame, round ticks, text and the enclosing SVG.

Coordinates are SVG coordinates: x to the right, y down. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

_CHARACTER = 6.9  # approximate width of a typical character of the charts' text; fonts differ


@dataclass(frozen=True)
class Frame:
    """Plotting area inside a drawing, with the ranges of its axes."""

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


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Return ``about`` round numbers enclosing ``low`` to ``high``, or within them if ``whole``."""
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


def tick_text(value: float, among: Sequence[float]) -> str:
    """Format a tick: as many decimals as its neighbours need, a true minus sign."""
    step = abs(among[1] - among[0]) if len(among) > 1 else abs(value) or 1.0
    if value and (step < 1e-4 or step >= 1e7):
        return f"{value:.3g}".replace("-", "−")
    decimals = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return f"{value:,.{decimals}f}".replace("-", "−")


def text_width(text: str) -> float:
    """Estimate a text's width: the page has no embedded fonts to measure."""
    return sum(_CHARACTER * (0.55 if c in "fijlrtI.,:' " else 1.4 if c in "mwMW" else 1.0) for c in text)


def text(x: float, y: float, words: str, anchor: str = "start", transform: str = "") -> str:
    """Draw words at a point; ``anchor`` as in SVG: start, middle or end."""
    turned = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(words)}</text>'


def svg(title: str, width: int, height: int, parts: Sequence[str]) -> Markup:
    """Return the whole drawing; ``title`` is its label for screen readers."""
    body = "".join(parts)
    # Safe: every text above went through ``escape``; the rest are numbers and this file's own names.
    return Markup(f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}">{body}</svg>')  # noqa: S704


def upright_title(frame: Frame, title: str) -> str:
    """Draw the y axis title at the left edge of the drawing."""
    middle = (frame.top + frame.bottom) / 2
    return f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(title)}</text>'
