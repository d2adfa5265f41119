"""Optional packages (``pip install 'lad-dist[ray,slurm,fast,hub]'``): whether they are there, and the error where they are not."""

from __future__ import annotations

from importlib.util import find_spec

from lad_dist.errors import LadDistError


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec, or as None
        return False


def missing(package: str, extra: str, what: str, kind: type[LadDistError], instead: str = "") -> LadDistError:
    """Return the error of ``kind`` that says which extra brings ``package``, without which ``what`` cannot be done."""
    return kind(f"{what} needs {package}, which is not installed; valid: pip install 'lad-dist[{extra}]'{instead}")
