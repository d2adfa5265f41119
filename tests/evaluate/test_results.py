"""results.json: rows that are replaced, not repeated, and their summary."""

from __future__ import annotations

import json
import random
import re

import pytest

from lad_dist import results
from lad_dist.errors import RunDirError
from lad_dist.report import tables


def row(source: str = "distilled", seed: int = 0, overall: float = 0.5, **fields) -> results.Row:
    return {"source": source, "architecture": "convnet", "seed": seed, "split": "test", "settings": {"epochs": 3},
            "set_id": "abc", "selection": "last", "method": "lad", "overall": overall, "head": overall + 0.1,
            "medium": overall, "tail": None, **fields}  # fmt: skip


def test_written_and_read(tmp_path):
    path = tmp_path / "evaluation" / "results.json"
    assert results.read(path) == []
    results.write(path, [row(), row(seed=1)])
    assert results.read(path) == [row(), row(seed=1)]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"rows": 3}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(RunDirError, match=r"results\.json: is not a results file"):
        results.read(path)


IMPOSSIBLE = [{"overall": 1.5}, {"overall": -0.1}, {"overall": None}, {"overall": "0.9"}, {"overall": True}, {"head": [0.5]},
              {"tail": 1e9}, {"ece": 2}, {"balanced": "x"}, {"seed": "0"}, {"seed": -1}, {"seed": 0.5}, {"source": None},
              {"architecture": 3}, {"split": 3}, {"per_class": [0.5, 7]}, {"per_class": 0.5}]  # fmt: skip


@pytest.mark.parametrize("changed", IMPOSSIBLE, ids=str)
def test_impossible_rows_are_refused_with_the_name_of_their_file(tmp_path, changed):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [row() | changed]}))
    with pytest.raises(
        RunDirError, match=rf"results\.json: is not a results file \({next(iter(changed))} is .*valid: "
    ):
        results.read(path)
    path.unlink()
    file = results.row_file(path, row())
    file.parent.mkdir()
    file.write_text(json.dumps(row() | changed))
    with pytest.raises(
        RunDirError, match=rf"distilled-convnet-0\.json: is not a row of results \({next(iter(changed))} is "
    ):
        results.read(path)


@pytest.mark.parametrize("text", [
    "3", "[]", '"x"', "{}", '{"source": "x"}', "NaN", "[" * 100_000,
    json.dumps(row() | {"overall": float("nan")}), json.dumps(row() | {"train_loss": float("inf")}),
])  # fmt: skip
def test_a_file_that_is_no_row(tmp_path, text):
    file = results.row_file(tmp_path / "results.json", row())
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(RunDirError, match=r"distilled-convnet-0\.json: is not a row of results \("):
        results.read(tmp_path / "results.json")


def test_no_flipped_bit_in_results_passes(tmp_path):
    path, draws = tmp_path / "results.json", random.Random(0)
    measured = row(fingerprints={"train": "a" * 64, "test": "b" * 64}, settings={"epochs": 3, "lr": 0.0123})
    results.put(path, measured)
    results.write(tmp_path / "alone" / "results.json", [measured])
    for file, asked in ((results.row_file(path, measured), path), (tmp_path / "alone" / "results.json",) * 2):
        assert results.read(asked) == [measured]
        good = file.read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << draws.randrange(8)
            file.write_bytes(bad)
            try:
                assert results.read(asked) == [measured]  # of space between two values, say
            except RunDirError as error:
                assert str(file) in str(error)
        file.write_bytes(good)


def test_rows_of_other_images_are_measured_again_and_never_averaged():
    before, after = ({"train": "a", "test": test} for test in ("b", "c"))
    assert not results.same_measurement(row(fingerprints=before), row(fingerprints=after))
    assert results.same_measurement(row(fingerprints=before), row(fingerprints=before))
    assert results.same_measurement(row(), row(fingerprints=after))  # of a version that did not say
    rows = [row(seed=s, overall=0.1 * s, fingerprints=before if s < 3 else after) for s in range(5)]
    old, new = results.summary(rows)
    assert (old["seeds"], new["seeds"]) == (3, 2) and new["overall"] == pytest.approx(0.35)
    assert old["images"] is None and f"on images {new['images']}" in tables.source_title(new)  # the first needs no name
    assert "images" not in tables.source_title(old)
    assert [len(of.seeds) for of in tables.result_lines([old, new])] == [1, 1]
    (one,) = results.summary(rows[:3])
    assert one["images"] is None and "images" not in tables.source_title(one)


def test_a_new_row_takes_the_place_of_the_old():
    rows = [row(), row(seed=1), row("random")]
    changed = results.replace(rows, row(overall=0.9, settings={"epochs": 5}))
    assert len(changed) == 3
    assert [r["overall"] for r in changed if (r["source"], r["seed"]) == ("distilled", 0)] == [0.9]
    assert len(results.replace(rows, row(seed=2))) == 4


@pytest.mark.parametrize("changed", [{"split": "validation"}, {"settings": {"epochs": 4}}, {"set_id": "x"}, {"seed": 1},
                                     {"source": "random"}, {"architecture": "vgg"}])  # fmt: skip
