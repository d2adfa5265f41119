"""What failed beside other tests is run again alone, and only that; every process has tests that are there."""

from __future__ import annotations

import pytest

import tests.side_by_side as beside

ONCE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("word", ["a b", "c::d[e]"])
def test_second_time_only(word):
    mark = Path(__file__).with_name(f"seen-{len(word)}")
    there = mark.exists()
    mark.touch()
    assert there or word == "a b"
"""
NEVER = "def test_never():\n    assert False\n"
GOOD = "def test_good():\n    pass\n"


@pytest.mark.parametrize(
    ("first", "second", "code", "again"),
    [
        (GOOD, GOOD, 0, False),
        (ONCE, GOOD, 0, True),
        (GOOD, ONCE, 0, True),
        (NEVER, ONCE, 1, True),
        (NEVER * 1 + "".join(f"def test_{n}():\n    assert False\n" for n in range(6)), GOOD, 1, False),
        ("raise SystemExit(3)\n", GOOD, 3, False),
    ],
)
def test_what_is_run_again(tmp_path, monkeypatch, capfd, first, second, code, again):
    for folder, text in (("first", first), ("second", second), ("third", GOOD)):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(beside, "ROOT", tmp_path)
    monkeypatch.setattr(beside, "OTHERS", (("tests/second",), ("tests/third",)))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    assert (beside.main() != 0) == (code != 0)
    assert ("run again, alone" in capfd.readouterr().out) == again


def test_all_that_is_named_is_there():
    assert all((beside.ROOT / path).exists() for paths in beside.OTHERS for path in paths)
