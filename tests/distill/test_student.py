"""The student: both gradient paths, both phases and both forms of the block against the textbook double loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from textbook import TextbookNet, double_loop
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.distill.memory import choose_path, free_bytes, step_bytes
from lad_dist.distill.student import Batch, Phase, PhaseResult, Student, SyntheticSet, soft_cross_entropy
from lad_dist.errors import NumericalError
from lad_dist.models.convnet import ConvNet
from lad_dist.recipe import OPERATIONS, AugmentConfig
from lad_dist.seeds import rng

PATHS = ("keep", "recompute", "captured")


class Problem:
    """Random images, labels, weights and windows; batches of three out of seven images, one of a single image."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        channels: int = 3,
        side: int = 10,
        width: int = 6,
        depth: int = 2,
        steps: int = 7,
        operations: tuple[str, ...] = OPERATIONS,
        weighted: bool = True,
        fused: bool = True,
        count: int = 7,
        batch: int = 3,
    ) -> None:
        torch.manual_seed(0)
        classes = 4
        self.textbook = TextbookNet(channels, side, width, depth, classes).to(dtype)
        module = ConvNet(channels, side, classes, width, depth, fused=fused).to(dtype)
        self.student = Student(module)
        self.start = self.textbook.flat()
        images = torch.randn(count, channels, side, side, dtype=dtype)
        self.synthetic = SyntheticSet(images, torch.randn(count, classes, dtype=dtype), torch.tensor(0.05, dtype=dtype))
        self.target = self.start + 0.02 * torch.randn_like(self.start)
        self.weights = torch.tensor([2.0, 1.2, 0.6, 0.2], dtype=dtype) if weighted else None
        draws = rng(0, "student")
        self.batches = []
        for step in range(steps):
            rows = torch.from_numpy(draws.permutation(count)[: 1 if step == 2 else batch])
            config = AugmentConfig(operations=operations[step % len(operations) :][:1]) if operations else None
            drawn = augment.draw(draws, config, len(rows), side) if config else None
            self.batches.append(Batch(rows, drawn))

    def to(self, device: torch.device) -> Problem:
        """This problem, from here on with its tensors on ``device``."""
        self.student = Student(self.student.module.to(device))
        s = self.synthetic
        self.synthetic = SyntheticSet(s.images_SCHH.to(device), s.logits_SK.to(device), s.alpha.to(device))
        self.start, self.target = self.start.to(device), self.target.to(device)
        self.weights = None if self.weights is None else self.weights.to(device)
        self.batches = [Batch(b.rows_B.to(device), b.draw, b.whole) for b in self.batches]
        return self

    def phase(self, classifier_only: bool, span: str | None = None) -> Phase:
        layout = self.student.layout
        target = self.target.clone()
        if classifier_only:
            target[layout.span("backbone")] = self.start[layout.span("backbone")]
        compared = layout.span(span or ("all" if classifier_only else "backbone"))
        return Phase(self.start, target, self.batches, compared, self.weights, classifier_only)

    def expected(self, phase: Phase) -> dict[str, Tensor]:
        s = self.synthetic
        views = [(lambda x, d=b.draw: x if d is None else augment.apply(x, d)) for b in phase.batches]
        return double_loop(
            self.textbook,
            s.images_SCHH,
            s.logits_SK,
            s.alpha,
            phase.start_P,
            phase.target_P,
            [b.rows_B for b in phase.batches],
            weights=phase.class_weights_K,
            views=views,
            classifier_only=phase.classifier_only,
            compared=phase.span,
        )


