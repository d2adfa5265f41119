"""The method as a textbook would write it: plain torch modules, double loops, nothing from lad_dist.

What the package computes is compared with this. Shapes: S synthetic images, B of one batch, C channels, H side,
K classes, P parameters of the whole network in one vector.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


class TextbookNet(nn.Module):
    """Convolution, GroupNorm with one group per channel, ReLU, average pooling, ``depth`` times; a linear layer."""

    def __init__(self, channels: int, side: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 else 1
            layers += [
                nn.Conv2d(width if block else channels, width, 3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        with torch.no_grad():
            values = self.features(torch.zeros(1, channels, side, side)).numel()
        self.classifier = nn.Linear(values, classes)

    def forward(self, images_BCHH: Tensor) -> Tensor:
        return self.classifier(self.features(images_BCHH).flatten(1))

    def flat(self) -> Tensor:
        """All weights as one vector (P,)."""
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def logits(self, theta_P: Tensor, images_BCHH: Tensor) -> Tensor:
        """The output with the weights ``theta_P``."""
        named, at = {}, 0
        for name, p in self.named_parameters():
            named[name], at = theta_P[at : at + p.numel()].view(p.shape), at + p.numel()
        return torch.func.functional_call(self, named, (images_BCHH,))

    @property
    def classifier_start(self) -> int:
        """Where the classifier's weights begin in the flat vector: they are the last two parameters."""
        return sum(p.numel() for p in self.parameters()) - self.classifier.weight.numel() - self.classifier.bias.numel()


def soft_loss(logits_BK: Tensor, label_logits_BK: Tensor, class_weights_K: Tensor | None) -> Tensor:
    """-(1/B) sum_b sum_c w_c p_bc log q_bc, term by term."""
    p, q = label_logits_BK.softmax(1), logits_BK.softmax(1)
    weights = torch.ones_like(p[0]) if class_weights_K is None else class_weights_K
    return sum(-(weights * p[b] * q[b].log()).sum() for b in range(len(p))) / len(p)  # type: ignore[return-value]


