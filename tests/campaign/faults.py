"""Seeded faults at random moments of a run; then the same command again, which must end with the same bits.

    python -m tests.campaign.faults --seed 0 --out FOLDER
    python -m tests.campaign.faults --seed 0 --out FOLDER --process 20 --group 0 --store 0 --ranks 0 --fleet 0 --slurm 0

A case starts a run (or goes on with one whose earlier stages are done), waits until a stage is somewhere in its middle,
and does one thing to it: ``FAULTS`` names them for each way to launch a run. What ended is judged, the fault is undone,
and the same command is given again. In the end the digest of the buffer, the bytes of the distilled tensors, the teachers
and every accuracy must be those of a run that nothing happened to.

    unharmed             the disturbed command ended with exit code 0
    continued            it was killed, or ended with one clear error; the same command finished the run
    too late             it had ended before its fault came
    unclear error        a fault: another exit code, and no message that says why
    traceback, hang      a fault
    does not continue    a fault: the same command failed afterwards
    other result         a fault: a digest, a tensor, an accuracy, or the mode of a file differs
    left behind          a fault: temporary files stayed in the run folder

FOLDER/faults.jsonl gets a line per case as it ends; cases that are there already are skipped, so the command may be
repeated after a stop. The same seed makes the same cases; how far a stage is when its fault comes depends on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.campaign.campaign import Outcome, preload, warm
from tests.campaign.kinds import RECIPE

VERDICTS = (
    "unharmed",
    "continued",
    "too late",
    "unclear error",
    "traceback",
    "hang",
    "does not continue",
    "other result",
    "left behind",
)
WRONG = VERDICTS[3:]
STAGES = ("start", "experts", "distill", "evaluate", "report")
FAULTS: dict[str, tuple[str, ...]] = {
    "process": (
        "killed",
        "stopped, and another driver",
        "full disk",
        "file size limit",
        "read-only folder",
        "clock jump",
        "file times moved",
        "two drivers",
    ),
    "group": ("killed", "two drivers"),
    "store": ("slow store", "failing store", "store away", "killed", "two drivers"),
    "ranks": ("rank killed", "rank stopped", "killed", "two drivers", "file size limit"),
    "fleet": ("actor killed", "killed", "node lost", "actor stopped", "two drivers"),
    "slurm": (
        "job killed",
        "driver killed",
        "node daemon killed",
        "task cancelled",
        "controller killed",
        "two drivers",
    ),
}
COUNTS = {"process": 150, "group": 8, "store": 20, "ranks": 25, "fleet": 8, "slurm": 6}
AGAIN = 3  # how often the same command is given before a case counts as not continuing


@dataclass(frozen=True)
class Case:
    """One fault to be: ``moment`` and ``delay`` in [0, 1) say when within ``stage``; ``draw`` makes its other choices."""

    name: str
    launch: str
    fault: str
    stage: str
    moment: float
    delay: float
    draw: random.Random


@dataclass(frozen=True)
class Record:
    """A line of faults.jsonl."""

    case: str
    launch: str
    fault: str
    stage: str
    at: str
    verdict: str
    note: str
    codes: tuple[int | None, ...]
    seconds: float


class Running(Protocol):
    """A command that was started."""

    pid: int

    def ended(self) -> bool:
        """Whether it has ended."""

    def outcome(self, limit: float) -> Outcome:
        """How it ended; it is killed ``limit`` seconds after its start."""


class Launch(Protocol):
    """A way to launch the run in ``folder/run``.

    ``stages``: those that a fault may come in. ``continues``: a case may go on with a copy of the undisturbed run.
    ``umask``: that of its commands.
    """

    stages: tuple[str, ...]
    continues: bool
    umask: int

    def prepare(self, folder: Path, case: Case | None) -> None:
        """Write what the command needs beside the recipe."""

    def start(self, folder: Path, tag: str) -> Running:
        """Give the command, with its output in files named by ``tag``."""

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """Let the fault happen."""

    def digest(self, folder: Path) -> str:
        """The digest of the buffer."""


@dataclass
class Done:
    """A fault that happened: how, which other commands it started, and what undoes it."""

    what: str
    others: list[Running]
    undo: Callable[[], None] = lambda: None


def cases(seed: int, launch: str, count: int, stages: tuple[str, ...]) -> Iterator[Case]:
    """The faults of a launch take turns, so that any beginning holds all of them."""
    for number in range(count):
        draw = random.Random(f"{seed} {launch} {number}")
        fault = FAULTS[launch][number % len(FAULTS[launch])]
        stage = draw.choice(stages)
        yield Case(f"{seed}-{launch}-{number:04d}", launch, fault, stage, draw.random(), draw.random(), draw)


# ------------------------------------------------------------------------------------------------------------ the undisturbed


@dataclass(frozen=True)
class Undisturbed:
    """A finished run in ``folder/run``, what came of it, and the pace of its stages."""

    folder: Path
    result: dict[str, str]
    events: dict[str, int]
    seconds: dict[str, float]

    @classmethod
    def made(cls, folder: Path, launch: Launch, limit: float) -> Undisturbed:
        """What is there, or made now. Raises RuntimeError where the command fails."""
        said = folder / "undisturbed.json"
        if not said.exists():
            shutil.rmtree(folder, ignore_errors=True)
            begin(folder)
            launch.prepare(folder, None)
            outcome = launch.start(folder, "1").outcome(10 * limit)
            if outcome.code != 0:
                raise RuntimeError(f"an undisturbed run: {outcome.code}\n{outcome.text}")
            counts, seconds = pace(events(folder / "run"))
            document = {"result": result(folder, launch), "events": counts, "seconds": seconds}
            said.write_text(json.dumps(document))
        return cls(folder, **json.loads(said.read_text()))


def begin(folder: Path) -> None:
    """A new folder with the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(RECIPE))


