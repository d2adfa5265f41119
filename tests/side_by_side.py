"""Every test, in two processes side by side: tests of SLURM and of the documents mostly wait, the others compute.

python tests/side_by_side.py          # the second's output comes when the first has ended

Some tests measure seconds, which the other processes may take. Up to five that failed are run again, alone and named:
a test that fails then has failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest")
# The first process runs what no other has. With a third, the cores were as busy and tests that measure seconds failed.
OTHERS = (("tests/slurm", "tests/test_docs.py", "tests/parallel", "tests/evaluate", "tests/journey/test_newcomer.py"),)
MOST_AGAIN = 5  # more is a fault of the code, not of the clock
SOME_FAILED = 1  # pytest's exit code for that


def main() -> int:
    """0 if every test passed, beside others or alone; otherwise pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{number}.xml" for number in range(len(OTHERS) + 1)]
        codes = side_by_side(reports)
        failed = [test for report in reports if report.exists() for test in failures(report)]
    worst = next((code for code in codes if code > SOME_FAILED), max(codes))
    if worst != SOME_FAILED or not 0 < len(failed) <= MOST_AGAIN:
        return worst
    print(f"run again, alone: {', '.join(failed)}", flush=True)
    return subprocess.run([*PYTEST, *failed], cwd=ROOT, check=False).returncode


def side_by_side(reports: list[Path]) -> list[int]:
    """Run all processes; their exit codes. Each writes a report in JUnit's format."""
    ignored = [f"--ignore={path}" for paths in OTHERS for path in paths]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in OTHERS]
        others = [
            subprocess.Popen([*PYTEST, f"--junit-xml={report}", *paths], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            for paths, report, log in zip(OTHERS, reports[1:], logs, strict=True)
        ]
        try:
            first = subprocess.run([*PYTEST, f"--junit-xml={reports[0]}", *ignored], cwd=ROOT, check=False)
            return [first.returncode, *(other.wait() for other in others)]
        except KeyboardInterrupt:
            for other in others:  # they got the same Ctrl-C, and one takes its SLURM down
                other.wait()
            raise
        finally:
            for log in logs:
                log.seek(0)
                print(log.read(), flush=True)


def failures(report: Path) -> list[str]:
    """The tests that a report names as failed, in error or not set up, as pytest takes them on the command line."""
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
    return list(dict.fromkeys(failed))


if __name__ == "__main__":
    sys.exit(main())
