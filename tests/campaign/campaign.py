"""Seeded bad input for every verb that reads something: recipes, options, image folders, list files, the files of a run.

    python -m tests.campaign.campaign --seed 0 --cases 300 --out FOLDER

A case damages one thing, runs one command in a forked process with a time limit, and gets a verdict:

    clear refusal         exit code above 0 and a message that names the file or field
    accepted              exit code 0 and the result of undamaged input, or a message that names what was damaged
    healed                as accepted, and the damaged file was replaced by a whole one
    unclear refusal       exit code above 0 and a message that names neither
    traceback, hang       a fault
    silent other result   a fault: exit code 0 and a result that differs from that of undamaged input
    executed code         a fault: a pickle's code ran

FOLDER/cases.jsonl gets a line per case as it ends; cases that are there already are skipped, so the command may be repeated
after a stop. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

VERDICTS = (
    "clear refusal",
    "accepted",
    "healed",
    "unclear refusal",
    "traceback",
    "hang",
    "silent other result",
    "executed code",
)
FAULTS = VERDICTS[3:]
MARKER = "code-was-executed"
MEMORY_BYTES = 16 * 2**30  # of address space for one case
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class Outcome:
    """What a command did: ``code`` is None after the time limit, negative where a signal ended it."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err


@dataclass(frozen=True)
class Attempt:
    """A case that is ready to run in its folder.

    ``named``: words of which a refusal must hold one. ``differs``: in what the outcome differs from that of undamaged input,
    empty where it does not. ``damaged``: the file whose replacement is a healing.
    """

    what: str
    command: list[str]
    named: tuple[str, ...]
    differs: Callable[[Outcome], str]
    damaged: Path | None = None


@dataclass(frozen=True)
class Record:
    """A line of cases.jsonl."""

    case: str
    kind: str
    what: str
    command: str
    verdict: str
    note: str
    seconds: float


def preload() -> None:
    """Import once what every forked case needs, with one thread: a fork keeps no threads."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        COLUMNS="160",
        NO_COLOR="1",
        TERM="dumb",
        RAY_USAGE_STATS_ENABLED="0",
    )
    import torch

    import lad_dist.cli
    import lad_dist.data.prepare
    import lad_dist.distill.loop
    import lad_dist.evaluate.measure
    import lad_dist.experts.train
    import lad_dist.launch.local
    import lad_dist.pipeline
    import lad_dist.report.page
    import lad_dist.status  # noqa: F401

    torch.set_num_threads(1)


def warm(folder: Path) -> None:
    """Run a tiny recipe in this process, so that its forks need not import or compile anything."""
    import yaml

    from lad_dist.cli import app
    from tests.campaign.kinds import HERE, RECIPE

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["run", str(folder / "job.yaml"), "--out", str(folder / "run"), "--fleet", "off", *HERE]
    with contextlib.redirect_stdout(None):
        try:
            app(command, prog_name="lad-dist")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"a run of the campaign's recipe: exit code {ended.code}") from None
    import torch.distributed.elastic.multiprocessing.api
    import torch.distributed.launcher.api  # noqa: F401


@dataclass
class Forked:
    """A running ``lad-dist`` in a forked process. ``pid`` is its process group and session, too."""

    pid: int
    out: Path
    err: Path
    began: float
    code: int | None = None

    def ended(self) -> bool:
        """Whether it has ended; ``code`` then says how."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def outcome(self, limit: float) -> Outcome:
        """What it did, ``limit`` seconds after its start at most: then its process group is killed."""
        while not self.ended() and time.monotonic() - self.began < limit:
            time.sleep(0.01)
        code = self.code
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in (self.out, self.err)]
        return Outcome(code, *texts, round(time.monotonic() - self.began, 2))