def events(run: Path) -> list[dict[str, Any]]:
    """The whole lines of the log."""
    file = run / "events.jsonl"
    if not file.exists():
        return []
    found = []
    for line in file.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def stage_of(name: str) -> str:
    """``evaluate`` of ``evaluate random``."""
    return name.split()[0]


def pace(happened: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, float]]:
    """How many events each stage has, and its seconds; ``start`` is what comes before the first stage."""
    counts, seconds, stage = Counter[str](), Counter[str](), "start"
    for event, after in zip(happened, [*happened[1:], happened[-1]], strict=True):
        if event["kind"] == "stage-started":
            stage = stage_of(event["stage"])
        counts[stage] += 1
        seconds[stage] += max(0.0, after["time"] - event["time"])
    return dict(counts), {stage: round(value, 3) for stage, value in seconds.items()}


def in_stage(happened: list[dict[str, Any]], stage: str) -> int:
    """How many events of a stage there are."""
    return pace(happened)[0].get(stage, 0) if happened else 0


def result(folder: Path, launch: Launch) -> dict[str, str]:
    """What must not differ by a bit."""
    run = folder / "run"
    found = {"digest": launch.digest(folder)}
    for name in ("tensors", "teachers"):
        found[name] = hashlib.sha256((run / "distilled" / f"{name}.safetensors").read_bytes()).hexdigest()
    rows = json.loads((run / "evaluation" / "results.json").read_text())["rows"]
    found["accuracies"] = json.dumps([[row["source"], row["seed"], row["per_class"]] for row in rows])
    found["report"] = str((run / "report" / "index.html").exists())
    found["modes"] = json.dumps(other_modes(run, launch.umask)[:5])
    return found


def other_modes(run: Path, umask: int) -> list[str]:
    """The files and folders whose mode is not what the umask says."""
    return [
        f"{path.relative_to(run)}: {mode:o}"
        for path in (run, *sorted(run.rglob("*")))
        if not path.is_symlink()
        and (mode := path.stat().st_mode & 0o777) != (0o777 if path.is_dir() else 0o666) & ~umask
        and "slurm" not in path.relative_to(run).parts  # submitit's scripts and SLURM's logs have modes of their own
    ]


