"""Every test, in two processes side by side: those in tests/slurm and of the documents mostly wait, the others compute.

python tests/side_by_side.py          # the second's output comes when the first has ended
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECOND = (
    "tests/slurm",
    "tests/test_docs.py",
    "tests/parallel",
    "tests/journey/test_newcomer.py",
    "tests/campaign",
)


def main() -> int:
    """The exit code of whichever failed, 0 if neither did."""
    pytest = [sys.executable, "-m", "pytest"]
    with tempfile.TemporaryFile("w+") as log:
        second = subprocess.Popen([*pytest, *SECOND], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            ignored = [f"--ignore={path}" for path in SECOND]
            codes = [subprocess.run([*pytest, *ignored], cwd=ROOT, check=False).returncode, second.wait()]
        except KeyboardInterrupt:
            second.wait()  # it got the same Ctrl-C, and takes its SLURM down
            raise
        finally:
            log.seek(0)
            print(log.read(), flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
