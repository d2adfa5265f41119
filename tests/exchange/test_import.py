"""Sets from elsewhere become a run's distilled set if they fit its job, and nothing that is wrong with them gets through."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil

import pytest
import torch

import lad_dist
from lad_dist import recipe_file
from lad_dist.errors import DistilledError
from lad_dist.exchange import pt
from lad_dist.exchange.incoming import kind_of
from lad_dist.launch.chain import stages_left
from lad_dist.progress import read_events
from lad_dist.rundir import STAGES, RunDir

IMAGES, LABELS, LR = "images_best.pt", "labels_best.pt", "lr_best.pt"


@pytest.fixture
def theirs(tmp_path):
    """``theirs(labels=..., lr=None)``: a folder as DATM's code leaves it, for the small job; None leaves a file out."""

    def make(**changes):
        draws = torch.Generator().manual_seed(1)
        logits = torch.randn(20, 10, generator=draws) + 5 * torch.eye(10).repeat_interleave(2, 0)
        content = {
            "images": torch.randn(20, 1, 8, 8, generator=draws),
            "labels": logits,
            "lr": torch.tensor(0.05),
        } | changes
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        for name, value in content.items():
            (folder / f"{name}_best.pt").unlink(missing_ok=True)
            if value is not None:
                torch.save(value, folder / f"{name}_best.pt")
        return folder

    return make


@pytest.fixture
def brought(lad, job, tmp_path):
    """``brought(folder, "--lr", 0.1)``: the import command, into tmp_path/run."""
    return lambda folder, *more: lad("import", job, folder, "--out", tmp_path / "run", *more)


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_a_set_as_datm_saves_it_is_evaluated_here(theirs, brought, lad, job, tmp_path):
    """Saved with a gradient, as that code does: ``torch.save(label_syn.cpu(), ...)``."""
    whole = theirs()
    logits = torch.load(whole / LABELS).requires_grad_()
    theirs(labels=logits.cpu())
    ended = brought(whole)
    assert ended.exit_code == 0, ended.output
    assert "imported 20 images with logits as labels, learning rate 0.05" in ended.output
    assert "is the image's class for 20 of 20" in ended.output
    made = lad_dist.load(tmp_path / "run")
    assert torch.equal(made.images, torch.load(whole / IMAGES)) and torch.equal(made.label_logits, logits.detach())
    assert made.labels.tolist() == [c for c in range(10) for _ in range(2)] and made.lr == pytest.approx(0.05)
    assert made.meta.method == made.meta.selection == "imported" and made.meta.dataset == "digits/train"
    assert f"{LABELS} sha256:" in made.meta.versions["imported from"]

    recipe, run = recipe_file.load(job), RunDir(tmp_path / "run")
    assert stages_left(recipe, run, STAGES) == ["evaluate", "report"]  # what a SLURM chain would hold
    before = (tmp_path / "run" / "distilled" / "meta.json").read_bytes()
    for verb in ("evaluate", "run"):
        ended = lad(verb, job, "--out", tmp_path / "run", "--set", "evaluate.baselines=[]")
        assert ended.exit_code == 0, ended.output
        assert "Distilled (imported)" in ended.output and "was imported, not made by this run" in ended.output
    assert "exists (imported)" in ended.output
    assert (tmp_path / "run" / "distilled" / "meta.json").read_bytes() == before
    kinds = [
        event["kind"] if "kind" in event else event["event"] for event in read_events(tmp_path / "run" / "events.jsonl")
    ]
    assert "distilled-imported" in kinds and not list((tmp_path / "run" / "trajectories").rglob("*.parquet"))
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "2 images per class, imported" in page and "The distilled set was imported" in page
    assert "Iteration of the set" not in page and "imported from images_best.pt sha256:" in page
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"imported"} and len(rows) == 2
    assert lad("status", tmp_path / "run").exit_code == 0


def test_hard_labels_without_a_rate_as_mtt_saves_them(theirs, brought, tmp_path):
    classes = torch.arange(10).repeat(2)  # not class after class
    folder = theirs(labels=classes, lr=None)
    refused = brought(folder)
    assert refused.exit_code == 6 and "lr_best.pt: is missing" in refused.output and "--lr RATE" in refused.output
    assert not (tmp_path / "run").exists()
    assert brought(folder, "--lr", 0.02).exit_code == 0
    made = lad_dist.load(tmp_path / "run")
    assert torch.equal(made.labels, classes.sort().values) and made.lr == 0.02
    assert torch.equal(made.soft_labels, torch.nn.functional.one_hot(classes.sort().values, 10).float())