def copy_before(stage: str, undisturbed: Path, folder: Path) -> None:
    """The run as it is before ``stage``, if it does not begin with nothing."""
    if stage in ("start", "experts"):
        return
    later = {"distill": ("checkpoints", "distilled", "evaluation", "report"), "evaluate": ("evaluation", "report")}
    gone = (*later.get(stage, ("report",)), "events.jsonl", "claims", "slurm")
    shutil.copytree(
        undisturbed / "run",
        folder / "run",
        symlinks=True,
        dirs_exist_ok=True,
        ignore=lambda where, names: [n for n in names if n in gone] if Path(where) == undisturbed / "run" else [],
    )


# ------------------------------------------------------------------------------------------------------------------ one case


def carry_out(case: Case, folder: Path, launch: Launch, undisturbed: Undisturbed, limit: float) -> Record:
    """Run, disturb, judge, run again, compare."""
    began = time.monotonic()
    begin(folder)
    launch.prepare(folder, case)
    if launch.continues:
        copy_before(case.stage, undisturbed.folder, folder)
    first = launch.start(folder, "1")
    met = wait_for_moment(case, folder / "run", first, undisturbed, limit)
    at = f"{case.stage}, event {in_stage(events(folder / 'run'), case.stage)}"
    done = launch.do(case, folder, first) if met else Done("nothing: it had ended", [])
    outcomes = []
    try:
        outcomes = [running.outcome(limit) for running in (first, *done.others)]
    finally:
        done.undo()
    verdict, note = judge_first(outcomes, done)
    if verdict not in WRONG:
        verdict, note = continued(folder, launch, undisturbed, limit, outcomes, verdict if met else "too late")
    codes = tuple(outcome.code for outcome in outcomes)
    what = f"{done.what}; {note}" if note else done.what
    seconds = round(time.monotonic() - began, 1)
    return Record(case.name, case.launch, case.fault, case.stage, at, verdict, what, codes, seconds)


def wait_for_moment(case: Case, run: Path, first: Running, undisturbed: Undisturbed, limit: float) -> bool:
    """Until the stage has had its share of events, and a part of an event's time more; False if all ended before."""
    count, until = undisturbed.events.get(case.stage, 1), time.monotonic() + limit
    wanted = 0 if case.stage == "start" else 1 + int(case.moment * max(1, count - 1))
    each = undisturbed.seconds.get(case.stage, 0.5) / count if case.stage != "start" else 0.5
    while in_stage(events(run), case.stage) < wanted:
        if first.ended() or time.monotonic() > until:
            return False
        time.sleep(0.003)
    time.sleep(case.delay * min(each, 2.0))
    return not first.ended()


def judge_first(outcomes: list[Outcome], done: Done) -> tuple[str, str]:
    """(verdict, note) on how the disturbed commands ended."""
    for outcome in outcomes:
        last = " ".join(outcome.text.split())[-300:]
        if outcome.code is None:
            return "hang", last
        if outcome.code == 70 or "Traceback (most recent call last)" in outcome.text:
            return "traceback", last
        clear = "error: " in outcome.err and outcome.err.count("error: ") == 1
        if outcome.code > 0 and not clear:
            return "unclear error", last
        if outcome.code < 0 and "killed" not in done.what:
            return "unclear error", f"ended by signal {-outcome.code}: {last}"
    return ("unharmed" if outcomes[0].code == 0 else "continued"), ""


