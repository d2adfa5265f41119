"""Names in a recipe that refer to code outside the package: ``module:attribute``, or an entry point of a group.

Packages offer names through entry points; a module must only be importable (installed, or its folder in PYTHONPATH) by
every process of the run. docs/extending.md has an example of each group.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic_core import PydanticCustomError

from lad_dist.errors import LadDistError, RecipeError


@dataclass(frozen=True)
class Name:
    """Validator of a field's names: ``known`` ones, entry points of ``group``, ``module:attribute``.

    The last two may have one of ``endings``, longest first. Called by pydantic: an unknown name is a fault of the
    recipe. A module's content is checked only when it is used.
    """

    known: tuple[str, ...]
    group: str
    endings: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        if not self.takes(name):
            raise PydanticCustomError("unknown_name", "{fault}", {"fault": f"should be {self.valid}"})
        return name

    def takes(self, name: str) -> bool:
        """Whether the name is known, an entry point, or of the form ``module:attribute``."""
        if name in self.known:
            return True
        ending = next((e for e in self.endings if name.endswith(e)), "")
        module, colon, attribute = name.removesuffix(ending).partition(":")
        if colon:
            return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))
        return module in offered(self.group)

    @property
    def valid(self) -> str:
        """List of all valid names as text."""
        names = [repr(name) for name in (*self.known, *sorted(offered(self.group)))]
        return f"{', '.join(names)} or module:attribute"


def load(name: str, group: str, field: str, error: type[LadDistError] = RecipeError) -> Any:
    """Import the object of a ``module:attribute`` or entry point. Errors name the recipe's ``field``."""
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            there = offered(group)
            if name not in there:
                names = f"the names {', '.join(sorted(there))}" if there else "a name (no installed package offers one)"
                raise error(f"{field}: {name!r} is not known; valid: module:attribute, or {names}")
            return there[name].load()
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    except LadDistError:
        raise
    except ModuleNotFoundError as cause:
        raise error(
            f"{field}: {name}: {cause}; valid: a module that Python finds (installed, or its folder in PYTHONPATH)"
        ) from cause
    except Exception as cause:  # a missing attribute, or any error of the imported code
        raise error(f"{field}: {name}: {type(cause).__name__}: {cause}; valid: module:attribute") from cause


def load_callable(name: str, group: str, field: str, what: str) -> Any:
    """``load`` a callable. Raises RecipeError otherwise; ``what`` describes the valid objects."""
    found = load(name, group, field)
    if not callable(found):
        raise RecipeError(f"{field}: {name}: is a {type(found).__name__}; valid: {what}")
    return found


def offered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}
