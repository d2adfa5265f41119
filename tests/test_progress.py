"""Events on disk, and what people see."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.console import Console

from lad_dist import progress
from lad_dist.progress import Events, Screen, read_events


def test_events_are_read_as_they_were_written(tmp_path):
    events = Events(tmp_path / "e.jsonl")
    events.emit("a", number=1, text="ü", list=[1, 2])
    events.emit("b")
    assert [e["kind"] for e in read_events(tmp_path / "e.jsonl")] == ["a", "b"], "without closing"
    events.close()
    first = next(read_events(tmp_path / "e.jsonl"))
    assert first["number"] == 1 and first["text"] == "ü" and first["time"] > 1e9


def test_numbers_that_json_lacks_become_null(tmp_path):
    events = Events(tmp_path / "e.jsonl")
    events.emit("a", loss=math.nan, many=[1.0, math.inf], nested=((math.nan,),))
    events.close()
    record = json.loads((tmp_path / "e.jsonl").read_text(), parse_constant=pytest.fail)
    assert (record["loss"], record["many"], record["nested"]) == (None, [1.0, None], [[None]])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_by_a_kill_is_skipped(tmp_path, cut):
    path = tmp_path / "e.jsonl"
    events = Events(path)
    for i in range(3):
        events.emit("a", i=i)
    events.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Events(path)
    again.emit("a", i=3)
    again.close()
    found = [e["i"] for e in read_events(path)]
    assert found in ([0, 1, 3], [0, 1, 2, 3]) and (cut == 1) == (len(found) == 4)


def test_lines_that_are_no_events_are_skipped(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b'[1]\n\n{"x": 1}\n\xff\n{"kind": "a"}\n"text"\n')
    assert list(read_events(tmp_path / "e.jsonl")) == [{"kind": "a"}]
    assert list(read_events(tmp_path / "none.jsonl")) == []


def screen(terminal: bool, encoding: str = "utf-8", width: int = 100) -> tuple[Screen, io.BytesIO]:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding=encoding, errors="replace", write_through=True)
    return Screen(Console(file=text, force_terminal=terminal, highlight=False, width=width)), raw


def test_plain_lines_say_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown, raw = screen(terminal=False)
    with shown.task("experts", 100, "epochs", done=50) as task:
        for _ in range(40):
            now[0] += 1.0
            task.advance(1, loss=0.25, expert=3)
    lines = raw.getvalue().decode().splitlines()
    assert lines[0] == "experts: 60/100 epochs, 1.0/s, 0:40 left  loss 0.25  expert 3"
    assert len(lines) == 5 and lines[-1].startswith("experts: 90/100 epochs done in 0:40")


@pytest.mark.parametrize("width", [1, 10, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_live_view_needs_no_special_terminal(encoding, width):
    shown, raw = screen(terminal=True, encoding=encoding, width=width)
    with shown.task("distill", 3, "iterations") as task:
        task.advance(2, alpha=0.01)
        shown.say("a line in between")
        task.advance(1)
    assert raw.getvalue()


def test_a_narrow_live_view_cuts_the_figures_only():
    shown, raw = screen(terminal=True, width=80)
    with shown.task("evaluate distilled", 5000, "iterations") as task:
        task.advance(4321, loss_representation=0.1234, loss_classifier=0.4321, alpha=0.01, images_per_second=12345.0)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode())
    assert "evaluate distilled" in text and "4321/5000 iterations" in text and "loss representation 0.1234" in text


def test_what_is_said_is_never_read_as_markup():
    shown, raw = screen(terminal=False)
    shown.say("[/tmp/x] :smile: [bold]x[/nope]")
    assert raw.getvalue().decode() == "[/tmp/x] :smile: [bold]x[/nope]\n"


def test_long_lines_are_not_broken():
    shown, raw = screen(terminal=False, width=20)
    shown.say("x" * 100)
    assert raw.getvalue().decode() == "x" * 100 + "\n"


def test_peak_memory_is_of_this_process():
    assert progress.peak_memory_bytes()["host"] > 10_000_000
