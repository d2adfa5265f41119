"""results.json: rows that are replaced, not repeated, and their summary."""

from __future__ import annotations

import json

import pytest

from lad_dist import results
from lad_dist.errors import RunDirError


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
    distilled, random = results.summary(rows)
    assert (distilled["source"], distilled["seeds"], distilled["selection"]) == ("distilled", 3, "last")
    assert distilled["overall"] == pytest.approx(0.7) and distilled["overall_std"] == pytest.approx(0.2)  # over n - 1
    assert distilled["head"] == pytest.approx(0.8) and distilled["tail"] is None and distilled["tail_std"] is None
    assert random["overall"] == 0.4 and random["overall_std"] is None