def test_probabilities_are_asked_about_and_kept(theirs, brought, tmp_path):
    p = torch.softmax(torch.randn(20, 10), 1)
    p[0] = torch.eye(10)[0]
    folder = theirs(labels=p)
    refused = brought(folder)
    assert refused.exit_code == 6 and "--labels probabilities or --labels logits" in refused.output
    assert brought(folder, "--labels", "probabilities").exit_code == 0
    torch.testing.assert_close(lad_dist.load(tmp_path / "run").soft_labels, p, rtol=1e-5, atol=1e-7)
    assert brought(folder, "--labels", "logits", "--force").exit_code == 0
    assert torch.equal(lad_dist.load(tmp_path / "run").label_logits, p)


@pytest.mark.parametrize(
    "rate", [0.05, torch.tensor(0.05), torch.tensor([0.05]), torch.tensor(0.05, requires_grad=True)]
)
def test_the_rate_in_every_way_that_it_is_saved(theirs, rate):
    assert pt.read(theirs(lr=rate)).lr == pytest.approx(0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_floats_become_float32(theirs, dtype):
    images = torch.randn(20, 1, 8, 8).to(dtype)
    found = pt.read(theirs(images=torch.nn.Parameter(images))).images_SCHH
    assert found.dtype == torch.float32 and torch.equal(found, images.float()) and not found.requires_grad


def test_pixels_go_through_the_recipe_s_whitening(theirs, brought, tmp_path):
    pixels = torch.rand(20, 1, 8, 8)
    folder = theirs(images=pixels)
    refused = brought(folder)
    assert refused.exit_code == 6 and "--preprocessing none" in refused.output
    assert not (tmp_path / "run").exists()
    ended = brought(folder, "--preprocessing", "none")
    assert ended.exit_code == 0 and "100.0% of the values are pixels in [0, 1]" in ended.output
    made = lad_dist.load(tmp_path / "run")
    torch.testing.assert_close(made.pictures(), pixels, rtol=0, atol=1e-6)
    assert torch.equal(made.images, made.whitening.apply_float(pixels))
    assert brought(folder, "--preprocessing", "standardize", "--force").exit_code == 0
    assert torch.equal(lad_dist.load(tmp_path / "run").images, pixels)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pt", "parquet", "hf"])
def test_our_own_exports_come_back_bit_for_bit(theirs, brought, lad, job, tmp_path, form):
    assert brought(theirs()).exit_code == 0
    first = lad_dist.load(tmp_path / "run")
    assert lad("export", tmp_path / "run", "--to", form, "--out", tmp_path / "out").exit_code == 0
    ended = lad("import", job, tmp_path / "out", "--from", form, "--out", tmp_path / "second")
    assert ended.exit_code == 0, ended.output
    second = lad_dist.load(tmp_path / "second")
    for name in ("images", "label_logits", "labels", "soft_labels"):
        assert getattr(first, name).numpy().tobytes() == getattr(second, name).numpy().tobytes()
    assert first.lr == second.lr and second.meta.method == "imported"
    assert first.meta.data_fingerprint == second.meta.data_fingerprint


def test_pt_of_hard_labels_comes_back(theirs, brought, lad, job, tmp_path):
    assert brought(theirs(labels=torch.arange(10).repeat_interleave(2))).exit_code == 0
    assert lad("export", tmp_path / "run", "--to", "pt", "--out", tmp_path / "out").exit_code == 0
    assert torch.load(tmp_path / "out" / LABELS).dtype == torch.int64
    assert lad("import", job, tmp_path / "out", "--out", tmp_path / "second").exit_code == 0
    assert torch.equal(lad_dist.load(tmp_path / "second").label_logits, lad_dist.load(tmp_path / "run").label_logits)


def test_classes_in_any_order_become_class_after_class(theirs, brought, lad, job, tmp_path):
    files = theirs(labels=torch.arange(10).repeat_interleave(2))
    images, order = torch.load(files / "images_best.pt"), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.save(images[order], files / "images_best.pt")
    torch.save(torch.arange(10).repeat_interleave(2)[order], files / LABELS)
    assert brought(files).exit_code == 0
    found = lad_dist.load(tmp_path / "run")
    assert found.labels.tolist() == sorted(order.div(2, rounding_mode="floor").tolist())
    for image, label in zip(found.images, found.labels.tolist(), strict=True):
        at = int((images - image).flatten(1).abs().sum(1).argmin())
        assert torch.equal(images[at], image) and at // 2 == label
    assert found.label_logits.argmax(1).tolist() == found.labels.tolist()


@pytest.fixture
def exported(theirs, brought, lad, tmp_path):
    """Parquet of a set for the small job, with ``change(meta document)`` made in its metadata before it is exported."""

    def make(change=lambda doc: None):
        from lad_dist.distilled import DistilledSet
        from lad_dist.exchange.export import export

        assert brought(theirs(), "--force").exit_code == 0
        whole = lad_dist.load(tmp_path / "run")
        fields = vars(whole.meta).copy()
        change(fields)
        changed = DistilledSet(
            whole.images, whole.label_logits, whole.labels, type(whole.meta)(**fields), whole.whitening
        )
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        export(changed, "parquet", tmp_path / "out")
        return tmp_path / "out"

    return make


def test_a_set_chosen_on_the_test_set_still_says_so(exported, lad, job, tmp_path):
    out = exported(lambda doc: doc.update(method="lad", selection="test-as-published", iteration=500))
    assert lad("import", job, out, "--from", "parquet", "--out", tmp_path / "second").exit_code == 0
    meta = lad_dist.load(tmp_path / "second").meta
    assert (meta.method, meta.selection, meta.iteration) == ("imported", "test-as-published", 500)
    assert meta.versions["method there"] == "lad"


def test_our_exports_of_other_data_are_refused(exported, lad, job, tmp_path):
    out = exported()
    ended = lad("import", job, out, "--from", "parquet", "--out", tmp_path / "2", "--set", "data.imbalance_factor=2")
    assert ended.exit_code == 6 and "distilled from other training images" in ended.output
    ended = lad("import", job, out, "--from", "parquet", "--out", tmp_path / "2", "--set", "data.whitening=zca")
    assert ended.exit_code == 6 and "valid: --set data.whitening=standardize" in ended.output
    ended = lad("import", job, out, "--from", "hf", "--labels", "logits", "--out", tmp_path / "2")
    assert ended.exit_code == 6 and "--labels is for --from pt" in ended.output
    ended = lad("import", job, tmp_path / "theirs", "--from", "hf", "--out", tmp_path / "2")
    assert ended.exit_code == 6 and "holds no distilled set" in ended.output
    assert not (tmp_path / "2").exists()


def test_damage_to_parquet_is_seen(exported):
    from lad_dist.exchange import tables

    file = exported() / "distilled.parquet"
    whole, draws = file.read_bytes(), random.Random(0)
    good = tables.read(file)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        file.write_bytes(damaged)
        try:
            found = tables.read(file)
        except DistilledError:
            continue
        # what checksums do not cover: other columns, and names in the footer that nobody reads
        assert torch.equal(found.images_SCHH, good.images_SCHH) and torch.equal(found.labels, good.labels)
    for left in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:left])
        with pytest.raises(DistilledError, match=r"distilled\.parquet: not a readable Parquet file"):
            tables.read(file)


