"""Labels as an axis: stored views, hard and adjusted starting sets; protocols; teachers of another run."""

from __future__ import annotations

import pytest
import torch

from lad_dist import results
from lad_dist.errors import RecipeError
from lad_dist.evaluate import sources, stored
from lad_dist.evaluate.measure import planned_rows, settings_in
from lad_dist.evaluate.sources import settings_of, training_set
from lad_dist.evaluate.strong import strong_augmentation
from lad_dist.evaluate.train import CLASS_LOSS, Settings, TrainingSet, rows_of, train
from lad_dist.models.convnet import build
from lad_dist.recipe import AugmentConfig, Recipe

EVERY = torch.arange(20)
SMALL_RLDD = {"protocol": "rldd", "seeds": 1, "epochs": 2, "batch": 8}


@pytest.fixture
def pipeline(pipeline_of):
    made = pipeline_of(evaluate={"stored_views": 3})
    made.distill()
    return made


def set_of(pipeline, source, seed=0):
    return training_set(pipeline.recipe, pipeline.data, pipeline.run, source, seed)


# --- stored views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["distilled-stored", "initial-stored", "random-stored", "herding-stored"])
def test_views_come_back_and_are_labelled_by_the_teachers(pipeline, source):
    images = set_of(pipeline, source)
    label = sources.labeller(pipeline.recipe, pipeline.data, pipeline.run, source)
    views = [images.stored(epoch) for epoch in range(4)]
    assert torch.equal(views[0][0], views[3][0]) and torch.equal(views[0][1], views[3][1])
    assert not torch.equal(views[0][0], views[1][0])
    for view, logits, _ in views:
        assert view.shape == images.batch_of(EVERY)[0].shape
        torch.testing.assert_close(torch.softmax(logits, 1), label(view))
    plain = set_of(pipeline, results.base_source(source))
    assert torch.equal(plain.batch_of(EVERY)[0], images.batch_of(EVERY)[0])


def test_views_do_not_depend_on_how_many_are_made_at_once(pipeline, monkeypatch):
    whole = set_of(pipeline, "random-stored").stored(1)[0]
    row = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "random-stored")[0]
    assert row["settings"]["labels"] == "stored" and row["settings"]["stored_views"] == 3
    assert row["keeps"] == {"images": 20 * 64, "labels": 4 * 20 * 10 * 3, "teachers": 0}
    monkeypatch.setattr(stored, "_ROWS", 512)
    assert torch.equal(set_of(pipeline, "random-stored").stored(1)[0], whole)


def test_training_sees_the_stored_views_alone(pipeline):
    images, seen = set_of(pipeline, "distilled-stored"), []
    settings = Settings(2, 20, 0.05, 0.9, 0.0, 0.1, AugmentConfig())
    network = build(1, 8, 10, 4, 2, seed=0, purpose=("t",))
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    train(network, images, settings, 0, ("x",), lambda: None)
    for epoch, batch in enumerate(seen):
        view, _, _ = images.stored(epoch)
        rows = torch.cdist(batch.flatten(1), view.flatten(1)).argmin(dim=1)
        assert sorted(rows.tolist()) == list(range(20)) and torch.equal(batch, view[rows])


@pytest.fixture
def mixing(pipeline_of):
    return pipeline_of(evaluate={**SMALL_RLDD, "stored_views": 3})


def test_views_are_mixed_before_the_teachers_label_them(mixing):
    mixing.distill()
    images = set_of(mixing, "distilled-stored")
    label = sources.labeller(mixing.recipe, mixing.data, mixing.run, "distilled-stored")
    views, logits, classes = images.stored(1)
    torch.testing.assert_close(logits, label.logits(views) / label.temperature)  # the scale of teacher labels
    hard = set_of(mixing, "distilled-teacher").batch_of(EVERY)[1]
    shares = classes.gather(1, hard.argmax(1, keepdim=True))
    assert (
        torch.allclose(classes.sum(1), torch.ones(20)) and bool((shares < 0.999).any()) and bool((shares > 0.5).any())
    )
    again = set_of(mixing, "distilled-stored").stored(4)
    assert all(torch.equal(a, b) for a, b in zip((views, logits, classes), again, strict=True))
    seen = []
    network = build(1, 8, 10, 4, 2, seed=0, purpose=("t",))
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    settings = settings_of(mixing.recipe, mixing.data, mixing.run, "distilled-stored")
    train(network, images, settings, 0, ("x",), lambda: None)
    first = torch.cat(seen[:3])  # batches of 8, 8 and 4: the first epoch
    view = images.stored(0)[0]
    rows = torch.cdist(first.flatten(1), view.flatten(1)).argmin(dim=1)
    assert sorted(rows.tolist()) == list(range(20)) and torch.equal(first, view[rows])  # not mixed again
    (row, *_) = planned_rows(mixing.recipe, mixing.data, mixing.run, "distilled-stored")
    assert row["settings"]["mixed"] == "before labelling"


