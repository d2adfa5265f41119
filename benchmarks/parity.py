"""Recompute every quantity of a golden file with lad_dist's own code: `python benchmarks/parity.py FILE.npz`.

Prints one JSON object {"first/image_grad": relative error, ...}; every size is read from the arrays. Float64
throughout, except dsa/*, whose inputs are float32. The relative error is max |ours - golden| / max |golden|.
maxnorm/* is not part of LAD and is left out; sampler/* is a check of structure: 0 where it holds, 1 where it does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist.data import augment, longtail, whitening
from lad_dist.distill.initial import label_logits
from lad_dist.distill.student import Batch, Phase, PhaseResult, Student, SyntheticSet
from lad_dist.distill.update import Optimizers
from lad_dist.experts.gsam import gsam_gradient, sgd_step
from lad_dist.experts.sampling import class_aware_order
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models.convnet import ConvNet
from lad_dist.recipe import AugmentConfig, DistillConfig
from lad_dist.seeds import rng

Golden = dict[str, np.ndarray]
Rows = Iterator[tuple[str, float]]


def relative_error(ours: Any, golden: np.ndarray) -> float:
    """max |ours - golden| / max |golden| (or the absolute error where the golden is all zero); infinite for NaN."""
    mine = np.asarray(ours.detach() if isinstance(ours, Tensor) else ours, dtype=np.float64)
    theirs = np.asarray(golden, dtype=np.float64)
    if mine.shape != theirs.shape:
        return float("inf")
    error = float(np.abs(mine - theirs).max(initial=0.0)) / (float(np.abs(theirs).max(initial=0.0)) or 1.0)
    return error if np.isfinite(error) else float("inf")


def network(golden: Golden) -> ConvNet:
    """The golden's network, its sizes derived from parameter shapes and the images."""
    shapes = dict(json.loads(str(golden["param_names_shapes_json"])))
    classes, _ = shapes["classifier.weight"]
    convolutions = [s for s in shapes.values() if len(s) == 4]
    width, channels = convolutions[0][:2]
    net = ConvNet(channels, golden["images"].shape[-1], classes, width, len(convolutions)).double()
    assert [[n, list(p.shape)] for n, p in net.named_parameters()] == json.loads(str(golden["param_names_shapes_json"]))
    return net


def tensor(golden: Golden, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(golden[name]))


def synthetic_set(golden: Golden) -> SyntheticSet:
    return SyntheticSet(tensor(golden, "images"), tensor(golden, "label_logits"), tensor(golden, "syn_lr"))


def batches_of(golden: Golden, perms: np.ndarray) -> list[Batch]:
    """A student's batches: each permutation is cut into chunks of batch_syn, used from the last to the first."""
    size, steps = int(golden["batch_syn"]), int(golden["syn_steps"])
    chunks = [c for perm in perms for c in reversed(np.split(perm, range(size, len(perm), size)))][:steps]
    return [Batch(torch.from_numpy(c.astype(np.int64))) for c in chunks]


def phase_of(golden: Golden, student: Student, which: str, batches: list[Batch]) -> Phase:
    second = which == "second"
    return Phase(
        start_P=tensor(golden, "start_params"),
        target_P=tensor(golden, f"{which}/target_params"),
        batches=batches,
        span=student.layout.span("all" if second else "backbone"),
        class_weights_K=None if second else tensor(golden, "class_weights"),
        classifier_only=second,
    )


def phases(golden: Golden, student: Student) -> Rows:
    """first/* and second/*, by both gradient paths; the larger of the two errors is printed."""
    with torch.no_grad():
        views = student.layout.views(tensor(golden, "start_params"))
        yield (
            "forward/logits",
            relative_error(
                torch.func.functional_call(student.module, views, (tensor(golden, "images"),)), golden["forward/logits"]
            ),
        )
    span = student.layout.span("classifier")
    yield "num_params", relative_error(student.layout.size, golden["num_params"])
    yield "classifier_start", relative_error(span.start, golden["classifier_start"])
    counts = golden["class_counts"].astype(np.float64)
    yield "class_weights", relative_error(counts / counts.sum(), golden["class_weights"])
    for which in ("first", "second"):
        batches = batches_of(golden, golden[f"{which}/perms"])
        if len(golden["images"]) % int(golden["batch_syn"]) == 0:  # else index_chunks is no plain table of rows
            batches = [Batch(torch.from_numpy(rows)) for rows in golden[f"{which}/index_chunks"]]
        worst: dict[str, float] = {}
        for path in ("keep", "recompute", "captured"):
            phase = phase_of(golden, student, which, batches)
            result = student.run(synthetic_set(golden), phase, path)  # type: ignore[arg-type]
            for name, value in _quantities(result, phase).items():
                worst[name] = max(worst.get(name, 0.0), relative_error(value, golden[f"{which}/{name}"]))
        one = student.run(synthetic_set(golden), phase_of(golden, student, which, batches[:1]), "keep")
        worst["student_params_step1"] = relative_error(one.final_P, golden[f"{which}/student_params_step1"])
        yield from ((f"{which}/{name}", error) for name, error in worst.items())


