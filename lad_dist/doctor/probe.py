"""The doctor's job on a compute node: ``python -m lad_dist.doctor.probe FOLDER``.

Reads FOLDER/asked.json and answers in FOLDER/answer.json, published by rename. Imports as little as possible: that
torch or lad_dist itself cannot be imported is an answer, too.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

ASKED, ANSWER = "asked.json", "answer.json"


def answer(folder: Path) -> dict[str, Any]:
    """Return the answer. Raises OSError or ValueError if the question cannot be read."""
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    from lad_dist import __version__

    found: dict[str, Any] = {
        "token": asked["token"],
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "time": time.time(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "lad_dist": __version__,
    }
    try:
        import torch

        found |= {"torch": torch.__version__, "gpus": torch.cuda.device_count()}
    except ImportError as error:
        found["error"] = f"torch cannot be imported: {error}"
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        text = json.dumps(answer(folder))
    except (OSError, ValueError) as error:
        sys.exit(f"error: the folder {folder} is not the same here: {error}")
    temporary = folder / f".{ANSWER}.part"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / ANSWER)


if __name__ == "__main__":
    main()