# --- the starting set's labels ------------------------------------------------------------------------------------------


def test_hard_and_adjusted_labels_of_the_starting_set(pipeline):
    soft, hard, adjusted = (set_of(pipeline, s).batch_of(EVERY) for s in ("initial", "initial-hard", "initial-adsa"))
    assert torch.equal(soft[0], hard[0]) and torch.equal(soft[0], adjusted[0])
    assert torch.equal(hard[1].argmax(1), torch.arange(10).repeat_interleave(2)) and hard[1].max() == 1
    assert not torch.equal(soft[1], adjusted[1])
    assert sources.adjusted_by(pipeline.recipe, pipeline.data, pipeline.run, "initial-adsa") is not None
    random, theirs = (set_of(pipeline, s).batch_of(EVERY) for s in ("random-soft", "random-soft-adsa"))
    assert torch.equal(random[0], theirs[0]) and not torch.equal(random[1], theirs[1])


@pytest.mark.parametrize("source", ["distilled", "initial", "random", "herding"])
def test_beside_the_experts_labels_every_source_has_its_classes(pipeline, source):
    """So that the classes' cross-entropy of protocol rldd does not favour images with soft labels."""
    for ending in ("-teacher", "-stored"):
        _, p = set_of(pipeline, source + ending).batch_of(EVERY)
        assert torch.equal(p, torch.nn.functional.one_hot(torch.arange(10).repeat_interleave(2), 10).float())


def test_names():
    assert results.base_source("initial-hard") == "initial" and results.base_source("random-soft-adsa") == "random"
    assert results.labelled_by_experts("random-soft-adsa") and not results.uses_experts("initial-hard")
    assert results.check_source("mine:pick-stored") == "mine:pick-stored"
    for name in ("full-stored", "mine:pick-adsa", "mine:pick-stored-plain", "mine:pick-plain-soft"):
        with pytest.raises(RecipeError, match="not known"):
            results.check_source(name)


@pytest.mark.parametrize("source", ["distilled-plain", "random-plain"])
def test_without_augmentation_is_without_any_in_every_protocol(pipeline_of, source):
    made = pipeline_of(evaluate=SMALL_RLDD)
    made.distill()
    settings, images, seen = settings_of(made.recipe, made.data, made.run, source), set_of(made, source), []
    network = build(1, 8, 10, 4, 2, seed=0, purpose=("t",))
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    train(network, images, settings, 0, ("x",), lambda: None)
    whole = images.batch_of(EVERY)[0]
    rows = torch.cat([torch.cdist(batch.flatten(1), whole.flatten(1)).argmin(dim=1) for batch in seen[:3]])
    assert sorted(rows.tolist()) == list(range(20)) and torch.equal(torch.cat(seen[:3]), whole[rows])


# --- protocols ----------------------------------------------------------------------------------------------------------


def test_a_protocol_is_a_preset():
    recipe = Recipe.model_validate({"evaluate": {"protocol": "rldd", "batch": 50}})
    e = recipe.evaluate
    assert (e.optimizer, e.lr, e.batch, e.cutmix, e.ema, e.schedule) == ("adamw", 0.001, 50, 1.0, 0.99, "late")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert Recipe().recipe_hash() == Recipe.model_validate({"evaluate": {"protocol": "lad"}}).recipe_hash()


def test_rows_of_lads_protocol_are_what_they_were(pipeline):
    (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "distilled")
    assert set(row["settings"]) == {
        *("epochs", "batch", "lr", "momentum", "weight_decay", "decay", "augment", "sampling", "logit_adjustment"),
        *("labels", "network"),
    }
    assert "compose" not in row["settings"]["augment"]


def test_rows_hold_their_protocol(pipeline_of):
    pipeline = pipeline_of(evaluate={**SMALL_RLDD, "baselines": ["random", "random-teacher", "random-stored"]})
    pipeline.distill()
    pipeline.evaluate_all()
    rows = {row["source"]: row for row in results.read(pipeline.run.results)}
    assert set(rows) == {"distilled", "random", "random-teacher", "random-stored"}
    for source, row in rows.items():
        assert settings_in(row) == settings_of(pipeline.recipe, pipeline.data, pipeline.run, source)
        assert row["settings"]["optimizer"] == "adamw" and row["settings"]["label_loss"] == "logits"


def toy(**more) -> TrainingSet:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    p = torch.nn.functional.one_hot(torch.arange(8) % 3, 3).float()
    return TrainingSet(rows_of(images, p), 8, **more)


