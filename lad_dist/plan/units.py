"""Bytes and seconds as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Format bytes: ``12.30 GB``, ``45.0 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Format seconds: ``3.2 h``, ``12.0 min``, ``45.0 s``, ``6.7 ms``."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"