def start(
    command: list[str],
    folder: Path,
    streams: tuple[str, str] = (".out", ".err"),
    prepare: Callable[[], None] | None = None,
) -> Forked:
    """Start ``lad-dist COMMAND`` in a forked process in ``folder``, which calls ``prepare`` first."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err, began = folder / streams[0], folder / streams[1], time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _in_child(command, folder, out, err, prepare)
    return Forked(pid, out, err, began)


def call(command: list[str], folder: Path, limit: float) -> Outcome:
    """Run ``lad-dist COMMAND`` in a forked process in ``folder``; kill its process group after ``limit`` seconds."""
    return start(command, folder).outcome(limit)


def _in_child(command: list[str], folder: Path, out: Path, err: Path, prepare: Callable[[], None] | None) -> None:
    code = 70
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        os.chdir(folder)
        for stream, file in ((0, Path(os.devnull)), (1, out), (2, err)):
            handle = os.open(file, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(handle, "w", closefd=False)) for handle in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        if prepare is not None:
            prepare()
        from lad_dist.cli import app

        app(command, prog_name="lad-dist")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def judge(attempt: Attempt, outcome: Outcome, folder: Path, before: bytes | None) -> tuple[str, str]:
    """(verdict, note); ``before``: the content of the damaged file before the command."""
    lines = [line.strip() for line in outcome.text.splitlines() if line.strip()]
    last = " ".join(lines[-3:])[-300:]
    if any(folder.rglob(MARKER)):
        return "executed code", last
    if outcome.code is None:
        return "hang", last
    if outcome.code < 0 or outcome.code == 70 or "Traceback (most recent call last)" in outcome.text:
        return "traceback", last
    plain = " ".join(outcome.text.split())
    if outcome.code > 0:
        clear = ("error:" in plain or "Error" in plain) and any(word in plain for word in attempt.named)
        return ("clear refusal" if clear else "unclear refusal"), last
    different = attempt.differs(outcome)
    if different and not any(word in plain for word in attempt.named):
        return "silent other result", different[:300]
    if attempt.damaged is not None and _content(attempt.damaged) != before:
        return "healed", ""
    return "accepted", different[:300]


def _content(path: Path | None) -> bytes | None:
    """The bytes of a regular file, None for anything else."""
    if path is None or not path.is_file():
        return None
    try:
        return path.read_bytes()
    except PermissionError:
        return None


def case_names(kinds: Iterable[str], cases: int) -> list[tuple[str, int]]:
    """(kind, number) of all cases: the kinds take turns, so that any beginning holds all of them."""
    of = tuple(kinds)
    return [(of[i % len(of)], i // len(of)) for i in range(cases)]


def campaign(
    out: Path, seed: int, names: list[tuple[str, int]], limit: float, seconds: float | None = None
) -> list[Record]:
    """Run the cases that are not in ``out/cases.jsonl`` yet, for ``seconds`` at most; returns the records of all of them."""
    from tests.campaign import kinds

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    journal, until = out / "cases.jsonl", time.monotonic() + (seconds or float("inf"))
    there = {record.case: record for record in read(journal)}
    wanted = [f"{seed}-{kind}-{number:04d}" for kind, number in names]
    if all(name in there for name in wanted):
        return [there[name] for name in wanted]
    preload()
    warm(out / "warm")
    undamaged = kinds.Undamaged.made(out / f"undamaged-{seed}", limit)
    for name, (kind, number) in zip(wanted, names, strict=True):
        if name in there or time.monotonic() > until:
            continue
        folder = out / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        attempt = kinds.KINDS[kind](random.Random(f"{seed} {kind} {number}"), folder, undamaged)
        before = _content(attempt.damaged)
        outcome = call(attempt.command, folder, limit)
        verdict, note = judge(attempt, outcome, folder, before)
        shown = " ".join(attempt.command)[:200]
        record = Record(name, kind, attempt.what, shown, verdict, note, outcome.seconds)
        there[name] = record
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(record)) + "\n")
        if verdict in FAULTS:
            print(f"{name}: {verdict}: {attempt.what}: lad-dist {record.command}\n    {note}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # what shows a fault stays
    return [there[name] for name in wanted if name in there]


def read(journal: Path) -> list[Record]:
    """The records of earlier calls; a line that a stop has cut off counts for nothing."""
    records = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def table(records: list[Record]) -> str:
    """Counts by kind and verdict, as Markdown."""
    counts = Counter((record.kind, record.verdict) for record in records)
    kinds = list(dict.fromkeys(record.kind for record in records))
    rows = [["kind", *VERDICTS, "all"], ["---", *["--:"] * (len(VERDICTS) + 1)]]
    for kind in kinds:
        cells = [counts[kind, verdict] for verdict in VERDICTS]
        rows.append([kind, *map(str, cells), str(sum(cells))])
    cells = [sum(counts[kind, verdict] for kind in kinds) for verdict in VERDICTS]
    rows.append(["all", *map(str, cells), str(sum(cells))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Exit code 1 where a case ended in a fault."""
    from tests.campaign.kinds import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument(
        "--out", type=Path, required=True, help="gets cases.jsonl, and the folders of cases with faults"
    )
    parser.add_argument("--limit", type=float, default=120, help="seconds per case")
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds")
    parser.add_argument(
        "--kind", action="append", choices=sorted(KINDS), help="only cases of this kind; may be repeated"
    )
    asked = parser.parse_args()
    names = case_names(asked.kind or KINDS, asked.cases)
    records = campaign(asked.out, asked.seed, names, asked.limit, asked.seconds)
    print(table(records))
    return int(any(record.verdict in FAULTS for record in records))


if __name__ == "__main__":
    sys.exit(main())
