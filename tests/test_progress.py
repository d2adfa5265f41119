"""Events on disk, and what people see."""

from __future__ import annotations

import errno
import io
import json
import math
import re

import pytest
from rich.console import Console

from lad_dist import progress
from lad_dist.progress import Events, EventTail, Screen, read_events


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


def test_a_refused_write_names_the_file(tmp_path, monkeypatch):
    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")  # a write does not say of which file

    events = Events(tmp_path / "events.jsonl")
    monkeypatch.setattr(events, "_file", Full())
    with pytest.raises(OSError, match="No space left") as raised:
        events.emit("data")
    assert raised.value.filename == str(tmp_path / "events.jsonl")


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


# --- reading on -------------------------------------------------------------------------------------------------------


def numbers(tail: EventTail) -> tuple[bool, list[int]]:
    other, events = tail.read()
    return other, [e["i"] for e in events]


def line(i: int) -> bytes:
    return json.dumps({"kind": "a", "i": i}).encode() + b"\n"


def test_a_tail_reads_what_was_appended(tmp_path):
    path = tmp_path / "e.jsonl"
    tail = EventTail(path)
    assert numbers(tail) == (False, [])
    path.write_bytes(line(0) + line(1))
    assert numbers(tail) == (False, [0, 1])
    assert numbers(tail) == (False, [])
    with path.open("ab") as file:
        file.write(b"not an event\n\n" + line(2))
    assert numbers(tail) == (False, [2])


def test_a_tail_waits_for_the_rest_of_a_line(tmp_path):
    path = tmp_path / "e.jsonl"
    tail = EventTail(path)
    written = line(0) + line(1)
    for length in range(len(line(0)) + 1, len(written)):
        path.write_bytes(written[:length])
        assert numbers(tail)[1] == ([0] if length == len(line(0)) + 1 else [])
    path.write_bytes(written)
    assert numbers(tail) == (False, [1])


@pytest.mark.parametrize("other", [b"", line(7), line(7) + line(8), line(7) + line(8) + line(9)],
                         ids=["empty", "shorter", "as long", "longer"])  # fmt: skip
def test_a_tail_notices_another_file(tmp_path, other):
    path = tmp_path / "e.jsonl"
    path.write_bytes(line(0) + line(1))
    tail = EventTail(path)
    numbers(tail)
    path.write_bytes(other)
    assert numbers(tail) == (True, [7, 8, 9][: other.count(b"\n")])
    path.unlink()
    assert numbers(tail) == (other != b"", [])
    path.write_bytes(line(3))
    assert numbers(tail) == (False, [3])


def test_a_tail_reads_no_more_than_was_appended(tmp_path, monkeypatch):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"".join(line(i) for i in range(20_000)))
    tail = EventTail(path)
    numbers(tail)
    parsed = []
    monkeypatch.setattr(progress, "_event", lambda text: parsed.append(text))
    with path.open("ab") as file:
        file.write(line(1))
    assert numbers(tail) == (False, [])
    assert parsed == [line(1)]


# --- what people see --------------------------------------------------------------------------------------------------


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


def test_a_plain_board_says_the_whole_and_then_its_rows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown, raw = screen(terminal=False, width=30)
    with shown.board("experts", 100, "epochs", done=50) as board:
        board.row("expert 3", "classifier 4 of 30,\n loss 0.25")
        for _ in range(10):
            now[0] += 1.0
            board.advance()
        board.row("expert 4", "x" * 40)
        now[0] += 10.0
        board.row("expert 3", None)
        now[0] += 10.0
        board.advance(20)
        board.advance(20)
    assert raw.getvalue().decode().splitlines() == [
        "experts: 60/100 epochs, 1.0/s, 0:40 left",
        "  expert 3  classifier 4 of 30, loss 0.25",
        "experts: 60/100 epochs, 1.0/s, 0:30 left",  # ten seconds of the 40 have passed
        "  expert 4  " + "x" * 40,
        "experts: 80/100 epochs, 1.0/s, 0:20 left",
        "  expert 4  " + "x" * 40,
        "experts: 100/100 epochs done in 0:30",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_board_shows_twenty_rows(monkeypatch, terminal):
    now = [0.0]
    monkeypatch.setenv("LINES", "60")
    shown, raw = screen(terminal, width=60)
    if not terminal:
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with shown.board("experts", 100, "epochs") as board:
        for i in range(50):
            board.row(f"expert {i}", "at work " + "x" * 100)
        now[0] += progress.PLAIN_SECONDS
        board.advance(1)
        shown.say("a line in between")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode())
    assert "a line in between" in text and "1/100 epochs" in text
    assert "expert 18  at work" in text and "expert 19" not in text and "... and 31 more" in text
    if terminal:
        assert max(len(part) for part in re.split(r"[\r\n]+", text)) <= 60


@pytest.mark.parametrize("width", [1, 10, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_live_board_needs_no_special_terminal(encoding, width):
    shown, raw = screen(terminal=True, encoding=encoding, width=width)
    with shown.board("experts", 3, "epochs") as board:
        board.row("expert 0", "[/nope] Füße")
        board.advance(2)
        board.row("expert 0", None)
        board.row("expert 1", None)  # never had one
    assert raw.getvalue()


def test_a_live_board_removes_rows():
    shown, raw = screen(terminal=True)
    with shown.board("experts", 3, "epochs") as board:
        board.row("expert 0", "at work")
        board.row("expert 0", None)
        board.row("expert 1", "[bold]in brackets[/nope]")
    last = raw.getvalue().decode().rsplit("experts", 1)[-1]
    assert "[bold]in brackets[/nope]" in last and "expert 0" not in last


@pytest.fixture
def clocked(monkeypatch):
    """A clock that a list sets, and a rate of a task of which 2 steps were done before."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now, progress._Rate(done=2)


def counted(now: list[float], rate: progress._Rate, *seconds: float) -> list[str]:
    """Steps that took so long, one after the other; what is then said of 100."""
    for each in seconds:
        now[0] += each
        rate.count(1)
    return rate.words(100)


def test_the_time_left_counts_down_between_slow_steps(clocked):
    now, rate = clocked
    assert counted(now, rate, 500, 60, 60, 60) == ["60.0 s each", "1:34:00 left"]
    now[0] += 59
    assert rate.words(100) == ["60.0 s each", "1:33:01 left"]


def test_no_estimate_rests_on_the_start_or_on_few_steps(clocked):
    now, rate = clocked
    assert rate.words(100) == []
    assert counted(now, rate, 15.1) == counted(now, rate, 0.06, 0.06) == [], "15 s of start-up are no rate"
    assert counted(now, rate, *[0.06] * 30) == [], "of less than two seconds"
    assert counted(now, rate, *[0.06] * 7) == ["16.7/s", "0:03 left"]


def test_recent_steps_weigh_more(clocked):
    now, rate = clocked
    counted(now, rate, 5, *[2.0] * 10)
    (each, _) = counted(now, rate, *[0.5] * 40)
    assert each == "1.6/s", "the mean is 1.25, the present 2"


def test_steps_that_come_at_once(clocked):
    """As those of 8 experts of a fleet: nothing is said before the second round."""
    now, rate = clocked
    counted(now, rate, 12, *[0] * 7)
    assert rate.words(100) == []
    assert counted(now, rate, 10, *[0] * 7) == ["1.5/s", "0:55 left"]


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
