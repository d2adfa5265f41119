"""Selection among the sets kept during distillation, if ``distill.select`` is not ``last``."""

from __future__ import annotations

import shutil

from lad_dist.data.prepare import PreparedData
from lad_dist.distilled import DistilledSet
from lad_dist.evaluate.accuracy import accuracy
from lad_dist.evaluate.early import trained
from lad_dist.progress import Events, Screen
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir


def select(recipe: Recipe, data: PreparedData, run: RunDir, events: Events, screen: Screen) -> None:
    """Publish the candidate whose network is most accurate on the split named by ``distill.select``.

    ``validation`` measures on images held out of the training pool; ``test-as-published`` measures on the test set, as
    the published protocol does: its results are optimistic, and every row and table derived from them says so.
    """
    split = "validation" if recipe.distill.select == "validation" else "test"
    images, best = data.evaluation_set(split), (-1.0, run.distilled)
    folders = sorted(run.candidate(0).parent.glob("iteration-*"))
    with screen.task(f"select on {split}", len(folders), "candidates") as task:
        for folder in folders:
            candidate = DistilledSet.load(folder)
            pixels, p = candidate.images, candidate.soft_labels
            network = trained(recipe, data, pixels, p, candidate.lr, recipe.evaluate.epochs, "select")
            measured = accuracy(network, images, data.counts)
            # All classes weigh the same, even if a tail class has few or no images held out.
            found = measured.balanced if split == "validation" else measured.overall
            events.emit("candidate", iteration=candidate.meta.iteration, split=split, overall=measured.overall)
            best = max(best, (found, folder), key=lambda pair: pair[0])
            task.advance(1, overall=found)
    with run.publish_folder(run.distilled) as temporary:
        shutil.copytree(best[1], temporary, dirs_exist_ok=True)
    screen.say(f"select: {best[1].name} with {best[0]:.1%} on {split}")
