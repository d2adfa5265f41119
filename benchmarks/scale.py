"""What ImageNet-LT's size costs: made-up images in its shape, and every stage measured on them.

    python benchmarks/scale.py --work FOLDER --make imagenet-lt       # the images alone
    python benchmarks/scale.py --work FOLDER --write                  # images, measurements, table

Makes list-file data sets in the shape of ImageNet-LT, Places-LT and iNaturalist 2018 (classes, images, largest and
smallest class) in FOLDER, which should be on a local disk with 3 GB free. The images are small JPEGs of mixed sizes;
each class has colours of its own, so that training finds something. ``--scale 0.1`` takes a tenth of each class.
``--busy`` decodes a tenth of the images only; the whole data set then gets made-up pixels in place of decoded ones.

Each measurement runs in a process of its own with one thread; seconds are processor seconds unless the table says
otherwise, since other work on the machine weighs less on them. ``--write`` puts the table into
benchmarks/results/scale.md; ``--only NAME`` runs some of the measurements and prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.md"
SIDES = (72, 160)  # of the made-up images, pixels
QUALITY = 30
IMAGENET_SIDES = (500, 375)  # the usual size of an ImageNet photograph


@dataclass(frozen=True)
class Shape:
    """Classes, images, and sizes of the largest and smallest class of a data set; test images per class."""

    title: str
    classes: int
    images: int
    largest: int
    smallest: int
    test: int


SHAPES = {
    "imagenet-lt": Shape("ImageNet-LT", 1000, 115_846, 1280, 5, 50),
    "places-lt": Shape("Places-LT", 365, 62_500, 4980, 5, 100),
    "inaturalist": Shape("iNaturalist 2018", 8142, 437_513, 1000, 2, 3),
}


def class_sizes(shape: Shape, scale: float = 1.0) -> list[int]:
    """Return the images of each class, largest first: n_c = largest * (smallest / largest)^((c / (K - 1))^p).

    p is such that they add up to ``shape.images``; ``scale`` shrinks every class, to no less than two images.
    """
    places = np.arange(shape.classes) / (shape.classes - 1)

    def sizes(p: float) -> np.ndarray:
        return np.rint(shape.largest * (shape.smallest / shape.largest) ** (places**p)).astype(np.int64)

    low, high = 0.05, 20.0  # a larger p makes larger classes
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(middle).sum() < shape.images else (low, middle)
    found = sizes(high)
    step = int(np.sign(shape.images - found.sum()))
    for i in range(abs(int(shape.images - found.sum()))):  # what rounding leaves, spread over the middle
        found[1 + i % (shape.classes // 2)] += step
    return [max(2, round(int(n) * scale)) for n in found]


def make(work: Path, name: str, scale: float = 1.0) -> Path:
    """Make the data set ``name`` below ``work``, unless it is there; return its folder."""
    from PIL import Image

    shape, root = SHAPES[name], work / f"{name}-{scale:g}"
    if (root / "train.txt").exists():
        return root
    counts = {"train": class_sizes(shape, scale), "test": [max(1, round(shape.test * scale))] * shape.classes}
    for split, of in counts.items():
        lines = []
        for c, count in enumerate(of):
            (root / split / f"{c:04d}").mkdir(parents=True, exist_ok=True)
            base = np.random.default_rng((c, 0)).uniform(40, 216, (4, 4, 3))
            drawn = np.random.default_rng((c, 1 + (split == "test")))
            for i in range(count):
                width, height = (int(side) for side in drawn.integers(*SIDES, 2))
                pixels = np.clip(base + drawn.normal(0, 30, base.shape), 0, 255).astype(np.uint8)
                file = f"{split}/{c:04d}/{i:05d}.jpg"
                picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                picture.save(root / file, "JPEG", quality=QUALITY)
                lines.append(f"{file} {c}")
        (root / f"{split}.part").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split in ("test", "train"):
        os.replace(root / f"{split}.part", root / f"{split}.txt")
    return root


# --- measurements: each in a process of its own, one thread -----------------------------------------------------------


@dataclass
class Cost:
    """What a block cost: seconds by the clock and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def costs() -> Iterator[Cost]:
    cost, wall, cpu = Cost(), time.perf_counter(), time.process_time()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, time.process_time() - cpu