def _quantities(result: PhaseResult, phase: Phase) -> dict[str, Any]:
    return {
        "image_grad": result.by_rows.images_SCHH,
        "label_grad": result.by_rows.labels_SK,
        "grand_loss": result.match.loss,
        "lr_grad": result.match.alpha_gradient,
        "gradient_sum": result.gradient_sum_P,
        "final_student_params": result.final_P,
        "inner_losses": torch.stack(result.inner_losses),
        "param_dist": (phase.target_P - phase.start_P)[phase.span].square().sum(),
    }


def end_to_end(golden: Golden, student: Student) -> Rows:
    """e2e/*: whole iterations of both phases with the optimizer steps between them."""
    images, logits, alpha = (tensor(golden, n).clone() for n in ("images", "label_logits", "syn_lr"))
    lr_images, lr_alpha, lr_labels = golden["e2e/lr_img_lr_lr_y"].tolist()
    momentum_images, momentum_alpha, momentum_labels = golden["e2e/momentum_img_lr_y"].tolist()
    config = DistillConfig(
        lr_images=lr_images,
        lr_labels=lr_labels,
        lr_alpha=lr_alpha,
        momentum_images=momentum_images,
        momentum_labels=momentum_labels,
        momentum_alpha=momentum_alpha,
    )
    optimizers = Optimizers(images, logits, alpha, config)
    lambdas = golden["e2e/lambda_first_second"].tolist()
    losses = []
    for perms in golden["e2e/perms"]:
        results = []
        for which, half in zip(("first", "second"), np.split(perms, 2), strict=True):
            phase = phase_of(golden, student, which, batches_of(golden, half))
            results.append(student.run(optimizers.synthetic_set(), phase, "keep"))
        losses.append([lam * float(r.match.loss) for lam, r in zip(lambdas, results, strict=True)])
        weighted = list(zip(lambdas, results, strict=True))
        optimizers.step_alpha(weighted)
        optimizers.step_set(weighted, 0)
    for start, value in (("e2e/images_after", images), ("e2e/label_logits_after", logits), ("e2e/syn_lr_after", alpha)):
        yield from ((n, relative_error(value, golden[n])) for n in golden if n.startswith(start))
    yield "e2e/lambda_times_grand_loss", relative_error(losses, golden["e2e/lambda_times_grand_loss"])


def gsam(golden: Golden, student: Student) -> Rows:
    """gsam_full/* and gsam_frozen/*: the frozen one through the features, as the classifier stage trains."""
    for which in ("gsam_full", "gsam_frozen"):
        frozen = which == "gsam_frozen"
        names, values = json.loads(str(golden[f"{which}/hparams_names"])), golden[f"{which}/hparams"].tolist()
        h = dict(zip(names, values, strict=True))
        weights = tensor(golden, f"{which}/params_before").clone()
        trained = student.layout.span("classifier" if frozen else "all")
        losses: list[float] = []
        for index in range(len(golden[f"{which}/images"])):
            images, labels = tensor(golden, f"{which}/images")[index], tensor(golden, f"{which}/labels")[index]
            if frozen:
                loss_of = classifier_loss(student.module, student.layout, weights, images, labels)
            else:
                loss_of = network_loss(student.module, student.layout, images, labels)
            step = gsam_gradient(loss_of, weights[trained], h["rho"], h["alpha"])
            losses.append(float(step.loss))
            if index == 0:
                parts = {"grad_clean": step.clean_P, "e_w": step.perturbation_P, "grad_final": step.gradient_P}
                for name, value in parts.items():
                    whole = torch.zeros_like(weights)
                    whole[trained] = value
                    yield f"{which}/step1_{name}", relative_error(whole, golden[f"{which}/step1_{name}"])
                yield f"{which}/logits_step1", relative_error(step.logits_BK, golden[f"{which}/logits_step1"])
            weights[trained], _ = sgd_step(weights[trained], step.gradient_P, None, h["lr"], h["weight_decay"], 0.0)
            if index == 0:
                yield f"{which}/params_after1", relative_error(weights, golden[f"{which}/params_after1"])
        yield f"{which}/params_after_all", relative_error(weights, golden[f"{which}/params_after_all"])
        yield f"{which}/losses", relative_error(losses, golden[f"{which}/losses"])


