"""``lad-dist init``: write a recipe for a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lad_dist.cli import terminal


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Holds train/CLASS/* and test/CLASS/*, or class folders alone.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipe file; default: the folder's name, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Look at a folder of images and write a commented recipe that runs."""
    from lad_dist import recipe_file, starter
    from lad_dist.data.survey import survey
    from lad_dist.errors import RecipeError
    from lad_dist.interrupts import as_exceptions
    from lad_dist.plan.dataset_info import dataset_info
    from lad_dist.rundir import published

    screen = terminal.stdout()
    with as_exceptions():
        found = survey(folder.expanduser())
        file = out.expanduser() if out else Path(f"{starter.name_of(folder.expanduser())}.yaml")
        if file.exists() and not force:
            raise RecipeError(f"{file}: exists; valid: another name by --out, or --force to replace it")
        text = starter.recipe_text(found, starter.name_of(file.with_suffix("")))
        recipe = recipe_file.from_document(recipe_file.parse_yaml(text, str(file)))
        dataset_info(recipe.data)  # inspect every image now, before hours are spent
        with published(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for line in starter.said(found):
        screen.print(line, soft_wrap=True)
    screen.print(f"recipe: {file}", soft_wrap=True)
    screen.print(
        f"next: lad-dist run {file} --quick     a short trial, within ten minutes on two cores", soft_wrap=True
    )
    screen.print(f"      lad-dist plan {file}            what the whole run costs", soft_wrap=True)