def double_loop(
    net: TextbookNet,
    images: Tensor,
    label_logits: Tensor,
    alpha: Tensor,
    start: Tensor,
    target: Tensor,
    batches: Sequence[Tensor],
    *,
    weights: Tensor | None,
    classifier_only: bool,
    compared: slice,
    views: Sequence[View] | None = None,
) -> dict[str, Any]:
    """One phase: a first pass over the steps for G, and a second for the gradient of v . g_i, each with its graph.

    ``compared`` is the span of the matching loss; ``views`` augments each step's batch.
    """
    backbone = net.classifier_start if classifier_only else 0

    def walk(direction: Tensor | None) -> None:
        theta = start.clone()
        for i, rows in enumerate(batches):
            pixels, labels = images[rows].clone().requires_grad_(), label_logits[rows].clone().requires_grad_()
            leaf = theta[backbone:].clone().requires_grad_()
            shown = pixels if views is None else views[i](pixels)
            loss = soft_loss(net.logits(torch.cat([theta[:backbone], leaf]), shown), labels, weights)
            (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
            whole = torch.cat([torch.zeros_like(theta[:backbone]), g])
            if direction is None:
                out["gradient_sum"] += whole.detach()
                out["inner_losses"].append(loss.detach())
            else:
                by_pixels, by_labels = torch.autograd.grad((whole * direction).sum(), [pixels, labels])
                for b, row in enumerate(rows.tolist()):
                    out["image_grad"][row] += by_pixels[b]
                    out["label_grad"][row] += by_labels[b]
            theta = theta - alpha * whole.detach()
            out["thetas"].append(theta)

    out: dict[str, Any] = {
        "gradient_sum": torch.zeros_like(start),
        "inner_losses": [],
        "thetas": [],
        "image_grad": torch.zeros_like(images),
        "label_grad": torch.zeros_like(label_logits),
    }
    walk(None)
    moved = (target - start)[compared]
    summed, distance = out["gradient_sum"][compared], (moved**2).sum()
    direction = torch.zeros_like(start)
    direction[compared] = 2 * (alpha * moved + alpha**2 * summed) / distance
    walk(direction)
    out["grand_loss"] = ((start[compared] - alpha * summed - target[compared]) ** 2).sum() / distance
    out["lr_grad"] = -2 * ((start[compared] - alpha * summed - target[compared]) * summed).sum() / distance
    out["param_dist"] = distance
    out["student_params_step1"], out["final_student_params"] = out["thetas"][0], out["thetas"][len(batches) - 1]
    out["inner_losses"] = torch.stack(out["inner_losses"])
    return out


class Momentum:
    """x <- x - lr v with v <- m v + gradient; v starts as the first gradient."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum, self.v = lr, momentum, None

    def step(self, x: Tensor, gradient: Tensor) -> Tensor:
        self.v = gradient if self.v is None else self.momentum * self.v + gradient
        return x - self.lr * self.v


def in_order_of_use(perms: np.ndarray, batch: int, steps: int) -> list[Tensor]:
    """Each permutation cut into chunks of ``batch``, used from the last chunk to the first."""
    chunks: list[np.ndarray] = []
    for perm in perms:
        cut = [perm[i : i + batch] for i in range(0, len(perm), batch)]
        while cut:
            chunks.append(cut.pop())
    return [torch.from_numpy(c.copy()) for c in chunks[:steps]]


def gsam_steps(
    net: TextbookNet,
    images: Tensor,
    labels: Tensor,
    before: Tensor,
    *,
    lr: float,
    rho: float,
    alpha: float,
    weight_decay: float,
    frozen: bool,
) -> dict[str, Any]:
    """GSAM with two backward passes through the module itself, over the trained parameters one by one."""
    nn.utils.vector_to_parameters(before.clone(), net.parameters())
    trained = [p for n, p in net.named_parameters() if not frozen or n.startswith("classifier")]
    out: dict[str, Any] = {"params_before": before, "losses": []}

    def gradients(index: int) -> tuple[list[Tensor], Tensor, Tensor]:
        logits = net(images[index])
        loss = F.cross_entropy(logits, labels[index])
        return list(torch.autograd.grad(loss, trained)), loss.detach(), logits.detach()

    def whole(parts: Sequence[Tensor]) -> Tensor:
        by_parameter = {id(p): g for p, g in zip(trained, parts, strict=True)}
        return torch.cat([by_parameter.get(id(p), torch.zeros_like(p)).reshape(-1) for p in net.parameters()])

    for index in range(len(images)):
        g0, loss, logits = gradients(index)
        norm = math.sqrt(sum(float(((p.detach().abs() * g) ** 2).sum()) for p, g in zip(trained, g0, strict=True)))
        e = [rho * p.detach() ** 2 * g / (norm + 1e-12) for p, g in zip(trained, g0, strict=True)]
        with torch.no_grad():
            for p, shift in zip(trained, e, strict=True):
                p += shift
        g1, _, _ = gradients(index)
        inner = sum(float((a * b).sum()) for a, b in zip(g0, g1, strict=True))
        square1 = sum(float((b * b).sum()) for b in g1)
        final = [b - alpha * (a - inner / square1 * b) for a, b in zip(g0, g1, strict=True)]
        with torch.no_grad():
            for p, shift, g in zip(trained, e, final, strict=True):
                p -= shift
                p -= lr * (g + weight_decay * p)
        out["losses"].append(loss)
        after = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        if index == 0:
            out |= {
                "step1_grad_clean": whole(g0),
                "step1_e_w": whole(e),
                "step1_grad_final": whole(final),
                "logits_step1": logits,
                "params_after1": after,
            }
        out["params_after_all"] = after
    out["losses"] = torch.stack(out["losses"])
    return out


def class_aware_epoch(draws: random.Random, labels: np.ndarray, per_turn: int) -> list[int]:
    """Classes in shuffled cycles, ``per_turn`` consecutive draws of each from shuffled cycles over its members."""
    members = {c: [i for i, label in enumerate(labels) if label == c] for c in sorted(set(labels.tolist()))}
    length = max(len(m) for m in members.values()) * len(members)
    classes: list[int] = []
    waiting: dict[int, list[int]] = {c: [] for c in members}
    epoch: list[int] = []
    while len(epoch) < length:
        if not classes:
            classes = draws.sample(sorted(members), len(members))
        c = classes.pop()
        for _ in range(per_turn):
            if not waiting[c]:
                waiting[c] = draws.sample(members[c], len(members[c]))
            epoch.append(waiting[c].pop())
    return epoch[:length]


def augmented(operation: str, x: Tensor, seed: int) -> Tensor:
    """DSA's operations with the published strengths, image by image, drawn after one draw for the choice."""
    torch.manual_seed(seed)
    torch.randint(0, 1, (1,))
    count, side, out = len(x), x.shape[2], []
    if operation == "color":
        brightness, saturation, contrast = torch.rand(count) - 0.5, 2 * torch.rand(count), torch.rand(count) + 0.5
        for i, image in enumerate(x + brightness.view(-1, 1, 1, 1)):
            grey = image.mean(0)
            coloured = (image - grey) * saturation[i] + grey if len(image) > 1 else image
            out.append((coloured - coloured.mean()) * contrast[i] + coloured.mean())
    elif operation == "crop":
        most = int(side * 0.125 + 0.5)
        down, right = (torch.randint(-most, most + 1, (count,)).tolist() for _ in range(2))
        for i, image in enumerate(x):
            framed = F.pad(image, [side] * 4)
            out.append(framed[:, side + down[i] : 2 * side + down[i], side + right[i] : 2 * side + right[i]])
    elif operation == "cutout":
        hole = int(side * 0.5 + 0.5)
        rows, columns = (torch.randint(0, side + 1 - hole % 2, (count,)).tolist() for _ in range(2))
        for i, image in enumerate(x):
            image = image.clone()
            for row in range(rows[i] - hole // 2, rows[i] - hole // 2 + hole):
                for column in range(columns[i] - hole // 2, columns[i] - hole // 2 + hole):
                    image[:, min(max(row, 0), side - 1), min(max(column, 0), side - 1)] = 0
            out.append(image)
    elif operation == "flip":
        mirrored = torch.rand(count, 1) < 0.5
        out = [
            torch.stack([plane[:, torch.arange(side - 1, -1, -1)] for plane in image]) if mirrored[i] else image
            for i, image in enumerate(x)
        ]
    else:
        if operation == "scale":
            sx, sy = (torch.rand(count) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))
            matrices = [[[sx[i], 0, 0], [0, sy[i], 0]] for i in range(count)]
        else:
            angles = ((torch.rand(count, 1) - 0.5) * 2 * 15 / 180 * math.pi)[:, 0]
            matrices = [[[a.cos(), (-a).sin(), 0], [a.sin(), a.cos(), 0]] for a in angles]
        for image, matrix in zip(x, matrices, strict=True):
            grid = F.affine_grid(torch.tensor([matrix]), [1, *image.shape], align_corners=True)
            out.append(F.grid_sample(image[None], grid, align_corners=True)[0])
    return torch.stack(out)


def make_golden(
    path: Path,
    *,
    channels: int,
    side: int,
    width: int,
    depth: int,
    classes: int,
    count: int,
    batch: int,
    steps: int,
    iterations: int,
    seed: int = 0,
) -> None:
    """A golden file of other sizes, every output by the functions above."""
    torch.manual_seed(seed)
    draws = np.random.default_rng(seed)
    net = TextbookNet(channels, side, width, depth, classes).double()
    with torch.no_grad():  # an instance norm that does nothing hides mistakes in its scale and shift
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    start = net.flat()
    images = torch.randn(count, channels, side, side, dtype=torch.float64)
    label_logits, alpha = torch.randn(count, classes, dtype=torch.float64), torch.tensor(0.03, dtype=torch.float64)
    counts = np.sort(draws.integers(3, 200, classes))[::-1].copy()
    weights = torch.from_numpy(counts / counts.sum())
    perms_needed = -(-steps // -(-count // batch))
    out: dict[str, Any] = {
        "param_names_shapes_json": json.dumps([[n, list(p.shape)] for n, p in net.named_parameters()]),
        "num_params": len(start),
        "classifier_start": net.classifier_start,
        "start_params": start,
        "images": images,
        "label_logits": label_logits,
        "class_counts": counts,
        "class_weights": weights,
        "syn_steps": steps,
        "batch_syn": batch,
        "syn_lr": alpha,
        "forward/logits": net.logits(start, images),
    }

    def phase(which: str, x: Tensor, y: Tensor, a: Tensor, perms: np.ndarray) -> dict[str, Any]:
        second = which == "second"
        return double_loop(
            net,
            x,
            y,
            a,
            start,
            out[f"{which}/target_params"],
            in_order_of_use(perms, batch, steps),
            weights=None if second else weights,
            classifier_only=second,
            compared=slice(None) if second else slice(0, net.classifier_start),
        )

    def permutations() -> np.ndarray:
        return np.stack([draws.permutation(count) for _ in range(perms_needed)])

    for which in ("first", "second"):
        target = start + 0.02 * torch.randn_like(start)
        if which == "second":
            target[: net.classifier_start] = start[: net.classifier_start]
        out[f"{which}/target_params"], perms = target, permutations()
        chunks = in_order_of_use(perms, batch, steps)
        padded = -np.ones((steps, max(len(c) for c in chunks)), dtype=np.int64)
        for i, chunk in enumerate(chunks):
            padded[i, : len(chunk)] = chunk
        out |= {f"{which}/perms": perms, f"{which}/index_chunks": padded}
        result = phase(which, images, label_logits, alpha, perms)
        out |= {f"{which}/{k}": v for k, v in result.items() if k != "thetas"}
    _end_to_end(out, phase, permutations, iterations)
    for which in ("gsam_full", "gsam_frozen"):
        frozen = which == "gsam_frozen"
        h = {"weight_decay": 0.0 if frozen else 0.005, "lr": 0.02, "alpha": 0.4, "rho": 0.05}
        x = torch.randn(2, 5, channels, side, side, dtype=torch.float64)
        y = torch.randint(0, classes, (2, 5))
        result = gsam_steps(net, x, y, start, frozen=frozen, **h)
        out |= {
            f"{which}/images": x,
            f"{which}/labels": y,
            f"{which}/hparams": np.array(list(h.values())),
            f"{which}/hparams_names": json.dumps(list(h)),
            **{f"{which}/{k}": v for k, v in result.items()},
        }
    _data(out, draws, classes, side, seed)
    np.savez(
        path,
        **{
            k: v.numpy() if isinstance(v, Tensor) else np.asarray(v)
            for k, v in ((k, v.detach() if isinstance(v, Tensor) else v) for k, v in out.items())
        },
    )


def _end_to_end(
    out: dict[str, Any], phase: Callable[..., dict[str, Any]], permutations: Callable[[], np.ndarray], iterations: int
) -> None:
    lambdas, rates, momenta = (0.3, 0.9), (20.0, 1e-4, 1.5), (0.5, 0.4, 0.8)
    x, alpha, y = out["images"], out["syn_lr"], out["label_logits"]
    by_images, by_alpha, by_labels = (Momentum(r, m) for r, m in zip(rates, momenta, strict=True))
    perms, losses = [], []
    for _ in range(iterations):
        mine = permutations(), permutations()
        results = [phase(which, x, y, alpha, p) for which, p in zip(("first", "second"), mine, strict=True)]
        total = {
            k: sum(lam * r[k] for lam, r in zip(lambdas, results, strict=True))
            for k in ("image_grad", "label_grad", "lr_grad")
        }
        x, y = by_images.step(x, total["image_grad"]), by_labels.step(y, total["label_grad"])
        alpha = by_alpha.step(alpha, total["lr_grad"])
        perms.append(np.concatenate(mine))
        losses.append([lam * float(r["grand_loss"]) for lam, r in zip(lambdas, results, strict=True)])
    out |= {
        "e2e/perms": np.stack(perms),
        "e2e/lambda_first_second": np.array(lambdas),
        "e2e/lr_img_lr_lr_y": np.array(rates),
        "e2e/momentum_img_lr_y": np.array(momenta),
        "e2e/lambda_times_grand_loss": np.array(losses),
        f"e2e/images_after{iterations}": x,
        f"e2e/label_logits_after{iterations}": y,
        f"e2e/syn_lr_after{iterations}": alpha,
    }


def _data(out: dict[str, Any], draws: np.random.Generator, classes: int, side: int, seed: int) -> None:
    for rate in (0.04, 0.3):
        out[f"longtail/other_{rate}"] = np.array([int(333 * rate ** (c / (classes - 1))) for c in range(classes)])
    out["longtail/within_class_order_37"] = np.random.RandomState(42).permutation(37)
    labels, shuffler = np.repeat(np.arange(4), [9, 5, 2, 1]), random.Random(seed)
    out |= {
        "sampler/labels": labels,
        "sampler/len": 36,
        "sampler/epoch1": class_aware_epoch(shuffler, labels, 4),
        "sampler/epoch2": class_aware_epoch(shuffler, labels, 4),
    }
    expert_logits, true = draws.normal(size=(3, 11, classes)), draws.integers(0, classes, 11)
    label = np.zeros((11, classes))
    for s in range(11):
        right = [e for e in range(3) if expert_logits[e, s].argmax() == true[s]]
        label[s] = np.mean([expert_logits[e, s] for e in right], axis=0) if right else 0
    out |= {"labelinit/expert_logits": expert_logits, "labelinit/true_labels": true, "labelinit/out": label}
    for c in (1, 3):
        x = torch.from_numpy(draws.normal(size=(6, c, side, side)).astype(np.float32))
        out[f"dsa/x_c{c}"] = x
        for operation in ("color", "crop", "cutout", "flip", "scale", "rotate"):
            out[f"dsa/{operation}_c{c}"] = augmented(operation, x, 7 + seed)
    out["dsa/seed"] = 7 + seed
    train, test, eps = draws.random((40, 2, 3, 3)), draws.random((5, 2, 3, 3)), 0.07
    rows = train.reshape(40, -1)
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    matrix = vectors @ np.diag((values + eps) ** -0.5) @ vectors.T
    out |= {
        "zca/train": train,
        "zca/test": test,
        "zca/eps": eps,
        "zca/mean": mean[None],
        "zca/matrix": matrix,
        "zca/inverse": vectors @ np.diag((values + eps) ** 0.5) @ vectors.T,
        "zca/train_out": ((rows - mean) @ matrix).reshape(train.shape),
        "zca/test_out": ((test.reshape(5, -1) - mean) @ matrix).reshape(test.shape),
    }
