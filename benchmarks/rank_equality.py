"""How far a distillation over 2 ranks is from one over 1, and what sums in a fixed order would cost.

    python benchmarks/rank_equality.py [--iterations 60 400] [--write]

Ranks add the same numbers in another order, which differs in the last bit; a student's steps and the next iterations make more of
it. Each row distills digits-lt-matching with 2 experts so many iterations: with 1 rank twice, and with 2 ranks, and compares the
images. ``--write`` puts the tables into results/rank_equality.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lad_dist import catalog, recipe_file
from lad_dist.distilled import DistilledSet
from lad_dist.pipeline import open_pipeline
from lad_dist.plan.calibration import Steps, Timer
from lad_dist.plan.shapes import Shapes
from lad_dist.profile import Profile
from lad_dist.progress import Screen
from lad_dist.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "rank_equality.md"
JOB = "digits-lt-matching"
# name -> (images of a step, parts they are divided into, (channels, side, classes, width, depth))
STEPS = {
    "digits, width 32, 20 images": (20, 10, (1, 8, 10, 32, 2)),
    "3x32x32, width 64, 100 images": (100, 10, (3, 32, 10, 64, 3)),
}


@dataclass(frozen=True)
class Difference:
    """Of two sets of images: the largest of a pixel, and the root mean square, both relative to the largest pixel and to the
    root mean square of what distilling has changed in the images."""

    largest: float
    typical: float

    @classmethod
    def of(cls, a: DistilledSet, b: DistilledSet) -> Difference:
        difference, changed = a.images - b.images, b.images - b.initial_images
        return cls(float(difference.abs().max() / b.images.abs().max()), _rms(difference) / _rms(changed))

    def __str__(self) -> str:
        return "0" if not self.largest else f"{self.largest:.1e} ({self.typical:.1e})"


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def drift(iterations: int, folder: Path) -> tuple[Difference, Difference]:
    """1 rank against 1 rank, and 2 against 1, after so many iterations. ``folder``: keeps the experts from call to call."""
    document = recipe_file.load(catalog.jobs()[JOB]).model_dump(mode="json")
    document["experts"] |= {"count": 2}
    document["distill"] |= {"iterations": iterations}
    recipe = Recipe.model_validate(document)

    def distilled(name: str, ranks: int) -> DistilledSet:
        screen, profile = (
            Screen(Console(file=io.StringIO())),
            Profile(fleet="off", threads=1, ranks=ranks, device="cpu"),
        )
        pipeline = open_pipeline(recipe, folder / name, profile, folder / "buffers", torch.device("cpu"), screen)
        pipeline.experts()
        pipeline.distill()
        found = DistilledSet.load(pipeline.run.distilled)
        pipeline.events.close()
        shutil.rmtree(folder / name)
        return found

    one, again, two = distilled("one", 1), distilled("again", 1), distilled("two", 2)
    return Difference.of(again, one), Difference.of(two, one)


def fixed_order(name: str, rounds: int = 7) -> float:
    """How many times as long a student step takes whose images are computed part by part, so that their gradients could be
    added in an order that does not depend on who computed them."""
    images, parts, shapes = STEPS[name]
    timer = Timer(torch.device("cpu"))
    make = Steps(Recipe(ipc=1), Shapes(*shapes), timer.device).of("representation/keep")
    whole, part = make(images), make(images // parts)
    whole(), part()
    times = [(timer.seconds(whole), timer.seconds(part)) for _ in range(rounds)]
    return parts * statistics.median(p for _, p in times) / statistics.median(w for w, _ in times)


def tables(iterations: list[int]) -> str:
    """Both tables as Markdown."""
    lines = ["| iterations | 1 rank again | 2 ranks |", "|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="rank-equality-") as folder:
        for count in iterations:
            again, two = drift(count, Path(folder))
            lines.append(f"| {count} | {again} | {two} |")
    lines += ["", "| a student step | in parts of one class each |", "|---|---|"]
    lines += [f"| {name} | {fixed_order(name):.1f} times as long |" for name in STEPS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 60, 200, 400])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = tables(options.iterations)
    print(found)
    if options.write:
        text = f"""# 2 ranks against 1

{datetime.date.today()}, torch {torch.__version__}, CPU, 1 thread a rank, float32: `python benchmarks/rank_equality.py --write`.
`{JOB}` with 2 experts. Largest difference of a pixel relative to the largest pixel; in brackets the root mean square of the
differences relative to that of what distilling has changed.

{found}
"""
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":  # ranks import this file again
    main()