class Plain(nn.Module):
    """The same network by somebody else: torch's own layers, the classifier declared first and called otherwise."""

    classifier_name = "parts.head"

    def __init__(self, channels: int, side: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        left = (side + 4 * (channels == 1)) >> depth
        self.parts = nn.ModuleDict({"head": nn.Linear(width * left * left, classes)})
        for block in range(depth):
            first = block == 0
            padding = 3 if first and channels == 1 else 1
            self.parts[f"convolution{block}"] = nn.Conv2d(channels if first else width, width, 3, padding=padding)
            self.parts[f"norm{block}"] = nn.GroupNorm(width, width)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        for block in range(self.depth):
            x = self.parts[f"norm{block}"](self.parts[f"convolution{block}"](x)).relu()
            x = nn.functional.avg_pool2d(x, 2)
        return self.parts["head"](x.flatten(1))


def quantities(result: PhaseResult) -> dict[str, Tensor]:
    return {
        "image_grad": result.by_rows.images_SCHH,
        "label_grad": result.by_rows.labels_SK,
        "grand_loss": result.match.loss,
        "lr_grad": result.match.alpha_gradient,
        "gradient_sum": result.gradient_sum_P,
        "final_student_params": result.final_P,
        "inner_losses": torch.stack(result.inner_losses),
    }


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    return max((float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()), n) for n in ours)


@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize(("channels", "side", "fused", "dtype"), [
    (3, 10, True, torch.float64), (1, 9, True, torch.float64), (3, 10, False, torch.float64),
    (3, 10, True, torch.float32), (1, 8, True, torch.float32), (3, 10, False, torch.float32),
])  # fmt: skip
def test_all_paths_equal_the_textbook_double_loop(classifier_only, weighted, channels, side, fused, dtype):
    problem = Problem(dtype, channels=channels, side=side, fused=fused, weighted=weighted)
    assert {b.draw.operation for b in problem.batches} == set(OPERATIONS)
    phase = problem.phase(classifier_only)
    expected = problem.expected(phase)
    found = {path: quantities(problem.student.run(problem.synthetic, phase, path)) for path in PATHS}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for path in PATHS:
        error, name = worst(found[path], expected)
        assert error < tolerance, (path, name)
    for path in PATHS[1:]:
        assert worst(found["keep"], found[path])[0] < tolerance


@pytest.mark.parametrize("path", PATHS)
def test_joint_phase_compares_all_weights(path):
    problem = Problem(torch.float64)
    joint, backbone = problem.phase(False, "all"), problem.phase(False)
    result = problem.student.run(problem.synthetic, joint, path)
    assert worst(quantities(result), problem.expected(joint))[0] < 1e-12
    other = problem.student.run(problem.synthetic, backbone, path)
    assert not torch.allclose(result.by_rows.images_SCHH, other.by_rows.images_SCHH)
    assert torch.equal(result.final_P, other.final_P)  # what is compared has no say in how the student trains


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("classifier_only", [False, True])
def test_nothing_outside_changes(path, classifier_only):
    problem = Problem(torch.float32, operations=())
    tensors = [problem.start, problem.target, problem.synthetic.images_SCHH, problem.synthetic.logits_SK,
               problem.synthetic.alpha, *problem.student.module.parameters()]  # fmt: skip
    before = [t.detach().clone() for t in tensors]
    phase = problem.phase(classifier_only)
    first = problem.student.run(problem.synthetic, phase, path)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(p.grad is None for p in problem.student.module.parameters())
    again = problem.student.run(problem.synthetic, phase, path)
    assert all(torch.equal(a, b) for a, b in zip(quantities(first).values(), quantities(again).values(), strict=True))
    assert not any(t.requires_grad for t in quantities(first).values())


def test_an_unused_image_has_no_gradient():
    problem = Problem(torch.float32, operations=())
    problem.batches = [Batch(torch.tensor([0, 2])), Batch(torch.tensor([2, 5]))]
    result = problem.student.run(problem.synthetic, problem.phase(False), "keep")
    norms = result.by_rows.images_SCHH.flatten(1).norm(dim=1)
    assert norms.nonzero().flatten().tolist() == [0, 2, 5]


