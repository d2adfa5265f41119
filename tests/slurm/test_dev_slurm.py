"""The SLURM of cluster/dev-slurm, which every developer may start: nobody else's business."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm]
LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it
LISTENS = "0A"


def test_its_daemons_listen_on_this_machine_only(slurm):
    """The controller and both nodes; with authentication by nothing, who reaches a port may start jobs."""
    conf = (slurm.folder / "slurm.conf").read_text()
    ports = {int(port) for port in re.findall(r"(?:SlurmctldPort=| Port=)(\d+)", conf)}
    assert len(ports) == 3
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if state == LISTENS and int(port, 16) in ports:
                found.setdefault(int(port, 16), set()).add(address)
    assert found == {port: {LOOPBACK} for port in ports}
