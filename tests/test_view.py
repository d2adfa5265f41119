"""``lad-dist view``: the report over HTTP on the loopback address, to whoever has the token, as the run moves on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lad_dist import view
from lad_dist.errors import RunDirError, StorageError

ROOT = Path(__file__).parents[1]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def answer(address: str, path: str = "") -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(address + path, timeout=20) as got:
            return got.status, got.read().decode(errors="replace"), dict(got.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture
def run(pipeline_of, monkeypatch):
    monkeypatch.setattr(view, "_SHORTEST", 0.0)
    return pipeline_of(evaluate={"seeds": 1, "baselines": ["initial"]})


def test_it_shows_the_run_as_it_moves_on(run):
    with view.served(run.run.root, 0, 3) as address:
        code, before, headers = answer(address)
        assert code == 200 and "There is no distilled set yet" in before and headers["Cache-Control"] == "no-store"
        assert '<meta http-equiv="refresh" content="3">' in before
        run.distill()
        assert "There is no distilled set yet" not in answer(address)[1]
        run.all()
        after = answer(address)[1]
        assert "Starting set" in after and 'http-equiv="refresh"' not in after  # it has ended: no reload
        assert answer(address, "synthetic.png")[0] == 200


def test_nothing_is_written(run):
    run.distill()
    before = {file: file.stat().st_mtime_ns for file in run.run.root.rglob("*") if file.is_file()}
    with view.served(run.run.root, 0, 5) as address:
        answer(address)
        assert answer(address, "synthetic.png")[0] == 404  # the report has not been written
    assert {file: file.stat().st_mtime_ns for file in run.run.root.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("path", ["", "index.html", "../recipe.yaml", "%2e%2e/recipe.yaml", "events.jsonl", "x/"])
def test_without_the_token_and_beyond_the_page_there_is_nothing(run, path):
    with view.served(run.run.root, 0, 5) as address:
        host = re.match(r"http://127\.0\.0\.1:\d+/", address)[0]
        assert answer(host, path)[0] == 404
        if path:
            assert answer(address, path)[0] == 404
        assert answer(host, "A" * 32 + "/")[0] == 404


def test_two_servers_have_two_tokens_and_a_taken_port_is_an_error(run):
    with view.served(run.run.root, 0, 5) as one, view.served(run.run.root, 0, 5) as other:
        assert one.split("/")[-2] != other.split("/")[-2] and len(one.split("/")[-2]) >= 32
        port = int(one.split(":")[2].split("/")[0])
        with (
            pytest.raises(StorageError, match=f"--port {port}: .*valid: a free port"),
            view.served(run.run.root, port, 5),
        ):
            pass


def test_a_damaged_file_is_said_and_the_next_reload_may_find_it_mended(run):
    run.all()
    results = run.run.results
    held = results.read_text()
    with view.served(run.run.root, 0, 5) as address:
        results.write_text(held.replace('"overall"', '"OVERALL"', 1))
        for row in (results.parent / "rows").glob("*.json"):
            row.rename(row.with_suffix(".away"))
        code, text, _ = answer(address)
        assert code == 503 and str(results) in text
        results.write_text(held)
        assert answer(address)[0] == 200


def test_no_run_folder(tmp_path):
    with pytest.raises(RunDirError), view.served(tmp_path, 0, 5):
        pass


def test_the_command_prints_the_address_and_ends_on_a_signal(run):
    command = [sys.executable, "-u", "-m", "lad_dist.cli", "view", str(run.run.root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert answer(address)[0] == 200
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 130 and time.monotonic() - began < 8
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="no chromium to load the page in")
def test_a_browser_shows_it(run, tmp_path):
    assert BROWSER is not None, "CI needs chromium (apt-get install chromium)"
    run.all()
    with view.served(run.run.root, 0, 5) as address:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--dump-dom", "--virtual-time-budget=4000", address]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Starting set" in dom and json.dumps(run.recipe.name).strip('"') in dom
