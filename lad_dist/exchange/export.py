"""Export a distilled set in one of the forms."""

from __future__ import annotations

from pathlib import Path

from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError
from lad_dist.exchange import card, folder, pt, tables
from lad_dist.exchange.about import ABOUT, CARRIERS, Form, about, as_json
from lad_dist.exchange.pictures import Progress
from lad_dist.exchange.publishing import published_export
from lad_dist.labeller import FILE as TEACHERS


def export(
    distilled: DistilledSet, form: Form, out: Path, force: bool = False, on_images: Progress = lambda _: None
) -> list[Path]:
    """Publish the set as the folder ``out``; return its files, sorted.

    ``on_images`` is called with the number of newly encoded images. ``force`` replaces an older export, and nothing
    else. The initial images of the distillation are not exported.

    Raises:
        DistilledError: ``out`` exists and may not be replaced, or the images are neither grey nor colour.
        StorageError: it cannot be written; nothing is left behind, and an older export is kept.
    """
    if len(distilled) == 0 or (form != "pt" and distilled.images.shape[1] not in (1, 3)):
        raise DistilledError(
            f"{out}: {tuple(distilled.images.shape)} images cannot be written as pictures; valid: 1 or 3 channels, or --to pt"
        )
    with published_export(out, force) as temporary:
        said = about(distilled, form)
        if form == "pt":
            pt.write(distilled, temporary)
        elif form == "png":
            folder.write_grids(distilled, temporary, on_images)
        elif form == "folder":
            said["precision"] = folder.PRECISION
            folder.write_folder(distilled, temporary, on_images)
        elif form == "parquet":
            tables.write(distilled, temporary, said, on_images)
        else:
            tables.write_hf(distilled, temporary, said, on_images)
            (temporary / "README.md").write_text(card.card(distilled), encoding="utf-8")
        if distilled.teachers is not None and form in CARRIERS:
            distilled.teachers.save(temporary / TEACHERS)
        (temporary / ABOUT).write_text(as_json(said), encoding="utf-8")
    return sorted(file for file in out.rglob("*") if file.is_file())
