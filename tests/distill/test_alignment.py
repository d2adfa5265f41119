"""Gradient alignment by class group: against plain loops over single weights, and in a small run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lad_dist.distill.alignment import alignment
from lad_dist.distill.start import DataFacts
from lad_dist.models.layout import Layout
from lad_dist.progress import read_events
from lad_dist.results import FIGURES

CLASSES, FEATURES = 5, 3
LAYOUT = Layout(
    ("body.weight", "body.bias", "classifier.weight", "classifier.bias"),
    ((2, 2), (2,), (CLASSES, FEATURES), (CLASSES,)),
    ("classifier.weight", "classifier.bias"),
)
COUNTS = (4, 50, 9, 100, 20)  # not in label order: head is class 3, tail class 0, medium 1, 2 and 4
ALPHA = torch.tensor(0.3)


def vectors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, target, summed = (torch.randn(LAYOUT.size, generator=generator) for _ in range(3))
    return start, target, summed


def positions(part: str) -> list[int]:
    """Where the weights of a part lie in the flat vector, counted by hand: 4 + 2 of the body, K x F rows, K biases."""
    if part == "backbone":
        return list(range(6))
    classes = {"head": [3], "medium": [1, 2, 4], "tail": [0]}[part]
    rows = [6 + c * FEATURES + f for c in classes for f in range(FEATURES)]
    return rows + [6 + CLASSES * FEATURES + c for c in classes]


def by_loop(part: str, start: torch.Tensor, target: torch.Tensor, summed: torch.Tensor) -> tuple[float, float]:
    dot = student = expert = 0.0
    for i in positions(part):
        moved, wanted = -float(ALPHA) * float(summed[i]), float(target[i]) - float(start[i])
        dot, student, expert = dot + moved * wanted, student + moved * moved, expert + wanted * wanted
    return dot / math.sqrt(student * expert), math.sqrt(student / expert)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("part", ["head", "medium", "tail", "backbone"])
def test_it_is_what_a_loop_over_single_weights_finds(part: str, seed: int) -> None:
    found = alignment(*vectors(seed), ALPHA, LAYOUT, COUNTS)
    cosine, ratio = by_loop(part, *vectors(seed))
    assert found[f"cosine_{part}"] == pytest.approx(cosine, rel=1e-3)
    assert found[f"norm_ratio_{part}"] == pytest.approx(ratio, rel=1e-3)
    assert len(found) == 8 and all(type(value) is float for value in found.values())


def test_a_student_that_goes_where_the_expert_went_for_one_group_only() -> None:
    start, target, _ = vectors()
    summed = -(target - start) / ALPHA  # the whole way
    tail = positions("tail")
    summed[tail] *= -0.5  # half of it, and backwards
    found = alignment(start, target, summed, ALPHA, LAYOUT, COUNTS)
    assert [found[f"cosine_{p}"] for p in ("backbone", "head", "medium", "tail")] == [1.0, 1.0, 1.0, -1.0]
    assert [found[f"norm_ratio_{p}"] for p in ("backbone", "head", "medium", "tail")] == [1.0, 1.0, 1.0, 0.5]


def test_what_is_not_defined_is_left_out() -> None:
    start, target, summed = vectors()
    target[:6], summed[positions("tail")] = start[:6], 0.0
    found = alignment(start, target, summed, ALPHA, LAYOUT, COUNTS)
    assert "cosine_backbone" not in found and "norm_ratio_backbone" not in found  # the expert did not move
    assert "cosine_tail" not in found and found["norm_ratio_tail"] == 0.0  # the student did not
    two = Layout(("classifier.weight",), ((2, 3),), ("classifier.weight",))  # two classes: both medium, and no backbone
    pair = alignment(torch.zeros(6), torch.ones(6), -torch.ones(6), ALPHA, two, (9, 3))
    assert pair == {"cosine_medium": 1.0, "norm_ratio_medium": pytest.approx(0.3)}


def test_it_changes_nothing_that_it_is_given() -> None:
    given = vectors()
    alignment(*given, ALPHA, LAYOUT, COUNTS)
    assert all(torch.equal(a, b) for a, b in zip(given, vectors(), strict=True))


def test_a_run_records_it_for_each_phase(pipeline_of) -> None:
    pipeline = pipeline_of(distill={"iterations": 2})
    pipeline.distill()
    iterations = [e for e in read_events(pipeline.run.events) if e["kind"] == "iteration"]
    assert len(iterations) == 2
    groups = {f"{figure}_{group}" for figure in ("cosine", "norm_ratio") for group in FIGURES[1:]}
    for event in iterations:
        assert set(event["alignment"]) == {"representation", "classifier"}
        representation, classifier = event["alignment"]["representation"], event["alignment"]["classifier"]
        # the representation phase compares the backbone only, so its own figures are the backbone's
        for figure in ("cosine", "norm_ratio"):
            assert representation[f"{figure}_backbone"] == pytest.approx(event[f"{figure}_representation"], rel=2e-3)
        assert set(representation) == groups | {"cosine_backbone", "norm_ratio_backbone"}
        assert set(classifier) == groups  # a frozen backbone moves nowhere
        assert all(-1 <= value <= 1 for name, value in classifier.items() if name.startswith("cosine"))
        # the classifier phase compares all weights, of which only the rows moved: groups lie around the whole
        ratios = [classifier[f"norm_ratio_{group}"] for group in FIGURES[1:]]
        assert min(ratios) <= event["norm_ratio_classifier"] <= max(ratios)


def test_the_figures_are_of_alpha_before_the_step(pipeline_of) -> None:
    """And of the step's own windows: found again from the state before it."""
    pipeline = pipeline_of(distill={"iterations": 1, "lr_alpha": 1e-3})
    with pytest.MonkeyPatch.context() as patch:
        seen: list[tuple[float, dict[str, float]]] = []

        def spy(start_P, target_P, gradient_sum_P, alpha, layout, counts):
            seen.append((float(alpha), alignment(start_P, target_P, gradient_sum_P, alpha, layout, counts)))
            assert tuple(counts) == DataFacts.of(pipeline.data).counts
            return seen[-1][1]

        patch.setattr("lad_dist.distill.loop.alignment", spy)
        pipeline.distill()
    (event,) = [e for e in read_events(pipeline.run.events) if e["kind"] == "iteration"]
    assert [alpha for alpha, _ in seen] == pytest.approx([0.05, 0.05]) and event["alpha"] != pytest.approx(
        0.05, abs=1e-9
    )
    assert json.loads(json.dumps([a for _, a in seen])) == list(event["alignment"].values())


def test_the_joint_methods_have_one_phase_of_all_weights(pipeline_of) -> None:
    pipeline = pipeline_of(method="mtt", distill={"iterations": 1})
    pipeline.distill()
    (event,) = [e for e in read_events(pipeline.run.events) if e["kind"] == "iteration"]
    assert list(event["alignment"]) == ["representation"] and len(event["alignment"]["representation"]) == 8
