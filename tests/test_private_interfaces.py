"""CONTRIBUTING.md lists every private interface of another package that the code uses."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(
    r"\b(ray\._private import \w+|ray\._private\.\w+|ray\._raylet|torch\._[A-Z]\w*\.\w+|numba\.core"
    r"|submitit\.core\.utils|submitit\.helpers|distributed_c10d\._\w+|SlurmExecutor\._\w+|_executor\._make_\w+)"
)


def used() -> set[tuple[str, str]]:
    found = set()
    for file in (ROOT / "lad_dist").rglob("*.py"):
        for line in file.read_text().splitlines():
            if line.lstrip().startswith("#"):
                continue
            for name in PRIVATE.findall(line):
                name = name.replace("ray._private import ", "ray._private.")
                found.add((file.relative_to(ROOT / "lad_dist").as_posix(), name))
    return found


def test_the_list_is_whole():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Private interfaces")[2]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \|", section, re.MULTILINE)
    listed = {(file, name) for file, names in rows for name in re.findall(r"`(.+?)`", names)}
    assert used() == listed