def test_the_classifier_phase_leaves_the_backbone():
    problem = Problem(torch.float32)
    result = problem.student.run(problem.synthetic, problem.phase(True), "keep")
    backbone = problem.student.layout.span("backbone")
    assert torch.equal(result.final_P[backbone], problem.start[backbone])
    assert float(result.gradient_sum_P[backbone].abs().sum()) == 0
    assert float(result.gradient_sum_P[problem.student.layout.span("classifier")].abs().sum()) > 0


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_that_did_not_move(path):
    problem = Problem(torch.float32)
    problem.target = problem.start.clone()
    problem.target[problem.student.layout.span("classifier")] += 1  # the representation phase does not look there
    with pytest.raises(NumericalError, match="same weights at both ends of a window"):
        problem.student.run(problem.synthetic, problem.phase(False), path)


def test_soft_cross_entropy_by_hand():
    label_logits = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    plain = -(0.5 * torch.tensor(0.8).log() + 0.5 * torch.tensor(0.2).log()
              + 0.9 * torch.tensor(0.6).log() + 0.1 * torch.tensor(0.4).log()) / 2  # fmt: skip
    weighted = -(0.5 * 3 * torch.tensor(0.8).log() + 0.5 * torch.tensor(0.2).log()
                 + 0.9 * 3 * torch.tensor(0.6).log() + 0.1 * torch.tensor(0.4).log()) / 2  # fmt: skip
    torch.testing.assert_close(soft_cross_entropy(logits, label_logits, None), plain)
    torch.testing.assert_close(soft_cross_entropy(logits, label_logits, torch.tensor([3.0, 1.0])), weighted)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator held during ``work`` beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def sized(steps: int) -> Problem:
    return Problem(torch.float32, width=16, side=16, steps=steps, count=40, batch=40)


def peak(problem: Problem, classifier_only: bool, path: str) -> int:
    phase = problem.phase(classifier_only)
    return peak_bytes(lambda: problem.student.run(problem.synthetic, phase, path))


@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
def test_recompute_takes_no_more_memory_for_more_steps(classifier_only):
    few, many = (peak(sized(steps), classifier_only, "recompute") for steps in (4, 16))
    assert many < 1.05 * few
    few, many = (peak(sized(steps), classifier_only, "keep") for steps in (4, 16))
    assert many > 2 * few  # or the measurement sees nothing


def test_the_estimate_is_what_a_kept_step_takes():
    few, many = sized(4), sized(16)
    phase = few.phase(False)
    taken = (peak(many, False, "keep") - peak(few, False, "keep")) / 12
    assert step_bytes(few.student, few.synthetic, phase, phase.batches[0]) == pytest.approx(taken, rel=0.2)


def test_choice_of_path(small_recipe, monkeypatch):
    problem = sized(4)

    def choose(**fields) -> tuple[str, str]:
        return choose_path(small_recipe(distill=fields), problem.student, problem.synthetic, problem.phase(False))

    needed = 4 * step_bytes(problem.student, problem.synthetic, problem.phase(False), problem.batches[0])
    assert choose(memory_gb=0.99 * needed / 1e9)[0] == "recompute"
    assert choose(memory_gb=1.01 * needed / 1e9)[0] == "keep"
    path, why = choose(memory_gb=1e-4)
    assert path == "recompute" and "4 steps" in why
    assert choose(gradient="keep", memory_gb=1e-9)[0] == "keep"
    assert choose(gradient="recompute", memory_gb=1e9)[0] == "recompute"
    monkeypatch.setattr("lad_dist.distill.memory.free_bytes", lambda device: 100 * needed)
    assert choose()[0] == "keep"
    monkeypatch.setattr("lad_dist.distill.memory.free_bytes", lambda device: needed)  # a part of it is left to others
    assert choose()[0] == "recompute"


def test_free_memory_of_this_machine_is_plausible():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**45


@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_network_is_unrolled_as_the_same_convnet_is(classifier_only, path, dtype, tolerance, channels):
    problem = Problem(dtype, channels=channels)
    other = Student(Plain(channels, 10, 6, 2, 4).to(dtype))
    assert other.layout.span("classifier") == problem.student.layout.span("classifier")
    phase = problem.phase(classifier_only)
    ours, theirs = (quantities(s.run(problem.synthetic, phase, path)) for s in (other, problem.student))
    assert worst(ours, theirs)[0] < tolerance, worst(ours, theirs)
