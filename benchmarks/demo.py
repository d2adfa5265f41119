"""The demo: LAD with feature regression on digits-LT, IPC 2, beside DATM, the sets both started from, random real images
with soft and hard labels, and the whole long-tailed set, from one buffer of experts.

python benchmarks/demo.py [--out runs/demo]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out: Path = parser.parse_args().out
    began = time.monotonic()
    shared = ["--buffers", str(out / "buffers")]
    commands = [
        ["run", "digits-lt", "--out", str(out / "lad"), *shared],
        [
            "run",
            "digits-lt-matching",
            "--out",
            str(out / "datm"),
            *shared,
            "--set",
            "method=datm",
            "--set",
            "evaluate.baselines=[initial]",
        ],
        ["compare", str(out / "lad"), str(out / "datm")],
    ]
    for command in commands:
        print(f"\n$ lad-dist {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "lad_dist.cli", *command], check=False)
        if done.returncode:
            return done.returncode
    page = (out / "lad" / "report" / "index.html").resolve()
    print(f"\nThe demo took {time.monotonic() - began:.0f} s. Open the report: file://{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