def trained(images, **settings) -> torch.Tensor:
    network = build(1, 8, 3, 4, 1, seed=0, purpose=("t",))
    made = Settings(1, 8, 0.05, 0.0, 0.0, 0.1, AugmentConfig(operations=()), **settings)
    train(network, images, made, 0, ("x",), lambda: None)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_loss_of_logits_is_squared_distance_and_a_little_cross_entropy():
    fixed = torch.tensor([2.0, 0.0, -1.0])
    teacher = {
        "label_views": lambda x: fixed.softmax(0).expand(len(x), 3),
        "label_logits": lambda x: fixed.expand(len(x), 3),
    }
    ours = trained(toy(**teacher), label_loss="logits")
    network = build(1, 8, 3, 4, 1, seed=0, purpose=("t",))
    images, p = toy().batch_of(torch.arange(8))
    logits = network(images)
    loss = (logits - fixed).square().mean() - CLASS_LOSS * (p * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    theirs = torch.cat([(w - 0.05 * w.grad).detach().flatten() for w in network.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # Without a teacher there are no logits: the cross-entropy on the labels.
    assert torch.equal(trained(toy(), label_loss="logits"), trained(toy()))


def test_a_moving_average_is_measured():
    last, average = trained(toy()), trained(toy(), ema=0.5)
    assert torch.equal(last, average)  # after one step the average is the weights
    network = build(1, 8, 3, 4, 1, seed=0, purpose=("t",))
    weights = []
    settings = Settings(3, 8, 0.05, 0.0, 0.0, 0.1, AugmentConfig(operations=()), ema=0.5)

    def note():
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))

    train(network, toy(), settings, 0, ("x",), note)
    expected = weights[0]
    for each in weights[1:]:
        expected = 0.5 * expected + 0.5 * each
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in network.parameters()]), expected)


def test_strong_augmentation_is_a_function_of_its_counters(pipeline):
    augment = strong_augmentation(pipeline.data.whitening, pipeline.recipe.augment)
    images, _ = pipeline.data.train.batch(torch.arange(6))
    first, again, other = (augment(images, 0, ("a", n)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == images.shape
    assert not torch.equal(first[0], first[1]) and bool(first.isfinite().all())


def test_cutmix_mixes_labels_as_images():
    seen = []

    def label(views):
        seen.append(views.clone())
        return torch.full((len(views), 3), 1 / 3)

    trained(toy(label_views=label), cutmix=1.0)
    images, _ = toy().batch_of(torch.arange(8))
    flat = {tuple(image.flatten().tolist()) for image in images}
    assert any(tuple(view.flatten().tolist()) not in flat for view in seen[0])


# --- teachers of another run --------------------------------------------------------------------------------------------


def test_the_experts_of_another_run_label(pipeline_of):
    other = pipeline_of("teachers", method="datm")
    own = pipeline_of(
        "own", evaluate={"teachers_from": str(other.run.root), "baselines": ["teachers", "random-teacher"]}
    )
    own.distill()
    images, _ = set_of(own, "random").batch_of(EVERY)
    theirs = sources.labeller(other.recipe, other.data, other.run, "random-teacher")(images)
    assert torch.equal(set_of(own, "random-teacher").label_views(images), theirs)
    (row, *_) = planned_rows(own.recipe, own.data, own.run, "random-teacher")
    assert row["settings"]["labelled_by"].startswith("mean logits of 2 representation experts of teachers (")
    text = (other.run.root / "recipe.yaml").read_text()
    (other.run.root / "recipe.yaml").write_text(text.replace("network: convnet", "network: mlp"))
    assert results.networks(own.recipe, "teachers") == [("mlp", 0)]
    (other.run.root / "recipe.yaml").write_text(text)
    assert results.networks(own.recipe, "teachers") == [("convnet", 0)]
    for field, changes, said in (
        ("data", {"n_max": 15}, "other training images"),
        ("data", {"whitening": "none"}, "another data.whitening"),
    ):
        strange = pipeline_of(
            f"strange-{said[:5]}", **{field: changes}, evaluate={"teachers_from": str(other.run.root)}
        )
        with pytest.raises(RecipeError, match=said):
            sources.labeller(strange.recipe, strange.data, strange.run, "random-teacher")
    empty = pipeline_of("empty", experts={"seed": 3})
    own.recipe = own.recipe.model_copy(
        update={"evaluate": own.recipe.evaluate.model_copy(update={"teachers_from": str(empty.run.root)})}
    )
    with pytest.raises(RecipeError, match="holds no experts yet"):
        sources.labeller(own.recipe, own.data, own.run, "random-teacher")
