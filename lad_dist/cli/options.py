"""Options of the verbs that work on a job, declared once as ``JobOptions``; ``expanded`` adds them to a verb.

    def plan(asked: JobOptions, hours: Annotated[float, typer.Option(...)] = 1.0) -> None: ...

becomes ``lad-dist plan JOB [--out ...] [--on ...] ... [--hours ...]``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lad_dist.catalog import JobFile
    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe

_LONGEST_NAME = 150  # bytes that the options may add to a run folder's name


class Device(StrEnum):
    """Values of ``--device``."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class FleetChoice(StrEnum):
    """Values of ``--fleet``."""

    auto = "auto"
    on = "on"
    off = "off"


FleetOption = Annotated[
    FleetChoice | None,
    typer.Option(help="Train the experts by Ray actors (on) or in this process (off); overrides the profile's fleet."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

RanksOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the work, one device each: on this machine, or as tasks on SLURM; overrides the profile's.",
    ),
]


def _starting(shipped: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a completion of shipped names; where none fits, shells complete file names."""
    return lambda incomplete: [name for name in shipped() if name.startswith(incomplete)]


def _jobs() -> Iterable[str]:
    from lad_dist import catalog

    return catalog.jobs()


def _profiles() -> Iterable[str]:
    from lad_dist import catalog

    return catalog.profiles()


@dataclass(frozen=True)
class JobOptions:
    """Options of every verb that works on a job: what to run, where, and with which resources."""

    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB",
            help="A shipped job's name, a file, or a run folder.",
            autocompletion=_starting(_jobs),
        ),
    ]
    out: Annotated[
        Path | None, typer.Option(help="The run folder; default: runs/NAME, with --set's options in its name.")
    ] = None
    on: Annotated[
        str,
        typer.Option(
            metavar="PROFILE",
            help="Where to run: a shipped profile's name, or a file.",
            autocompletion=_starting(_profiles),
        ),
    ] = "local"
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field of the recipe, for example distill.iterations=500."
        ),
    ] = None
    buffers: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|URI",
            help="Folder of trajectory buffers, for example s3://bucket/prefix, shared by jobs with the same experts; or a run "
            "folder, to use its experts.",
        ),
    ] = None
    device: Annotated[Device | None, typer.Option(help="Overrides the profile's device.")] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; overrides the profile's.")] = None
    log: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Pass the run's events to wandb or your own logger; overrides the profile's."
        ),
    ] = None

    def found_job(self) -> JobFile:
        """Return the recipe file that JOB names. Raises RecipeError."""
        from lad_dist import catalog

        return catalog.find_job(self.job)

    def recipe(self, more: Sequence[str] = ()) -> Recipe:
        """Return the recipe with ``--set``'s fields and ``more``; ``more`` keeps the run folder. Raises RecipeError."""
        from lad_dist import recipe_file

        return recipe_file.load(self.found_job().recipe, [*(self.sets or ()), *more])

    def profile(self, **overrides: object) -> Profile:
        """Return the profile, overridden by the options and by ``overrides`` that are not None. Raises RecipeError."""
        from lad_dist import catalog, recipe_file
        from lad_dist.profile import Profile

        file = catalog.find_profile(self.on)
        document = recipe_file.read_document(file)
        asked = {"device": self.device, "threads": self.threads, "log": self.log or None, **overrides}
        plain = {k: v.value if isinstance(v, StrEnum) else v for k, v in asked.items() if v is not None}
        return recipe_file.validated(Profile, document | plain, str(file))

    def folder(self, recipe: Recipe) -> Path:
        """Return the run folder of ``recipe``."""
        return self.out.expanduser() if self.out else default_out(self.found_job(), recipe, self.sets or ())


def default_out(job: JobFile, recipe: Recipe, sets: Sequence[str]) -> Path:
    """Return runs/NAME, with ``--set``'s options appended to keep variants apart; for a run folder, that folder."""
    if job.run is not None:
        return job.run
    values = dict(item.split("=", 1) for item in sets)
    values.pop("name", None)
    suffix = "".join(f"+{field.strip()}={value.strip()}" for field, value in sorted(values.items()))
    clean = re.sub(r"[^A-Za-z0-9._=+-]+", "_", suffix)[:_LONGEST_NAME]
    if clean != suffix:  # variants must differ even where characters were replaced or cut
        clean += "-" + hashlib.sha256(suffix.encode()).hexdigest()[:8]
    return Path("runs") / f"{recipe.name}{clean}"


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """Return ``verb`` for typer, with each parameter that is a dataclass of options replaced by its fields.

    The fields take the parameter's place, in their own order; their names must differ from the other parameters'.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], list[str]]] = {}
    for parameter in inspect.signature(verb).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            parameters.append(_keyword(parameter.name, hint, parameter.default))
            continue
        types = typing.get_type_hints(hint, include_extras=True)
        fields = dataclasses.fields(hint)
        groups[parameter.name] = (hint, [field.name for field in fields])
        for field in fields:
            missing = field.default is dataclasses.MISSING
            default = inspect.Parameter.empty if missing else field.default
            parameters.append(_keyword(field.name, types[field.name], default))

    def command(**given: Any) -> None:
        made = {name: of(**{field: given.pop(field) for field in fields}) for name, (of, fields) in groups.items()}
        verb(**made, **given)

    command.__name__, command.__doc__, command.__module__ = verb.__name__, verb.__doc__, verb.__module__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect, and so typer, reads
    return command


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