def peak() -> int:
    """Return the process's peak memory in bytes, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous() -> int:
    """Return the bytes in use now that no file backs, which the system cannot take back."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(work: Path, name: str, scale: float, size: int = 64, made_up: bool = False) -> dict[str, Any]:
    """Load a data set as a run does; ``made_up``: without decoding, all else being done."""
    import torch

    from lad_dist.data import decoded
    from lad_dist.data.datasets import load_splits
    from lad_dist.recipe import DataConfig

    before, root = peak(), make(work, name, scale)
    config = DataConfig(
        dataset="list", root=str(root), train="train.txt", test="test.txt", imbalance="natural", image_size=size,
        fit="center-crop", whitening="standardize",
    )  # fmt: skip
    some = torch.randint(0, 256, (decoded._CHUNK_BYTES // (3 * size**2), 3, size, size), dtype=torch.uint8)
    if made_up:
        decoded.decode = lambda source, indices, *_: some[: len(indices)]
    with costs() as cost:
        splits = load_splits(config)
        splits.fingerprints("test")
    images = len(splits.train) + len(splits.test)
    kept = any("kept in" in note for note in splits.notes)
    return {"images": images, "wall": cost.wall, "cpu": cost.cpu, "peak": peak(), "before": before,
            "anonymous": anonymous(), "decoded": kept, "notes": list(splits.notes)}  # fmt: skip


def photographs(work: Path) -> dict[str, Any]:
    """Decode images of ImageNet's usual size, from which the time for the real ones follows."""
    import io

    from PIL import Image

    from lad_dist.data.decoding import PixelFormat, decode
    from lad_dist.data.sources import FileSource

    count, folder = 100, work / "photographs"
    folder.mkdir(exist_ok=True)
    drawn = np.random.default_rng(0)
    files = []
    for i in range(count):
        small = Image.fromarray(drawn.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize(IMAGENET_SIDES, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        files.append(folder / f"{i}.jpg")
        files[-1].write_bytes(buffer.getvalue())
    source = FileSource("photographs", np.zeros(count, dtype=np.int64), files)
    with costs() as cost:
        decode(source, np.arange(count), PixelFormat(3, 64, True, True, False))
    return {"images": count, "cpu": cost.cpu / count, "bytes": sum(f.stat().st_size for f in files) / count}


def bookkeeping(name: str, scale: float) -> dict[str, Any]:
    """Everything that labels alone decide, at the full number of classes and images."""
    from lad_dist.data.datasets import choose_training_images
    from lad_dist.data.longtail import head_medium_tail
    from lad_dist.data.sources import ArraySource, check_labels
    from lad_dist.distill.initial import choose_images
    from lad_dist.evaluate.train import class_balanced
    from lad_dist.experts.sampling import class_aware_order
    from lad_dist.recipe import DataConfig

    counts = class_sizes(SHAPES[name], scale)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    names = tuple(map(str, range(len(counts))))
    seconds: dict[str, float] = {}
    with costs() as cost:
        check_labels(ArraySource("labels", labels, np.zeros((len(labels), 1, 1, 1), np.uint8)))
        choose_training_images(labels, names, DataConfig(imbalance="natural", validation_per_class=5))
        head_medium_tail(counts)
    seconds["selection"] = cost.cpu
    with costs() as cost:
        drawn = class_aware_order(np.random.default_rng(0), labels, 4)
    seconds["class-aware order"] = cost.cpu
    with costs() as cost:
        class_balanced(np.random.default_rng(0), labels)
        choose_images(None, labels, 10, len(counts), 0)
    seconds["initial set and class-balanced draws"] = cost.cpu
    return {"classes": len(counts), "images": len(labels), "draws": len(drawn), "seconds": seconds}


def expert(classes: int, images: int, size: int, width: int) -> dict[str, Any]:
    """Train one expert for an epoch of each stage, on random images."""
    import torch

    from lad_dist.data.datasets import DataSplits, ImageSet
    from lad_dist.data.prepare import PreparedData
    from lad_dist.data.prepared import PreparedSet
    from lad_dist.data.whitening import Whitening
    from lad_dist.experts.train import ExpertTrainer

    labels = torch.arange(images) % classes
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    train = ImageSet(pixels, labels, tuple(map(str, range(classes))), "made-up/train")
    whitening = Whitening.fit(pixels, "standardize")
    data = PreparedData(DataSplits(train, None, train, train.counts), whitening,
                        PreparedSet(pixels, labels, whitening), torch.device("cpu"))  # fmt: skip
    recipe = recipe_of(size, width, 10, 2, 1)
    trainer = ExpertTrainer(recipe, data, Path(os.devnull).parent / "nowhere")
    weights = trainer._initial(0)
    trainer._epoch("representation", 0, 0, weights.clone())  # compiles kernels
    seconds = {}
    for stage in ("representation", "classifier"):
        with costs() as cost:
            *_, seen = trainer._epoch(stage, 0, 1, weights.clone())
        seconds[stage] = cost.cpu / seen
    return {"images": images, "per image": seconds, "flops": shapes(classes, size, width).forward_flops, "peak": peak()}


def recipe_of(size: int, width: int, ipc: int, steps: int, iterations: int, batch: int = 100) -> Any:
    from lad_dist import recipe_file

    return recipe_file.from_document({
        "name": "scale", "ipc": ipc,
        "data": {"dataset": "list", "train": "a", "test": "b", "image_size": size, "imbalance": "natural",
                 "whitening": "standardize"},
        "model": {"depth": depth_of(size), "width": width},
        "experts": {"count": 1, "epochs": 3, "classifier_epochs": 3},
        "distill": {"iterations": iterations, "batch": batch, "student_steps": steps, "student_steps_classifier": steps,
                    "window_epochs": 1, "start_epoch_min": 0, "start_epoch_max": 2, "classifier_start_epoch_max": 2,
                    "lr_images": 1.0, "lr_labels": 0.1, "lr_alpha": 1e-6, "gradient": "recompute"},
        "evaluate": {"seeds": 1, "epochs": 1, "lr": 0.01},
    })  # fmt: skip


def depth_of(size: int) -> int:
    return round(math.log2(size)) - 2


def shapes(classes: int, size: int, width: int) -> Any:
    from lad_dist.plan.shapes import Shapes

    return Shapes(3, size, classes, width, depth_of(size))


def distillation(work: Path, classes: int, ipc: int, size: int, width: int) -> dict[str, Any]:
    """Match random trajectories with a random synthetic set: seconds of an iteration, and memory."""
    import torch

    from lad_dist.distill.loop import Context, Distillation
    from lad_dist.distill.start import DataFacts
    from lad_dist.distill.state import State
    from lad_dist.models.layout import Layout
    from lad_dist.models.network import build
    from lad_dist.progress import Events, Screen
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories.reader import Buffer
    from lad_dist.trajectories.schema import BufferMeta
    from lad_dist.trajectories.writer import PartWriter

    torch.manual_seed(0)
    recipe, root = recipe_of(size, width, ipc, 2, 3), work / f"run-{os.getpid()}"
    run, counts = RunDir.open(root, recipe), tuple(class_sizes(SHAPES["imagenet-lt"]))[:classes]
    layout = Layout.of(build(recipe.model, 3, size, classes, seed=0, purpose=("template",)))
    meta = BufferMeta(
        experts_hash=recipe.experts_hash(), data_fingerprint="0" * 64, class_counts=counts,
        parameters=tuple(zip(layout.names, layout.shapes, strict=True)), classifier_parameters=layout.classifier,
        recipe=recipe.experts_document(), versions={},
    )  # fmt: skip
    sizes = {"representation": layout.span("all"), "classifier": layout.span("classifier")}
    total = sum(math.prod(shape) for shape in layout.shapes)
    walk = 0.02 * torch.randn(4, total)
    for stage, span in sizes.items():
        with PartWriter(run.trajectories, meta, stage, 0) as writer:
            for epoch in range(4):
                writer.append(epoch, walk[: epoch + 1].sum(0)[span].numpy())
    with contextlib.closing(Events(run.events)) as events:
        context = Context(recipe, run, torch.device("cpu"), events, Screen.silent())
        work_ = Distillation(
            context, DataFacts(3, size, counts, "0" * 64), Buffer(run.trajectories, recipe.experts_hash())
        )
        before = peak()
        images = torch.randn(classes * ipc, 3, size, size)
        logits = torch.randn(classes * ipc, classes)
        state = State(recipe, images.clone(), logits.clone(), images, {}, initial_logits_SK=logits)
        work_.iterate(state, "recompute")  # compiles kernels
        with costs() as cost:
            work_.iterate(state, "recompute")
        used, event = peak(), run.events.stat().st_size / 2
        with costs() as saving:
            state.save(run.distill_checkpoint, recipe)
        work_.close()
    shutil.rmtree(root)
    one = 4 * (images.numel() + logits.numel())
    return {"classes": classes, "ipc": ipc, "size": size, "width": width, "seconds": cost.cpu, "peak": used,
            "before": before, "set": one, "sets": (used - before) / one, "event": event,
            "checkpoint": saving.cpu}  # fmt: skip


def evaluation(classes: int, images: int, tested: int, size: int, width: int) -> dict[str, Any]:
    """Train a network for an epoch on a set of random images, and measure it on ``tested`` others."""
    import torch

    from lad_dist.data.prepared import PreparedSet
    from lad_dist.data.whitening import Whitening
    from lad_dist.evaluate.accuracy import accuracy
    from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train
    from lad_dist.models.convnet import build
    from lad_dist.recipe import AugmentConfig

    pixels = torch.randint(0, 256, (tested, 3, size, size), dtype=torch.uint8)
    test = PreparedSet(pixels, torch.arange(tested) % classes, Whitening.fit(pixels, "standardize"))
    x, p = torch.randn(images, 3, size, size), torch.randn(images, classes).softmax(1)
    net = build(3, size, classes, width, depth_of(size), seed=0, purpose=("scale",))
    settings = Settings(1, 128, 0.01, 0.9, 5e-4, 0.1, AugmentConfig())
    train(net, TrainingSet(rows_of(x[:128], p[:128]), 128), settings, 0, ("warm",), lambda: None)
    with costs() as training:
        train(net, TrainingSet(rows_of(x, p), images), settings, 0, ("scale",), lambda: None)
    counts = class_sizes(SHAPES["inaturalist" if classes > 1000 else "imagenet-lt"])[:classes]
    with costs() as measuring:
        found = accuracy(net, test, counts)
    row = len(json.dumps({"a": found.confusion, "b": found.confusion_pairs}))
    return {"training": training.cpu / images, "measuring": measuring.cpu / tested, "row": row, "peak": peak()}


def report(work: Path, classes: int, iterations: int) -> dict[str, Any]:
    """Write the report of a made-up run, and read its status."""
    import torch

    from lad_dist import results
    from lad_dist.data.longtail import head_medium_tail
    from lad_dist.data.whitening import Whitening
    from lad_dist.distilled import DistilledMeta, DistilledSet
    from lad_dist.progress import Events
    from lad_dist.report.page import INDEX, write_report
    from lad_dist.rundir import RunDir
    from lad_dist.status import read_status

    recipe, root = recipe_of(32, 8, 1, 2, iterations), work / f"report-{classes}"
    shutil.rmtree(root, ignore_errors=True)
    run = RunDir.open(root, recipe)
    counts = (class_sizes(SHAPES["inaturalist" if classes > 1000 else "imagenet-lt"]))[:classes]
    thirds = head_medium_tail(counts)["by_thirds"]
    with contextlib.closing(Events(run.events)) as events:
        events.emit("data", name="list/train", fingerprint="0" * 64, counts=counts, test=50 * classes, seconds=1.0)
        events.emit("distill-started", iteration=0, gradient="keep", why="it fits")
        for i in range(1, iterations + 1):
            norms = (
                {"pixel_gradient_norm": [0.01234] * classes}
                if classes <= 200
                else {"pixel_gradient_norms": dict.fromkeys(thirds, 0.01234)}
            )
            events.emit("iteration", iteration=i, alpha=0.01, seconds=0.5, loss_representation=1 - 0.5 * i / iterations,
                        loss_classifier=0.9, gradient="keep", **norms)  # fmt: skip
        events.emit("stage-finished", stage="distill", seconds=1.0)
    drawn = np.random.default_rng(0)
    pixels = torch.from_numpy(drawn.integers(0, 256, (classes, 3, 32, 32), dtype=np.uint8))
    whitening = Whitening.fit(pixels, "standardize")
    meta = DistilledMeta(
        method="lad", dataset="list/train", ipc=1, class_names=tuple(f"class {c}" for c in range(classes)),
        counts=tuple(counts), lr=0.01, iteration=iterations, selection="last", recipe_hash=recipe.recipe_hash(),
        experts_hash=recipe.experts_hash(), data_fingerprint="0" * 64, recipe=recipe.model_dump(mode="json"), versions={},
    )  # fmt: skip
    images = whitening.apply(pixels)
    logits = torch.zeros(classes, classes)
    with run.publish_folder(run.distilled) as folder:
        DistilledSet(images, logits, torch.arange(classes), meta, whitening, images).write(folder)
    for source, level in (("distilled", 0.4), ("initial", 0.35), ("random", 0.2), ("full", 0.5)):
        right = drawn.binomial(50, np.linspace(level, level / 4, classes))
        share = (right / 50).tolist()
        said = drawn.integers(0, classes, (classes, 8))
        pairs = [[c, c, int(n)] for c, n in enumerate(right)]
        pairs += [[c, int(k), 5] for c in range(classes) for k in said[c]]
        results.put(run.results, {
            "source": source, "architecture": "convnet", "seed": 0, "split": "test", "method": "lad",
            "selection": "last" if source == "distilled" else "none", "ipc": 1, "set_id": source,
            "settings": {"epochs": 1, "lr": 0.01}, "counts": counts, "overall": sum(share) / classes,
            **{name: sum(share[c] for c in of) / len(of) for name, of in thirds.items()}, "per_class": share,
            "by_count": {}, "train_images": classes, "seconds": 1.0, "confusion": [], "confusion_pairs": pairs,
        })  # fmt: skip
    results.merge(run.results)
    with costs() as writing:
        write_report(recipe, run)
    with costs() as reading:
        read_status(run.root)
    return {"classes": classes, "report": writing.cpu, "page": (run.report / INDEX).stat().st_size,
            "status": reading.cpu, "events": run.events.stat().st_size, "rows": (run.results).stat().st_size,
            "peak": peak()}  # fmt: skip


# --- what is measured, and the table ----------------------------------------------------------------------------------

FULL = (1000, 10, 64, 8)  # classes, IPC, pixels a side, width: ImageNet-LT's size, the jobs' pixels, a narrow network
BUSY = ", with {:.0f} processes waiting for its cores, which lengthens these seconds too."
Measurement = tuple[str, tuple[Any, ...]]  # a function of this file, its arguments


def measurements(busy: bool) -> dict[str, Measurement]:
    """Return all measurements by name. The first load of a size decodes, the second reads what was kept."""
    found: dict[str, Measurement] = {}
    others = () if busy else (("places-lt", 0.1), ("inaturalist", 0.05))
    for turn in ("first", "second"):
        found[f"load imagenet-lt, {turn} start"] = "load", ("imagenet-lt", 1.0, 64, busy)
        for name, part in (("imagenet-lt", 0.1), *others):
            found[f"load {name} x {part:g}, {turn} start"] = "load", (name, part)
    for size in (32,) if busy else (32, 128):
        found[f"load imagenet-lt x 0.1 at {size}, first start"] = "load", ("imagenet-lt", 0.1, size)
    found["photographs"] = "photographs", ()
    for name, part in (("imagenet-lt", 1.0), ("imagenet-lt", 0.1), ("places-lt", 1.0), ("inaturalist", 1.0)):
        found[f"bookkeeping {name} x {part:g}"] = "bookkeeping", (name, part)
    for classes, images, size in ((1000, 1000, 64), (1000, 1000, 32), (100, 1000, 32), (1000, 2000, 32)):
        found[f"expert {classes} classes, {images} images, {size}"] = "expert", (classes, images, size, FULL[3])
    for classes, ipc, size in (
        (1000, 10, 16), (300, 10, 16), (100, 10, 16), (1000, 3, 16), (1000, 1, 16), (1000, 10, 32), (1000, 10, 64),
    ):  # fmt: skip
        found[f"distillation {classes}, {ipc}, {size}"] = "distillation", (classes, ipc, size, FULL[3])
    for classes, size in ((1000, 64), (1000, 32), (100, 32), (8142, 32)):
        tested = max(2000, classes)
        found[f"evaluation {classes}, {size}"] = "evaluation", (classes, 1000, tested, size, FULL[3])
    for classes in (100, 1000, 8142):
        found[f"report {classes}"] = "report", (classes, 1000)
    return found


def measured_file(work: Path, name: str) -> Path:
    return work / "measured" / (name.replace(" ", "-") + ".json")


def measured(work: Path, name: str, what: Measurement) -> dict[str, Any]:
    """Return a measurement made in a process of its own; one that ``work`` has already is not made again.

    The process is forked from this one, which has imported torch and computed nothing.
    """
    file = measured_file(work, name)
    if not file.exists():
        import torch

        torch.set_num_threads(1)
        file.parent.mkdir(exist_ok=True)
        child = multiprocessing.get_context("fork").Process(target=run_one, args=(work, file, *what))
        child.start()
        child.join()
        if child.exitcode != 0:
            raise SystemExit(f"{name}: exit code {child.exitcode}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def run_one(work: Path, file: Path, function: str, arguments: Sequence[Any]) -> None:
    """Run a measurement in this process, with one thread, and write it to ``file``."""
    os.environ["LAD_DIST_CACHE"] = str(work / "cache")
    chosen: Callable[..., dict[str, Any]] = globals()[function]
    first = (work,) if function in ("load", "photographs", "distillation", "report") else ()
    file.write_text(json.dumps(chosen(*first, *arguments)), encoding="utf-8")


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent of growth: the slope of log y over log x, by least squares."""
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    return float(np.polyfit(x, y, 1)[0])


def table(found: dict[str, dict[str, Any]], busy: bool) -> str:
    """Return the page of results; ``busy``: a tenth was decoded, and the whole has made-up pixels."""
    wide, whole = f"width {FULL[3]}, 64x64, 1,000 classes", SHAPES["imagenet-lt"]
    images = whole.images + whole.classes * whole.test
    first, second = "load imagenet-lt, first start", "load imagenet-lt, second start"
    tenth, labels = "load imagenet-lt x 0.1, first start", "bookkeeping imagenet-lt x 1"
    full, expert_, evaluated = (
        "distillation 1000, 10, 64",
        "expert 1000 classes, 1000 images, 64",
        "evaluation 1000, 64",
    )
    decoded = (
        ("a tenth of each class, scaled up", lambda: found[tenth]["cpu"] / found[tenth]["images"] * images)
        if busy
        else ("all images, 64x64", lambda: found[first]["cpu"])
    )
    kept = "all images, 64x64" + (", made-up pixels in place of decoded ones" if busy else "")
    rows: list[tuple[str, str, Callable[[], str]]] = [
        (f"decoding and keeping {images:,} made-up images", decoded[0], lambda: seconds(decoded[1]())),
        (f"decoding as many of {IMAGENET_SIDES[0]}x{IMAGENET_SIDES[1]} pixels", "100 images, scaled up",
         lambda: seconds(found["photographs"]["cpu"] * images)),
        ("all of a first start but decoding" if busy else "a first start", kept, lambda: seconds(found[first]["cpu"])),
        ("a second start: files looked at, kept images checked and mapped", kept, lambda: seconds(found[second]["cpu"])),
        ("peak memory of a first start", kept, lambda: gb(found[first]["peak"])),
        ("peak memory of a second start, the mapped file included", kept,
         lambda: f"{gb(found[second]['peak'])}, {gb(found[second]['anonymous'])} without the file"),
        ("selecting images by label", "all labels", lambda: seconds(found[labels]["seconds"]["selection"])),
        ("the class-aware order of a classifier epoch", "all labels",
         lambda: seconds(found[labels]["seconds"]["class-aware order"])),
        (f"an expert's representation epoch, {whole.images:,} images", f"1,000 images, scaled up; {wide}",
         lambda: seconds(found[expert_]["per image"]["representation"] * whole.images)),
        ("an expert's classifier epoch, 1,280,000 draws", f"1,000 images, scaled up; {wide}",
         lambda: seconds(found[expert_]["per image"]["classifier"] * 1_280_000)),
        ("an iteration: two phases of 2 steps of 100 images", f"10,000 synthetic images; {wide}",
         lambda: seconds(found[full]["seconds"])),
        ("its peak memory", f"10,000 synthetic images; {wide}",
         lambda: f"{gb(found[full]['peak'])}; the set is {gb(found[full]['set'])}"),
        ("its checkpoint", f"10,000 synthetic images; {wide}", lambda: seconds(found[full]["checkpoint"])),
        ("an evaluation's epoch on 10,000 images", f"1,000 images, scaled up; {wide}",
         lambda: seconds(found[evaluated]["training"] * 10_000)),
        ("measuring a network on 50,000 images", f"2,000 images, scaled up; {wide}",
         lambda: seconds(found[evaluated]["measuring"] * 50_000)),
        ("the report", "1,000 classes, 1,000 iterations, 4 networks",
         lambda: f"{seconds(found['report 1000']['report'])}, {found['report 1000']['page'] / 1e6:.2f} MB"),
        ("the status", "1,000 classes, 1,000 iterations, 4 networks", lambda: seconds(found["report 1000"]["status"])),
    ]  # fmt: skip
    lines = [
        "# ImageNet-LT's size",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, 1 thread each; `python benchmarks/scale.py --work FOLDER"
        f"{' --busy' if busy else ''} --write`. Made-up images; processor seconds unless it says otherwise, as other work "
        f"shared the machine{BUSY.format(os.getloadavg()[1]) if busy else '.'}",
        "",
        "## Each stage",
        "",
        "| what | measured on | cost |",
        "|---|---|---|",
        *(f"| {what} | {on} | {cell(cost)} |" for what, on, cost in rows),
        "",
        "## Other shapes",
        "",
        *other_shapes(found),
        "",
        "## Growth",
        "",
        "Fitted exponents: 1 is in proportion, 2 with the square. In brackets the points of the fit.",
        "",
        *growth(found, busy),
        "",
        "## Projection to a GPU",
        "",
        *projection(),
    ]
    return "\n".join(lines) + "\n"


def cell(of: Callable[[], str]) -> str:
    """Return a cell of a table; a measurement that was left out is said to be missing."""
    try:
        return of()
    except KeyError:
        return "not measured"


def other_shapes(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Loading: of a part of each class (of no class fewer than two images); labels: all of them.",
        "",
        "| data set | classes | images | decoding | second start | selection by label | class-aware order, draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in (("places-lt", 0.1), ("inaturalist", 0.05)):
        first, second, of = (
            f"load {name} x {part:g}, first start",
            f"load {name} x {part:g}, second start",
            SHAPES[name],
        )
        labels = f"bookkeeping {name} x 1"
        cells = (
            lambda first=first: f"{seconds(found[first]['cpu'])} of {found[first]['images']:,}",
            lambda second=second: seconds(found[second]["cpu"]),
            lambda labels=labels: seconds(found[labels]["seconds"]["selection"]),
            lambda labels=labels: (
                f"{seconds(found[labels]['seconds']['class-aware order'])}, {found[labels]['draws']:,}"
            ),
        )
        lines.append(f"| {of.title} | {of.classes:,} | {of.images:,} | {' | '.join(map(cell, cells))} |")
    return lines


def growth(found: dict[str, dict[str, Any]], busy: bool) -> list[str]:
    """Return the table of exponents, each with what it should be."""

    def fit(names: Sequence[tuple[float, str]], of: Callable[[dict[str, Any]], float]) -> str:
        points = [(x, of(found[name])) for x, name in names if name in found]
        if len(points) < 2:
            return "not measured"
        return f"{exponent(points):.2f} ({' to '.join(f'{x:,.0f}' for x in (points[0][0], points[-1][0]))})"

    by_k = [(k, f"distillation {k}, 10, 16") for k in (100, 300, 1000)]
    by_ipc = [(n, f"distillation 1000, {n}, 16") for n in (1, 3, 10)]
    by_pixels = [(side**2, f"distillation 1000, 10, {side}") for side in (16, 32, 64)]

    def at(x: str, *names: str) -> list[tuple[float, str]]:
        return [(found[name][x], name) for name in names if name in found]

    loads = at("images", "load imagenet-lt x 0.1, first start", "load imagenet-lt, first start")
    again = at("images", "load imagenet-lt x 0.1, second start", "load imagenet-lt, second start")
    sizes = [(32**2, "load imagenet-lt x 0.1 at 32, first start"), (64**2, "load imagenet-lt x 0.1, first start"),
             (128**2, "load imagenet-lt x 0.1 at 128, first start")]  # fmt: skip
    labels = at("images", "bookkeeping imagenet-lt x 0.1", "bookkeeping imagenet-lt x 1")
    many = at("classes", "bookkeeping imagenet-lt x 1", "bookkeeping inaturalist x 1")
    experts_n = [(n, f"expert 1000 classes, {n} images, 32") for n in (1000, 2000)]
    experts_k = [(k, f"expert {k} classes, 1000 images, 32") for k in (100, 1000)]
    experts_p = [(side**2, f"expert 1000 classes, 1000 images, {side}") for side in (32, 64)]
    evaluated = [(k, f"evaluation {k}, 32") for k in (100, 1000, 8142)]
    reports = [(k, f"report {k}") for k in (100, 1000, 8142)]
    dash = "–"
    rows = [
        ("decoding, seconds", dash, dash, dash if busy else fit(loads, lambda m: m["cpu"]), fit(sizes, lambda m: m["cpu"])),
        ("second start, seconds", dash, dash, fit(again, lambda m: m["cpu"]), dash),
        ("selection by label, seconds", f"{fit(many, lambda m: m['seconds']['selection'])}, with 3.8 times the images",
         dash, fit(labels, lambda m: m["seconds"]["selection"]), dash),
        ("an expert's epoch, seconds (K, pixels: an image)", fit(experts_k, lambda m: m["per image"]["representation"]),
         dash, fit(experts_n, lambda m: m["per image"]["representation"] * m["images"]),
         fit(experts_p, lambda m: m["per image"]["representation"])),
        ("an iteration, seconds", fit(by_k, lambda m: m["seconds"]), fit(by_ipc, lambda m: m["seconds"]), dash,
         fit(by_pixels, lambda m: m["seconds"])),
        ("an iteration, memory beside the process", fit(by_k, lambda m: m["peak"] - m["before"]),
         fit(by_ipc, lambda m: m["peak"] - m["before"]), dash, fit(by_pixels, lambda m: m["peak"] - m["before"])),
        ("the events of an iteration, bytes", fit(by_k, lambda m: m["event"]), fit(by_ipc, lambda m: m["event"]), dash, dash),
        ("evaluation, seconds an image", fit(evaluated, lambda m: m["training"]), dash, dash, dash),
        ("a row's confusion, bytes", fit(evaluated, lambda m: m["row"]), dash, dash, dash),
        ("report, seconds", fit(reports, lambda m: m["report"]), dash, dash, dash),
        ("report, bytes", fit(reports, lambda m: m["page"]), dash, dash, dash),
        ("status, seconds", fit(reports, lambda m: m["status"]), dash, dash, dash),
    ]  # fmt: skip
    return [
        "| cost | classes K | IPC | images N | pixels |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def projection() -> list[str]:
    """Return the job's stages on an A100, by the planner's count of FLOPs and bytes."""
    from lad_dist import catalog, recipe_file
    from lad_dist.plan.dataset_info import published
    from lad_dist.plan.estimate import durations_of, shapes_of
    from lad_dist.plan.resources import resources_of
    from lad_dist.plan.speed import ASSUMED_BANDWIDTH, ASSUMED_FLOPS, CARDS
    from lad_dist.profile import Profile

    recipe = recipe_file.load(catalog.find_job("imagenet-lt-f256-ipc10").recipe)
    info = published(recipe.data)
    assert info is not None
    card, flops = CARDS["a100"], shapes_of(recipe, info).forward_flops
    durations = durations_of(recipe, info, resources_of(Profile(device="cuda"), None, "a100"))
    lines = [
        f"**Projected, not measured**: `imagenet-lt-f256-ipc10` (width {recipe.model.width}, depth {recipe.model.depth}, "
        f"64x64) on one {card.name}, by the planner's counts: {flops / 1e6:.0f} MFLOPs forward for an image; a student "
        f"step 8 times that (11 where "
        f"graphs are recomputed), an expert's step 6 times; {ASSUMED_FLOPS:g} of {card.flops / 1e12:.0f} TFLOP/s and "
        f"{ASSUMED_BANDWIDTH:g} of {card.bandwidth / 1e9:,.0f} GB/s are assumed.",
        "",
        "| stage | part | time | how |",
        "|---|---|---|---|",
    ]
    return lines + [f"| {d.stage} | {d.what} | {hours(d.seconds)} | {d.how} |" for d in durations]


def seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def hours(value: float) -> str:
    return f"{value / 3600:.1f} h" if value >= 3600 else f"{value / 60:.1f} min"


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; measurements in it are not repeated")
    parser.add_argument("--make", choices=SHAPES, help="only make this data set")
    parser.add_argument("--scale", type=float, default=1.0, help="with --make: share of each class's images")
    parser.add_argument("--kept", action="store_true", help="only measurements that FOLDER has")
    parser.add_argument("--busy", action="store_true", help="decode a tenth only: minutes instead of half an hour")
    parser.add_argument("--only", metavar="TEXT", help="only measurements whose name holds TEXT")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    asked = parser.parse_args()
    work = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if asked.make:
        print(make(work, asked.make, asked.scale))
        return
    found = {}
    for name, what in measurements(asked.busy).items():
        if asked.kept and not measured_file(work, name).exists():
            continue
        if asked.only is None or asked.only in name:
            found[name] = measured(work, name, what)
            print(name, json.dumps(found[name]), flush=True)
    if asked.only is None:
        text = table(found, asked.busy)
        print(text)
        if asked.write:
            RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
