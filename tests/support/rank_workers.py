"""What the processes of the tests in tests/parallel/ run; importable by name, as spawned processes need."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lad_dist import ranks as ranks_module
from lad_dist.data import augment
from lad_dist.distill.shards import Share
from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.ranks import ALONE, Ranks
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

CLASSES, SIZE = 3, 8


def student_gradients(
    ranks: Ranks, dtype: torch.dtype, path: str, classifier_only: bool, batch: int, ipc: int = 3
) -> dict:
    """One phase of a small student on this rank's share of 3 classes with ``ipc`` images each."""
    total = CLASSES * ipc
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(total, 1, SIZE, SIZE, generator=generator, dtype=dtype)
    logits = torch.randn(total, CLASSES, generator=generator, dtype=dtype)
    module = build(1, SIZE, CLASSES, 4, 2, seed=0, purpose=("test",)).to(dtype)
    start = flat_parameters(module)
    target = start + 0.01 * torch.randn(len(start), generator=generator, dtype=dtype)
    share = Share.of(total, ranks)
    batches = []
    for step in range(4):
        rows = rng(0, "rows", step).permutation(total)[:batch]
        drawn = augment.draw(rng(0, "augment", step), AugmentConfig(), len(rows), SIZE)
        own, part, _ = share.part(rows, drawn)
        batches.append(Batch(torch.from_numpy(own), part, len(rows)))
    student = Student(module, ranks)
    layout = student.layout
    span = layout.span("all" if classifier_only else "backbone")
    weights = None if classifier_only else torch.tensor([2.0, 0.7, 0.3], dtype=dtype)
    phase = Phase(start, target, batches, span, weights, classifier_only)
    synthetic = SyntheticSet(images[share.rows].clone(), logits[share.rows].clone(), torch.tensor(0.05, dtype=dtype))
    before = dict(ranks.calls)
    result = student.run(synthetic, phase, path)
    calls = {k: n - before.get(k, 0) for k, n in ranks.calls.items() if n > before.get(k, 0)}
    return {
        "images": result.by_rows.images_SCHH,
        "labels": result.by_rows.labels_SK,
        "sum": result.gradient_sum_P,
        "final": result.final_P,
        "alpha": result.match.alpha_gradient,
        "loss": result.match.loss,
        "inner": torch.stack(result.inner_losses),
        "calls": calls,
    }


def student_cases(out: str, cases: Sequence[tuple]) -> None:
    torch.set_num_threads(1)
    where = ranks_module.place()
    assert where is not None
    with ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        found = [student_gradients(ranks, *case) for case in cases]
    torch.save(found, Path(out) / f"rank-{ranks.rank}.pt")


def alone(cases: Sequence[tuple]) -> list[dict]:
    return [student_gradients(ALONE, *case) for case in cases]


def dies(rank: int, how: str, marker: str) -> None:
    """All ranks meet; one of them ends as ``how`` says, once."""
    where = ranks_module.place()
    assert where is not None
    with ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        ranks.total(torch.ones(1))
        if ranks.rank == rank and not Path(marker).exists():
            Path(marker).touch()
            if how == "kill":
                os.kill(os.getpid(), 9)
            from lad_dist import errors

            raise getattr(errors, how)(f"said by rank {rank}")
        if how != "kill" or not Path(marker).exists():
            ranks.total(torch.ones(1))
        ranks.gather(None)


def tells(out: str, name: str) -> None:
    """Write an environment variable."""
    where = ranks_module.place()
    assert where is not None
    (Path(out) / str(where.rank)).write_text(str(os.environ.get(name)))


def one_waits_for_the_other(out: str) -> None:
    """Rank 0 is in Python and stops at a signal; rank 1, which only notes it, is in a sum until rank 0 has gone."""
    from lad_dist.interrupts import as_exceptions, as_flag

    where = ranks_module.place()
    assert where is not None
    heeded = as_exceptions if where.rank == 0 else as_flag
    with heeded(), ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        ranks.total(torch.ones(1))
        (Path(out) / str(ranks.rank)).touch()
        if ranks.first:
            time.sleep(60)
        ranks.total(torch.ones(1))


def collectives(out: str) -> None:
    where = ranks_module.place()
    assert where is not None
    with ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        told = ranks.share({"from": ranks.rank})
        gathered = ranks.gather(ranks.rank)
        total = ranks.total(torch.tensor([float(ranks.rank), 1.0]))
        np.save(Path(out) / f"{ranks.rank}.npy", np.array([told["from"], *gathered, *total.tolist()]))


def whole_iterations(out: str, doc: dict, root: str, dtype: torch.dtype) -> None:
    where = ranks_module.place()
    assert where is not None
    torch.set_num_threads(1)
    with ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        torch.save(iterations(ranks, doc, root, dtype), Path(out) / f"rank-{ranks.rank}.pt")


def a_window_without_length(out: str, doc: dict, root: str) -> None:
    """The error of every rank whose second window has the same weights at both ends."""
    import dataclasses

    from lad_dist.distill.windows import Windows
    from lad_dist.errors import LadDistError

    drawn = Windows.draw

    def draw(windows, stage, iteration, number=0):
        window = drawn(windows, stage, iteration, number)
        return dataclasses.replace(window, target_P=window.start_P.clone()) if number == 1 else window

    Windows.draw = draw
    where = ranks_module.place()
    assert where is not None
    torch.set_num_threads(1)
    with ranks_module.joined(where, torch.device("cpu"), timeout=60) as ranks:
        try:
            iterations(ranks, doc, root, torch.float32, count=1)
        except LadDistError as error:
            (Path(out) / f"rank-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


def iterations(ranks: Ranks, doc: dict, root: str, dtype: torch.dtype, count: int = 5) -> dict:
    """Whole iterations of a recipe whose experts lie in ``root``, in ``dtype``; what this rank ends with."""
    from lad_dist.data.prepare import prepare
    from lad_dist.distill.loop import Context, Distillation
    from lad_dist.distill.start import DataFacts
    from lad_dist.distill.state import State
    from lad_dist.progress import Events, Screen
    from lad_dist.recipe import Recipe
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories.reader import Buffer

    cpu, run, recipe = torch.device("cpu"), RunDir(Path(root)), Recipe.model_validate(doc)
    data = prepare(recipe, run.whitening, cpu)
    context = Context(recipe, run, cpu, Events.nowhere(), Screen.silent(), ranks)
    work = Distillation(context, DataFacts.of(data), Buffer(run.trajectories))
    state = work.start(data if ranks.first else None)
    o = state.optimizers
    state = State(recipe, o.images_SCHH.to(dtype), o.logits_SK.to(dtype), state.initial_SCHH, {}, o.alpha.to(dtype))
    work.student.module.to(dtype)
    original = work.windows.weights
    work.windows.weights = lambda *name: original(*name).to(dtype)
    students = []
    run_phase = work.student.run

    def noted(*args):
        result = run_phase(*args)
        students.append(result.final_P)
        return result

    work.student.run = noted
    calls = []
    for _ in range(count):
        before = ranks.calls.copy()
        work.iterate(state, recipe.distill.gradient)
        calls.append(dict(ranks.calls - before))
    o = state.optimizers
    return {"images": o.images_SCHH, "labels": o.logits_SK, "alpha": o.alpha, "students": torch.stack(students),
            "calls": calls}  # fmt: skip