def test_what_makes_a_measurement_another(changed):
    assert results.same_measurement(row(), row() | {"overall": 0.1, "seconds": 4})
    assert not results.same_measurement(row(), row() | changed)


def test_settings_compare_equal_after_json():
    planned = row(settings={"lr": 0.05, "augment": {"operations": ["crop"], "scale": 1.1}})
    assert results.same_measurement(json.loads(json.dumps(planned)), planned)


def test_summary_by_hand():
    rows = [row(overall=0.5), row(seed=1, overall=0.7), row("random", overall=0.4), row(seed=2, overall=0.9)]
    distilled, other = results.summary(rows)
    assert (distilled["source"], distilled["seeds"], distilled["selection"]) == ("distilled", 3, "last")
    assert distilled["overall"] == pytest.approx(0.7) and distilled["overall_std"] == pytest.approx(0.2)  # over n - 1
    assert distilled["head"] == pytest.approx(0.8) and distilled["tail"] is None and distilled["tail_std"] is None
    assert other["overall"] == 0.4 and other["overall_std"] is None


def test_standard_error_and_figures_that_older_rows_lack():
    entry = results.summary([row(overall=0.5, ece=0.1), row(seed=1, overall=0.7), row(seed=2, overall=0.9)])[0]
    assert entry["overall_sem"] == pytest.approx(0.2 / 3**0.5)
    assert entry["ece"] == 0.1 and entry["ece_std"] is None and entry["ece_sem"] is None
    assert entry["balanced"] is None


# --- one file per row -------------------------------------------------------------------------------------------------


def test_rows_are_files_and_the_table_is_merged_from_them(tmp_path):
    path = tmp_path / "evaluation" / "results.json"
    full, second = row("full"), row(seed=1, confusion=[[1, 0], [0, 1]])
    files = [results.put(path, r) for r in (full, second, row())]
    assert [f.name for f in files] == ["full-convnet-0.json", "distilled-convnet-1.json", "distilled-convnet-0.json"]
    assert results.read(path) == [row(), second, full]  # sources in the order of tables, then seeds
    assert not path.exists()
    assert results.merge(path) == [row(), second, full]
    assert json.loads(path.read_text())["rows"] == [row(), row(seed=1), full]  # without the confusion matrix
    assert results.read(path)[1] == second
    stamp = path.stat().st_mtime_ns
    results.merge(path)
    assert path.stat().st_mtime_ns == stamp


def test_a_row_takes_the_place_of_the_older_one_also_in_the_table(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, [row(overall=0.1), row("random", overall=0.2)])  # of an older run, without row files
    results.put(path, row(overall=0.9))
    assert [r["overall"] for r in results.read(path)] == [0.9, 0.2]
    results.merge(path)
    assert [r["overall"] for r in json.loads(path.read_text())["rows"]] == [0.9, 0.2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": "full"}'])
def test_a_damaged_row_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    results.put(path, row()).write_text(text)
    with pytest.raises(RunDirError, match=r"distilled-convnet-0\.json: is not a row of results"):
        results.read(path)


def test_rows_that_are_being_written_are_not_read(tmp_path):
    path = tmp_path / "results.json"
    results.put(path, row())
    (results.rows_folder(path) / ".tmp-host-1-x.json").write_text("{")
    assert results.read(path) == [row()]


def test_names_are_safe(tmp_path):
    path = tmp_path / "results.json"
    file = results.put(path, row("../a b", architecture="x/y"))
    assert file.parent == results.rows_folder(path)
    assert re.fullmatch(r"_a_b_[0-9a-f]{8}-x_y_[0-9a-f]{8}-0\.json", file.name)  # "x:y" is another one


def test_two_processes_that_merge_at_the_same_time_lose_nothing(tmp_path, monkeypatch):
    """The second row is published after the first process has read, and before it writes."""
    path, original = tmp_path / "results.json", results.write
    results.put(path, row())

    def write(where, rows):
        monkeypatch.setattr(results, "write", original)
        results.put(path, row(seed=1))
        results.merge(path)
        original(where, rows)

    monkeypatch.setattr(results, "write", write)
    results.merge(path)
    assert [r["seed"] for r in json.loads(path.read_text())["rows"]] == [0, 1]


def test_a_row_under_another_row_s_name_is_refused(tmp_path):
    path = tmp_path / "results.json"
    file = results.put(path, row())
    file.rename(file.with_name("random-convnet-0.json"))
    with pytest.raises(RunDirError, match=r"random-convnet-0\.json: is the row of distilled-convnet-0\.json"):
        results.read(path)


@pytest.mark.parametrize("merged", [False, True])
def test_a_row_of_a_run_of_another_seed_is_refused(tmp_path, merged):
    path = tmp_path / "results.json"
    own = [row(seed=seed, recipe_seed=0) for seed in range(3)]
    for each in own:
        results.put(path, each)
    assert results.read(path) == own
    strange = row("random", recipe_seed=1)
    if merged:
        results.write(path, [strange])
    else:
        results.put(path, strange)
    where = r"results\.json" if merged else r"random-convnet-0\.json"
    with pytest.raises(
        RunDirError, match=where + ": holds the row of a run of seed 1, while other rows of this run are of seed 0"
    ):
        results.read(path)
