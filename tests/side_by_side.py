"""Every test, in two processes side by side: those in tests/slurm and of the documents mostly wait, the others compute.

python tests/side_by_side.py          # the second's output comes when the first has ended

Some tests measure seconds, and the other half may take them. Up to five that failed are run again, alone and named:
a test that fails then has failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest")
SECOND = (
    "tests/slurm",
    "tests/test_docs.py",
    "tests/parallel",
    "tests/journey/test_newcomer.py",
    "tests/campaign",
)
MOST_AGAIN = 5  # more is a fault of the code, not of the clock
SOME_FAILED = 1  # pytest's exit code for that


def main() -> int:
    """0 if every test passed, in its half or alone; otherwise pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / name for name in ("first.xml", "second.xml")]
        codes = halves(reports)
        failed = [test for report in reports if report.exists() for test in failures(report)]
    worst = next((code for code in codes if code > SOME_FAILED), max(codes))
    if worst != SOME_FAILED or not 0 < len(failed) <= MOST_AGAIN:
        return worst
    print(f"run again, alone: {', '.join(failed)}", flush=True)
    return subprocess.run([*PYTEST, *failed], cwd=ROOT, check=False).returncode


def halves(reports: list[Path]) -> list[int]:
    """Run both; their exit codes. Each writes a report in JUnit's format."""
    with tempfile.TemporaryFile("w+") as log:
        second_half = [*PYTEST, f"--junit-xml={reports[1]}", *SECOND]
        second = subprocess.Popen(second_half, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            ignored = [f"--ignore={path}" for path in SECOND]
            first = subprocess.run([*PYTEST, f"--junit-xml={reports[0]}", *ignored], cwd=ROOT, check=False)
            return [first.returncode, second.wait()]
        except KeyboardInterrupt:
            second.wait()  # it got the same Ctrl-C, and takes its SLURM down
            raise
        finally:
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