def test_parquet_of_other_code_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lad_dist.exchange import tables

    file = tmp_path / "distilled.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), file)
    with pytest.raises(DistilledError, match=r"column 'label_logits' is missing; the columns are image, label"):
        tables.read(tmp_path)
    pq.write_table(pa.table({"label": [0], "label_logits": [[0.5]], "whitened": [[0.5]]}), file)
    with pytest.raises(DistilledError, match="was not exported by lad-dist"):
        tables.read(tmp_path)
    pq.write_table(pa.table({"label": ["a"], "label_logits": [[0.5]], "whitened": [[0.5]]}), file)
    with pytest.raises(DistilledError, match="'label' holds string"):
        tables.read(tmp_path)
    pq.write_table(pa.table({"label": [0, 1], "label_logits": [[0.5], [0.5, 1.0]], "whitened": [[0.5], [0.5]]}), file)
    with pytest.raises(DistilledError, match="'label_logits' holds lists of different lengths"):
        tables.read(tmp_path)


# --- what does not come in --------------------------------------------------------------------------------------------


class _Code:
    def __reduce__(self):
        return os.mkdir, (str(_Code.proof),)


@pytest.mark.parametrize(("changes", "said"), [
    ({"images": torch.randn(20, 3, 8, 8)}, "its images are 3x8x8 where the recipe's data (digits/train) are 1x8x8"),
    ({"images": torch.randn(20, 1, 8, 9)}, "its images are 1x8x9"),
    ({"images": torch.randn(20, 64)}, "images_best.pt: holds a strided tensor of float32 of shape (20, 64)"),
    ({"images": torch.zeros(20, 1, 8, 8, dtype=torch.uint8)}, "images_best.pt: holds a strided tensor of uint8"),
    ({"images": torch.randn(20, 1, 8, 8).to_sparse()}, "images_best.pt: holds a sparse_coo tensor"),
    ({"images": [1, 2]}, "images_best.pt: holds a list; valid: one dense tensor"),
    ({"images": None}, "images_best.pt: is missing"),
    ({"images": torch.full((20, 1, 8, 8), float("nan"))}, "images_best.pt: 1280 values are NaN or infinite"),
    ({"images": torch.randn(30, 1, 8, 8), "labels": torch.randn(30, 10)}, "valid: --set ipc=3"),
    ({"images": torch.randn(19, 1, 8, 8), "labels": torch.randn(19, 10)}, "has 19 images where 10 classes with ipc 2 make 20"),
    ({"labels": torch.randn(20, 100)}, "labels are of 100 classes where the recipe's data (digits/train) have 10"),
    ({"labels": torch.randn(19, 10)}, "labels_best.pt: has 19 labels where images_best.pt has 20 images"),
    ({"labels": torch.randn(20, 10) / 0}, "labels_best.pt: 200 values are NaN or infinite"),
    ({"labels": torch.randn(20)}, "labels_best.pt: holds float32 of shape (20,) with fractions"),
    ({"labels": torch.randn(20, 1, 10)}, "labels_best.pt: holds float32 of shape (20, 1, 10)"),
    ({"labels": torch.arange(20)}, "classes are 0 to 19 where the recipe's data (digits/train) have 10"),
    ({"labels": torch.arange(-10, 10)}, "classes are -10 to 9"),
    ({"labels": torch.zeros(20, dtype=torch.long)}, "class 0 has 20 images; valid: 2 of each class"),
    ({"lr": torch.tensor(float("nan"))}, "lr_best.pt: the learning rate is nan"),
    ({"lr": 0.0}, "lr_best.pt: the learning rate is 0"),
    ({"lr": torch.zeros(3)}, "lr_best.pt: holds a strided tensor of float32 of shape (3,)"),
    ({"lr": "fast"}, "lr_best.pt: holds a str"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing(theirs, brought, tmp_path, changes, said):
    ended = brought(theirs(**changes))
    assert ended.exit_code == 6 and said in " ".join(ended.output.split()), ended.output
    assert ended.output.count("error:") == 1 and "valid:" in ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("more", "said"), [
    (["--lr", "-1"], "--lr: the learning rate is -1"), (["--lr", "nan"], "--lr: the learning rate is nan"),
    (["--labels", "indices"], "class indices have shape (images,)"),
    (["--labels", "probabilities"], "is not probabilities: the smallest value is"),
    (["--preprocessing", "zca"], "valid: --set data.whitening=zca"),
    (["--preprocessing", "none"], "valid: pixels in [0, 1]"),
])  # fmt: skip
def test_options_that_cannot_be_meant(theirs, brought, tmp_path, more, said):
    ended = brought(theirs(), *more)
    assert ended.exit_code == 6 and said in ended.output, ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [IMAGES, LABELS, LR])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_named(theirs, name, left):
    folder = theirs()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(DistilledError, match=name.replace(".", r"\.") + ": is damaged, or not a file of torch.save"):
        pt.read(folder)


def test_flipped_bits_in_the_tensors_are_seen(theirs):
    folder = theirs()
    whole, draws, good = (folder / IMAGES).read_bytes(), random.Random(0), pt.read(folder).images_SCHH
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        (folder / IMAGES).write_bytes(damaged)
        try:
            assert torch.equal(pt.read(folder).images_SCHH, good)  # the bit was in padding
        except DistilledError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("name", [IMAGES, LABELS, LR])
@pytest.mark.parametrize("how", ["torch", "legacy", "protocol 2", "protocol 4"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_code_in_a_pickle_is_not_run(theirs, brought, tmp_path, name, how):
    folder, _Code.proof = theirs(), tmp_path / "proof"
    if how.startswith("protocol"):
        (folder / name).write_bytes(pickle.dumps(_Code(), protocol=int(how[-1])))
    else:
        torch.save(_Code(), folder / name, _use_new_zipfile_serialization=how == "torch")
    said = (
        "is damaged, or not a file of torch.save" if how == "protocol 4" else "was not loaded: it asks for posix.mkdir"
    )
    ended = brought(folder)
    assert ended.exit_code == 6 and f"{name}: {said}" in ended.output, ended.output
    assert not (tmp_path / "proof").exists() and not (tmp_path / "run").exists()


def test_sets_whitened_otherwise_and_superfluous_options_are_refused(theirs, brought, lad, job, tmp_path):
    zca = ("--set", "data.whitening=zca")
    assert brought(theirs(), *zca).exit_code == 0
    assert lad("export", tmp_path / "run", "--to", "parquet", "--out", tmp_path / "out").exit_code == 0
    for folder, form in ((tmp_path / "out", "parquet"), (tmp_path / "run", "set")):
        given = ("import", job, folder, "--from", form, "--out", tmp_path / "second", *zca)
        ended = lad(*given, "--set", "data.zca_eps=10.0")
        assert ended.exit_code == 6 and "was whitened with data.zca_eps 0.1 where the recipe has 10.0" in ended.output
        ended = lad(*given, "--preprocessing", "none")
        assert ended.exit_code == 6 and "says itself how it was whitened (zca)" in ended.output
        assert not (tmp_path / "second").exists()


def test_a_set_that_is_there_is_kept_unless_forced(theirs, brought, lad, job, tmp_path):
    assert brought(theirs()).exit_code == 0
    assert lad("evaluate", job, "--out", tmp_path / "run").exit_code == 0
    first = lad_dist.load(tmp_path / "run").images
    other = theirs(images=torch.randn(20, 1, 8, 8))
    ended = brought(other)
    assert ended.exit_code == 6 and "run/distilled: already exists and is not replaced" in ended.output
    assert torch.equal(lad_dist.load(tmp_path / "run").images, first)
    results = tmp_path / "run" / "evaluation" / "results.json"
    assert len(json.loads(results.read_text())["rows"]) == 2
    assert brought(other, "--force").exit_code == 0
    assert torch.equal(lad_dist.load(tmp_path / "run").images, torch.load(other / IMAGES))
    assert json.loads(results.read_text())["rows"] == [] and not list((results.parent / "rows").iterdir())


def test_a_corrected_command_works_where_the_first_was_refused(theirs, brought, tmp_path):
    folder = theirs(images=torch.randn(30, 1, 8, 8), labels=torch.randn(30, 10))
    assert brought(folder).exit_code == 6
    assert brought(folder, "--set", "ipc=3").exit_code == 0
    assert lad_dist.load(tmp_path / "run").meta.ipc == 3


def test_a_run_that_was_there_is_not_removed(theirs, brought, tmp_path, lad, job):
    assert lad("report", job, "--out", tmp_path / "run").exit_code == 0
    assert brought(theirs(labels=torch.randn(20, 9))).exit_code == 6
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_a_folder_that_is_none(brought, tmp_path):
    ended = brought(tmp_path / "nowhere")
    assert ended.exit_code == 6 and "nowhere: is not a folder; valid: one with images_best.pt" in ended.output


@pytest.mark.parametrize(("labels", "asked", "kind"), [
    (torch.tensor([0, 1]), None, "indices"), (torch.tensor([0.0, 1.0]), None, "indices"),
    (torch.randn(4, 3), None, "logits"), (torch.tensor([[0.5, 0.4]]), None, "logits"),
    (torch.tensor([[0.5, 0.5]]), "probabilities", "probabilities"), (torch.tensor([[0.5, 0.5]]), "logits", "logits"),
    (torch.tensor([[1, 0], [0, 1]]), "probabilities", "probabilities"),
    (torch.softmax(torch.randn(50, 100), 1).half(), "probabilities", "probabilities"),
])  # fmt: skip
def test_what_labels_hold(labels, asked, kind):
    assert kind_of(labels, asked, "labels_best.pt") == kind


@pytest.mark.parametrize("name", ["images", "labels", "lr"])
def test_tensors_without_values_are_refused(theirs, name):
    """torch saves shapes alone of tensors on its device meta."""
    shape = {"images": (20, 1, 8, 8), "labels": (20, 10), "lr": ()}[name]
    with pytest.raises(DistilledError, match=rf"{name}_best\.pt: is damaged.* has no values"):
        pt.read(theirs(**{name: torch.zeros(shape, device="meta")}))