def data(golden: Golden) -> Rows:
    """longtail/*, sampler/*, labelinit/* and zca/*."""
    for name in (n for n in golden if n.startswith("longtail/")):
        if "within_class_order" in name:
            yield name, relative_error(longtail.within_class_order(int(name.rsplit("_", 1)[1])), golden[name])
        else:
            classes, rate = len(golden[name]), float(name.rsplit("_", 1)[1])
            ours = longtail.exponential_counts(int(golden[name][0]), classes, 1 / rate)
            yield name, relative_error(ours, golden[name])
    if "sampler/labels" in golden:
        yield "sampler/structure", float(not same_structure(golden))
    out, _ = label_logits(tensor(golden, "labelinit/expert_logits"), tensor(golden, "labelinit/true_labels"))
    yield "labelinit/out", relative_error(out, golden["labelinit/out"])
    train, test = tensor(golden, "zca/train"), tensor(golden, "zca/test")
    mean, matrix, inverse = whitening.fit_zca(train.flatten(1), float(golden["zca/eps"]))
    yield "zca/mean", relative_error(mean.view(1, -1), golden["zca/mean"])
    yield "zca/matrix", relative_error(matrix, golden["zca/matrix"])
    yield "zca/inverse", relative_error(inverse, golden["zca/inverse"])
    for name, images in (("train_out", train), ("test_out", test)):
        whitened = ((images.flatten(1) - mean) @ matrix).view(images.shape)
        yield f"zca/{name}", relative_error(whitened, golden[f"zca/{name}"])


def same_structure(golden: Golden, draws: int = 4) -> bool:
    """Whether golden and our epochs share length, turns of ``draws`` for one class, and balanced cycles of classes."""
    labels = golden["sampler/labels"]
    theirs = [labels[golden[f"sampler/epoch{i}"]] for i in (1, 2)]
    ours = [labels[class_aware_order(rng(0, "parity", i), labels, draws)] for i in (1, 2)]
    if not all(len(e) == int(golden["sampler/len"]) for e in (*ours, *theirs)):
        return False
    classes = len(np.unique(labels))

    def anew(epochs: list[np.ndarray]) -> bool:
        return all(_in_cycles([e], draws, classes) for e in epochs)

    return anew(ours) and (anew(theirs) or _in_cycles(theirs, draws, classes))  # official cycles run on across epochs


def _in_cycles(epochs: list[np.ndarray], draws: int, classes: int) -> bool:
    """Whether every turn is of one class, and no class has its next turn before all others had theirs."""
    turns = [set(e[i : i + draws].tolist()) for e in epochs for i in range(0, len(e), draws)]
    cycles = [turns[i : i + classes] for i in range(0, len(turns), classes)]
    return all(len(turn) == 1 for turn in turns) and all(len(set().union(*cycle)) == len(cycle) for cycle in cycles)


def dsa(golden: Golden) -> Rows:
    """Each operation on parameters drawn as the golden's were: torch seeded with dsa/seed, one draw to choose among the
    one operation given, then the parameters."""
    config = AugmentConfig()
    for name in (n for n in golden if n.startswith("dsa/") and not n.startswith(("dsa/x_", "dsa/seed"))):
        operation, channels = name.removeprefix("dsa/").rsplit("_", 1)
        x = tensor(golden, f"dsa/x_{channels}")
        torch.manual_seed(int(golden["dsa/seed"]))
        torch.randint(0, 1, (1,))
        values = _official_draws(operation, x, config)
        yield name, relative_error(augment.apply(x, augment.Draw(operation, values.double().numpy())), golden[name])


def _official_draws(operation: str, x: Tensor, c: AugmentConfig) -> Tensor:
    count, size = len(x), x.shape[2]
    if operation == "color":
        brightness = (torch.rand(count) - 0.5) * c.brightness
        saturation = torch.rand(count) * c.saturation
        return torch.stack([brightness, saturation, torch.rand(count) + c.contrast], dim=1)
    if operation == "crop":
        shift = int(size * c.crop + 0.5)
        return torch.stack([torch.randint(-shift, shift + 1, (count,)) for _ in range(2)], dim=1)
    if operation == "cutout":
        side = int(size * c.cutout + 0.5)
        corner = [torch.randint(0, size + 1 - side % 2, (count,)) - side // 2 for _ in range(2)]
        return torch.stack([*corner, torch.full((count,), side)], dim=1)
    if operation == "flip":
        return (torch.rand(count, 1) < c.flip).float()
    if operation == "scale":
        return torch.stack([torch.rand(count) * (c.scale - 1 / c.scale) + 1 / c.scale for _ in range(2)], dim=1)
    return ((torch.rand(count, 1) - 0.5) * 2 * c.rotate / 180) * float(np.pi)


def parity(path: Path) -> dict[str, float]:
    """Relative errors of every quantity in the golden file at ``path``."""
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files if not name.startswith("maxnorm/")}
    student = Student(network(golden))
    rows = [*phases(golden, student), *end_to_end(golden, student), *gsam(golden, student), *data(golden), *dsa(golden)]
    return dict(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/parity.py FILE.npz")
    print(json.dumps(parity(Path(sys.argv[1])), indent=1))
