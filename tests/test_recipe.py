"""Recipes: every fault at once, overrides, method presets, hashes, and saving."""

from __future__ import annotations

from pathlib import Path

import pytest

from lad_dist import recipe_file
from lad_dist.errors import RecipeError
from lad_dist.methods import METHODS
from lad_dist.recipe import PROTOCOLS, Recipe


def faults(doc: dict, *sets: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as refused:
        recipe_file.from_document(doc, sets, "x.yaml")
    return refused.value.faults


# --- faults -----------------------------------------------------------------------------------------------------------


def test_every_fault_is_reported_at_once():
    doc = {"ipc": 0, "data": {"dataset": "mnist"}, "experts": {"rho": 0.1, "lr": "fast"}}
    found = faults(doc, "seed=-1", "nonsense")
    text = "\n".join(found)
    for part in ("x.yaml: ipc: 0", "x.yaml: data.dataset: 'mnist'", "x.yaml: experts.rho: unknown key",
                 "x.yaml: experts.lr: 'fast'", "--set seed=-1", "--set nonsense"):  # fmt: skip
        assert part in text
    assert len(found) == 6


@pytest.mark.parametrize(("field", "near"), [
    ("experts.rho", "experts.gsam_rho (default 0.01)"), ("distill.iteration", "distill.iterations (default 10000)"),
    ("iterations", "distill.iterations"), ("ipcs", "ipc (default 10)"), ("model.widht", "model.width (default 128)"),
    ("evaluate.seed", "evaluate.seeds (default 5)"), ("distil.iterations", "distill"),
])  # fmt: skip
def test_an_unknown_key_names_the_nearest(field, near):
    (fault,) = faults({}, f"{field}=1")
    assert fault.startswith(f"--set {field}=1: unknown key; did you mean") and near in fault


@pytest.mark.parametrize("doc", [
    {"ipc": "3"}, {"ipc": 3.5}, {"ipc": True}, {"data": {"imbalance_factor": "100"}},
    {"distill": {"weighted_loss": "yes"}}, {"data": {"download": 0}}, {"distill": {"alpha": float("nan")}},
    {"distill": {"alpha": float("inf")}},
    {"data": {"imbalance_factor": 1001}}, {"augment": {"operations": ["blur"]}}, {"name": "a/b"}, {"name": ".."},
    {"data": []}, {"distill": 3}, {"method": "LAD"}, {"method": ["lad"]},
])  # fmt: skip
def test_a_wrong_type_or_bound_is_one_fault(doc):
    assert len(faults(doc)) == 1


@pytest.mark.parametrize(("doc", "field"), [
    ({"experts": {"epochs": 5}}, "distill.start_epoch_max"),
    ({"distill": {"start_epoch_min": 20}}, "distill.start_epoch_max"),
    ({"distill": {"start_epoch_max_first": 30, "start_epoch_growth": 9}}, "distill.start_epoch_max_first"),
    ({"distill": {"classifier_start_epoch_max": 10}}, "distill.classifier_start_epoch_max"),
    ({"evaluate": {"split": "validation"}}, "evaluate.split"),
    ({"distill": {"select": "validation"}}, "distill.select"),
    ({"data": {"dataset": "list", "train": "a.txt"}}, "data.test"),
    ({"data": {"imbalance": "natural", "imbalance_factor": 10}}, "data.imbalance_factor"),
    ({"data": {"imbalance": "natural", "n_max": 10}}, "data.n_max"),
])  # fmt: skip
def test_fields_must_fit_together(doc, field):
    (fault,) = faults(doc)
    assert fault.startswith(f"x.yaml: {field}: ")


def test_a_fault_of_several_fields_names_the_option_that_caused_it():
    (fault,) = faults({}, "experts.epochs=500", "distill.start_epoch_max=500")
    assert fault.startswith("--set distill.start_epoch_max=500: ")


@pytest.mark.parametrize(("text", "said"), [
    ("ipc: 1\nipc: 2\n", ":2: not valid YAML: key 'ipc' is given twice (first on line 1)"), ("- 1\n", "holds list"),
    ("ipc: [", "not valid YAML"), ("1: 2\n", "key 1 is not text"),
    ("ipc: !!python/object:os.system x", "not valid YAML"),
])  # fmt: skip
def test_yaml_that_cannot_be_a_recipe(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml") as refused:
        recipe_file.load(tmp_path / "r.yaml")
    assert said in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        recipe_file.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe_file.load(tmp_path / "r.yaml")


# --- values -----------------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_holds():
    recipe = recipe_file.from_document({"ipc": 5, "data": {"n_max": 7}}, ["ipc=6", "ipc=8", "data.imbalance_factor=3"])
    assert (recipe.ipc, recipe.data.n_max, recipe.data.imbalance_factor) == (8, 7, 3.0)


def test_numbers_as_people_write_them():
    for text in ("1e-5", "1.0e-05", "0.00001", "1E-5"):
        assert recipe_file.from_document({}, [f"distill.lr_alpha={text}"]).distill.lr_alpha == 1e-5


def test_null_means_the_default():
    assert recipe_file.from_document({"ipc": None}).ipc == 10
    assert recipe_file.from_document({"data": {"n_max": 5}}, ["data.n_max=null"]).data.n_max is None


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().ipc = 3  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_expands_to_explicit_fields(method):
    recipe = recipe_file.from_document({"method": method})
    for field, value in METHODS[method].distill.items():
        assert getattr(recipe.distill, field) == value
        assert f"  {field}: {str(value).lower() if isinstance(value, bool) else value}" in recipe_file.dump(recipe)


def test_methods_differ():
    assert len({tuple(fields.items()) for fields in (m.distill for m in METHODS.values())}) == len(METHODS)


def test_a_recipe_may_set_a_field_of_its_method():
    recipe = recipe_file.from_document({"method": "datm", "distill": {"labels": "hard"}})
    assert (recipe.distill.labels, recipe.distill.matching) == ("hard", "joint")


def test_another_network_replaces_the_students_that_followed_the_old_one(tmp_path):
    path = tmp_path / "recipe.yaml"

    def saved(recipe, *sets):
        path.write_text(recipe_file.dump(recipe))
        return recipe_file.load(path, sets).evaluate.architectures

    assert saved(Recipe(), "model.network=resnet18") == ("resnet18",)
    assert saved(Recipe(), "model.network=resnet18", "evaluate.architectures=[convnet]") == ("convnet",)
    both = Recipe.model_validate({"evaluate": {"architectures": ["convnet", "vgg11"]}})
    assert saved(both, "model.network=resnet18") == ("convnet", "vgg11")
    own = recipe_file.from_document({"evaluate": {"architectures": ["convnet"]}}, ["model.network=mlp"])
    assert own.evaluate.architectures == ("convnet",)  # set by its author


def test_on_and_off_are_words():
    assert recipe_file.from_document({}, ["evaluate.together=on"]).evaluate.together == "on"
    found = recipe_file.parse_yaml("fleet: off\nyes: true\nno: False", "here")
    assert found == {"fleet": "off", "yes": True, "no": False}
    assert recipe_file.parse_yaml(recipe_file.dump(Recipe(name="on")), "here")["name"] == "on"


@pytest.mark.parametrize("field", ["train", "test", "image_column", "label_column", "fit"])
def test_arrays_have_no_files_and_columns(field):
    value = "center-crop" if field == "fit" else "x"
    with pytest.raises(RecipeError, match=rf"data\.{field}: has no meaning with data\.dataset digits"):
        recipe_file.from_document({"data": {"dataset": "digits", field: value}})


def test_a_resolved_recipe_of_an_older_version_still_opens():
    doc = Recipe().model_dump(mode="json")
    for half in ({"start_epoch_growth": 9}, {"start_epoch_max_first": 5}):
        found = recipe_file.from_document({**doc, "distill": {**doc["distill"], **half}}).distill
        assert (found.start_epoch_max_first, found.start_epoch_growth) == (None, 0)
    with pytest.raises(RecipeError, match="valid: both, or neither"):
        recipe_file.from_document(doc, ["distill.start_epoch_growth=9"])


@pytest.mark.parametrize("fields", [{"start_epoch_max_first": 5}, {"start_epoch_growth": 5}])
def test_a_growing_bound_needs_both_of_its_fields(fields):
    with pytest.raises(RecipeError, match="valid: both, or neither"):
        recipe_file.from_document({"distill": fields})


@pytest.mark.parametrize("method", METHODS)
def test_another_method_replaces_what_a_saved_recipe_spelled_out(tmp_path, method):
    (tmp_path / "r.yaml").write_text(recipe_file.dump(Recipe()))
    changed = recipe_file.load(tmp_path / "r.yaml", [f"method={method}"])
    assert {f: getattr(changed.distill, f) for f in METHODS[method].distill} == METHODS[method].distill


def test_another_protocol_replaces_what_a_saved_recipe_spelled_out(tmp_path):
    def saved(recipe: Recipe, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(recipe_file.dump(recipe))
        return recipe_file.load(tmp_path / "r.yaml", overrides)

    rldd = saved(Recipe(), "evaluate.protocol=rldd")
    assert {f: getattr(rldd.evaluate, f) for f in PROTOCOLS["rldd"]} == PROTOCOLS["rldd"]
    assert saved(rldd, "evaluate.protocol=lad") == Recipe()
    own = saved(Recipe(), "evaluate.protocol=rldd", "evaluate.batch=7")
    assert (own.evaluate.batch, own.evaluate.lr) == (7, 0.001)
    assert saved(own) == saved(own, "evaluate.protocol=rldd") == own


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "jobs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_a_saved_recipe_reloads_equal(tmp_path, file):
    recipe = recipe_file.load(file)
    (tmp_path / "r.yaml").write_text(recipe_file.dump(recipe, header="one\ntwo"))
    again = recipe_file.load(tmp_path / "r.yaml")
    assert again == recipe and again.recipe_hash() == recipe.recipe_hash()
    assert recipe_file.dump(again, header="one\ntwo") == (tmp_path / "r.yaml").read_text()


def test_every_field_with_a_unit_or_bound_says_what_it_is():
    fields = dict(recipe_file.fields_of(Recipe))
    assert len(fields) > 60
    described = [name for name, info in fields.items() if info.description]
    assert len(described) > 0.8 * len(fields)


# --- hashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [
    "ipc=1", "seed=3", "distill.iterations=5", "evaluate.epochs=3", "experts.count=7", "method=mtt",
    "experts.epochs_per_part=2", "data.root=/x", "data.download=false", "name=y",
])  # fmt: skip
def test_jobs_that_need_the_same_experts_share_a_buffer(same):
    assert recipe_file.from_document({}, [same]).experts_hash() == Recipe().experts_hash()


@pytest.mark.parametrize("other", [
    "experts.lr=0.02", "experts.seed=1", "experts.epochs=99", "model.width=64", "data.n_max=9", "augment.flip=0",
    "data.imbalance_factor=9", "data.whitening=none", "data.validation_per_class=5", "experts.gsam_rho=0",
])  # fmt: skip
def test_jobs_that_need_other_experts_do_not(other):
    assert recipe_file.from_document({}, [other]).experts_hash() != Recipe().experts_hash()


def test_fields_that_came_later_leave_hashes_as_they_were_while_at_their_defaults():
    """The values are those of the default recipe before the fields existed."""
    from lad_dist.distill.state import _trajectory_hash

    assert Recipe().experts_hash() == "a0628330afa983dfa05e905bdb7a93166a5ccd3ab57a7351b0b597b2bd5a8136"
    assert _trajectory_hash(Recipe()) == "83cf22f71c2fdd370ed77055b773e4b76ed0cf11019cb06235998a78ced0dde5"
    zca = recipe_file.from_document({}, ["data.normalize_before_zca=published"])
    assert zca.experts_hash() != Recipe().experts_hash()
    labels = recipe_file.from_document({}, ["distill.initial_labels=one-expert"])
    assert labels.experts_hash() == Recipe().experts_hash()
    assert _trajectory_hash(labels) != _trajectory_hash(Recipe()) and labels.recipe_hash() != Recipe().recipe_hash()


def test_normalising_before_zca_needs_zca():
    with pytest.raises(RecipeError) as refused:
        recipe_file.from_document({}, ["data.normalize_before_zca=fitted", "data.whitening=none"])
    (fault,) = refused.value.faults
    assert "data.normalize_before_zca=fitted: fitted has no meaning with data.whitening none" in fault


def test_the_recipe_hash_forgets_only_where_the_data_lie():
    base = Recipe().recipe_hash()
    assert recipe_file.from_document({}, ["data.root=/x", "data.download=false"]).recipe_hash() == base
    assert recipe_file.from_document({}, ["seed=1"]).recipe_hash() != base


@pytest.mark.parametrize("text", ["", "\n", "# a comment only\n", "{}", "null", "---\n", "\ufeff"])
def test_an_empty_recipe_is_not_the_default_one(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: is empty"):
        recipe_file.load(tmp_path / "recipe.yaml")


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("ipc: 3\n", encoding="utf-8-sig")
    assert recipe_file.load(tmp_path / "recipe.yaml").ipc == 3


@pytest.mark.parametrize("field", ["ipc", "experts.count", "experts.epochs", "experts.classifier_epochs",
                                   "experts.batch", "distill.student_steps", "evaluate.seeds", "evaluate.epochs",
                                   "model.width", "model.depth"])  # fmt: skip
@pytest.mark.parametrize("value", ["1000000000", "1e9", "1000000000000", "-1", "0", "true", "9" * 5000])
def test_numbers_beyond_any_experiment_are_refused(field, value):
    with pytest.raises(RecipeError) as raised:
        recipe_file.from_document({}, [f"{field}={value}"])
    assert f"--set {field}=" in str(raised.value) and len(raised.value.faults) == 1


@pytest.mark.parametrize("value", ["1:30", "010", "0x1f", "0b101", "190:20:30"])
def test_numbers_that_people_read_otherwise_are_refused(tmp_path, value):
    (tmp_path / "r.yaml").write_text(f"ipc: {value}\nexperts: {{lr: {value}}}\n")
    with pytest.raises(RecipeError) as raised:
        recipe_file.load(tmp_path / "r.yaml")
    assert [line.split(": ")[1:3] for line in raised.value.faults] == [
        ["ipc", repr(value)],
        ["experts.lr", repr(value)],
    ]


@pytest.mark.parametrize(("text", "value"), [
    ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e-3", 1e-3), ("1.5E+3", 1.5e3), ("1_000.5", 1000.5), ("2.0e-06", 2e-6),
])  # fmt: skip
def test_numbers_as_they_are_written(text, value):
    assert recipe_file.from_document({}, [f"experts.lr={text}"]).experts.lr == value
    assert recipe_file.from_document({}, ["ipc=1_000"]).ipc == 1000


@pytest.mark.parametrize("name", ["1e5", "1.5", "010", "0x1f", "null", "yes", "2001-02-03", "1_000"])
def test_a_name_that_looks_like_a_number_survives_its_file(name):
    recipe = recipe_file.from_document({"name": name})
    assert recipe_file.from_document(recipe_file.parse_yaml(recipe_file.dump(recipe), "r")) == recipe


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("text", "said"), [
    (BOMB, "more than 32 aliases"), ("a: " + "[" * 50_000, "nested more than 32 deep"),
    ("a: " + "{b: " * 40 + "1" + "}" * 40, "nested more than 32 deep"), ("a: &x [*x]", r"\*x contains itself"),
    ("a: &x {b: {c: *x}}", r"\*x contains itself"), ("a: 2001-99-99", "not valid YAML"), ("a: " + "9" * 5000, "not valid YAML"),
    ("a: 1\n" * 300_000, "more than 1,048,576 bytes"),
])  # fmt: skip
def test_yaml_that_would_take_all_memory_or_crash_is_refused(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said) as raised:
        recipe_file.load(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.timeout(20)
def test_a_device_is_no_recipe():
    with pytest.raises(RecipeError, match="/dev/zero: has more than"):
        recipe_file.load(Path("/dev/zero"))


def test_a_few_aliases_are_fine(tmp_path):
    (tmp_path / "recipe.yaml").write_text("experts: {lr: &lr 0.02, classifier_lr: *lr}\n")
    assert recipe_file.load(tmp_path / "recipe.yaml").experts.classifier_lr == 0.02


def test_a_value_is_shown_in_brief():
    with pytest.raises(RecipeError) as raised:
        recipe_file.from_document({"ipc": ["x" * 80] * 1000})
    assert len(str(raised.value)) < 300