def continued(
    folder: Path, launch: Launch, undisturbed: Undisturbed, limit: float, outcomes: list[Outcome], so_far: str
) -> tuple[str, str]:
    """Give the same command again and compare; (verdict, note)."""
    for attempt in range(AGAIN):
        outcome = launch.start(folder, f"again-{attempt}").outcome(limit)
        outcomes.append(outcome)
        if outcome.code == 0 or outcome.code is None:
            break
    last = " ".join(outcome.text.split())[-300:]
    if outcome.code is None:
        return "hang", f"the same command: {last}"
    if any("Traceback (most recent call last)" in each.text for each in outcomes):
        return "traceback", last
    if outcome.code != 0:
        return "does not continue", last
    found = result(folder, launch)
    expected = {**undisturbed.result, "modes": "[]"}
    other = [name for name in found if found[name] != expected[name]]
    if other:
        return "other result", ", ".join(other)
    hidden = (p for p in (folder / "run").rglob(".*") if not p.name.startswith(".submission_file_"))  # submitit's links
    left = sorted(str(p.relative_to(folder)) for p in hidden)
    if left:
        return "left behind", ", ".join(left)[:300]
    said = [line for each in outcomes for line in each.err.splitlines() if line.startswith("error: ")]
    return so_far, said[0][:200] if said else ""


# ------------------------------------------------------------------------------------------------------------------ all cases


def campaign(
    out: Path, seed: int, counts: dict[str, int], limit: float, seconds: float | None = None, only: str | None = None
) -> list[Record]:
    """Run the cases that are not in ``out/faults.jsonl`` yet, for ``seconds`` at most; returns the records of all of them."""
    from tests.campaign import launches

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    journal, until = out / "faults.jsonl", time.monotonic() + (seconds or float("inf"))
    there, wanted = {record.case: record for record in read(journal)}, []
    preload()
    warm(out / "warm")
    for name, count in counts.items():
        if not count:
            continue
        stages = launches.STAGES_OF.get(name, STAGES)
        all_of_it = [case for case in cases(seed, name, count, stages) if only in (None, case.fault)]
        wanted += [case.name for case in all_of_it]
        left = [case for case in all_of_it if case.name not in there]
        if not left:
            continue
        with launches.opened(name, out) as launch:
            undisturbed = Undisturbed.made(out / f"undisturbed-{name}", launch, limit)
            for case in left:
                if time.monotonic() > until:
                    break
                folder = out / "cases" / case.name
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    record = carry_out(case, folder, launch, undisturbed, limit)
                finally:
                    launches.unmount(folder)
                there[case.name] = record
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(vars(record)) + "\n")
                if record.verdict in WRONG:
                    print(
                        f"{record.case}: {record.verdict}: {record.fault}, {record.at}\n    {record.note}", flush=True
                    )
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # what shows a fault stays
    return [there[name] for name in wanted if name in there]


def read(journal: Path) -> list[Record]:
    """The records of earlier calls; a line that a stop has cut off counts for nothing."""
    records = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            document = json.loads(line)
            records.append(Record(**{**document, "codes": tuple(document["codes"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return records


def table(records: list[Record]) -> str:
    """Counts by launch, fault and verdict, as Markdown."""
    counts = Counter((record.launch, record.fault, record.verdict) for record in records)
    kinds = list(dict.fromkeys((record.launch, record.fault) for record in records))
    rows = [["launch", "fault", *VERDICTS, "all"], ["---", "---", *["--:"] * (len(VERDICTS) + 1)]]
    for launch, fault in sorted(kinds, key=lambda kind: (list(FAULTS).index(kind[0]), kind[1])):
        cells = [counts[launch, fault, verdict] for verdict in VERDICTS]
        rows.append([launch, fault, *map(str, cells), str(sum(cells))])
    cells = [sum(counts[*kind, verdict] for kind in kinds) for verdict in VERDICTS]
    rows.append(["all", "", *map(str, cells), str(sum(cells))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Exit code 1 where a case ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"cases of this launch; default: {count}")
    parser.add_argument("--out", type=Path, required=True, help="gets faults.jsonl, and the folders of wrong cases")
    parser.add_argument("--limit", type=float, default=240, help="seconds per command")
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds")
    parser.add_argument("--fault", help="only cases of this fault")
    asked = parser.parse_args()
    counts = {name: getattr(asked, name) for name in COUNTS}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))  # so that servers end, too
    records = campaign(asked.out, asked.seed, counts, asked.limit, asked.seconds, asked.fault)
    print(table(records))
    return int(any(record.verdict in WRONG for record in records))


if __name__ == "__main__":
    sys.exit(main())
