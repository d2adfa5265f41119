"""Write docs/recipes.md from the models of recipe.py and profile.py: ``python docs/make_recipes.py``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lad_dist.methods import METHODS
from lad_dist.plugins import Name
from lad_dist.profile import Profile
from lad_dist.recipe import Recipe, affects

INTRO = """\
# Recipes and profiles, field by field

*Written by `python docs/make_recipes.py` from `lad_dist/recipe.py` and `lad_dist/profile.py`.*

A recipe (`jobs/*.yaml`) says what to compute, a profile (`cluster/*.yaml`, `--on`) says where. Both are YAML. A key that does
not exist is refused with the nearest one that does; all faults are reported at once. `--set` sets any field of the recipe:

    lad-dist run digits-lt --set distill.iterations=500 --set data.imbalance_factor=40 --out runs/digits-lt-f40

The resolved recipe, every field spelled out, is saved as `recipe.yaml` of the run. A recipe may be a file or the name of one
that ships (`lad-dist jobs`).

## When a run's recipe changes

Every field says which stage's result depends on it first: those of `data`, `model`, `augment` and `experts` affect the
experts; `ipc`, `seed`, `method`, `buffer` and `distill` the distillation; `evaluate` the evaluation; exceptions are noted with
the field. A run folder takes on a changed recipe where that contradicts nothing it holds:

| changed | before anything is distilled | after |
|---|---|---|
| affects nothing | accepted | accepted |
| affects evaluate | accepted; networks that were measured otherwise are measured again | the same |
| `distill.iterations`, more | accepted | goes on and equals a run of as many, bit for bit on a CPU; refused with a cosine |
| affects distill (`experts.count` too) | accepted | refused: `--out OTHER --buffers RUN` shares the experts |
| affects experts | refused | refused |

    lad-dist run digits-lt --set distill.schedule=constant --set distill.iterations=500 --out runs/growing
    lad-dist run digits-lt --set distill.schedule=constant --set distill.iterations=600 --out runs/growing
"""


def shown(kind: Any) -> str:
    """A type as people write it: ``number >= 0``'s bounds come from the field."""
    if get_origin(kind) is typing.Annotated:
        names = next((n for m in kind.__metadata__ if (n := of_names(m))), "")
        return names or shown(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(shown(k) for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is typing.Literal:
        return ", ".join(f"`{'off' if v is False else v}`" for v in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {shown(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def of_names(metadata: Any) -> str:
    """The names that a field takes, where it takes a name that somebody else may offer."""
    name = getattr(metadata, "func", None)
    if not isinstance(name, Name):
        return ""
    return ", ".join(f"`{known}`" for known in name.known) + f" or a name of [`{name.group}`](extending.md)"


def bounds(field: FieldInfo) -> str:
    """`>= 0, < 1` of a field."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{signs[n]} {getattr(m, n):g}" for m in _metadata(field) for n in signs if getattr(m, n, None) is not None
    ]
    return ", ".join(dict.fromkeys(found))


def _metadata(field: FieldInfo) -> list[Any]:
    kinds = (field.annotation, *get_args(field.annotation))
    inner = [m for kind in kinds for m in getattr(kind, "__metadata__", ())]
    return [*field.metadata, *(one for m in inner for one in (m.metadata if isinstance(m, FieldInfo) else [m]))]


def rows(model: type[BaseModel], prefix: str) -> list[str]:
    lines = ["| field | values | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if section(field) is not None:
            continue
        default = field.get_default(call_default_factory=True)
        text = (
            "none" if default is None else ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        )
        names = next((n for m in field.metadata if (n := of_names(m))), "")
        values = " ".join(part for part in (names or shown(field.annotation), bounds(field)) if part)
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        usual = getattr(model, "AFFECTS", None)  # a profile affects no result
        if usual is not None and (stage := affects(f"{prefix}{name}")) != usual:
            description += f" (affects {stage})"
        lines.append(f"| `{prefix}{name}` | {values} | {text or 'empty'} | {description} |")
    return lines


def section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def chapter(model: type[BaseModel], title: str, prefix: str = "", depth: int = 2) -> list[str]:
    summary = " ".join((model.__doc__ or "").split("\n\n")[0].replace("``", "`").split())
    lines = [f"{'#' * depth} {title}", "", *([summary, ""] if summary else []), *rows(model, prefix), ""]
    for name, field in model.model_fields.items():
        inner = section(field)
        if inner is not None:
            lines += chapter(inner, f"`{prefix}{name}`", f"{prefix}{name}.", depth + 1)
    return lines


def methods() -> list[str]:
    lines = ["## Methods", "", "| `method` | | what it sets of `distill` |", "|---|---|---|"]
    for name, method in METHODS.items():
        fields = ", ".join(f"`{k}: {str(v).lower() if isinstance(v, bool) else v}`" for k, v in method.distill.items())
        lines.append(f"| `{name}` | {method.title} | {fields} |")
    return [*lines, "", "More of them: [extending.md](extending.md).", ""]


def text() -> str:
    """The whole page."""
    parts = [*chapter(Recipe, "Recipe"), *methods(), *chapter(Profile, "Profile")]
    return INTRO + "\n" + "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipes.md").write_text(text(), encoding="utf-8")
