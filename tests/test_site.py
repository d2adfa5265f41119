"""The documentation site: mkdocs.yml names every page, and what is built asks no other host for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
OMITTED: dict[str, str] = {}  # page: why nav does not have it


def pages(nav: Any) -> list[str]:
    """The files that nav names."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]


def test_nav_has_every_page_once_and_no_other():
    own = {p.name for p in DOCS.glob("*.md")} | {f"{p.stem}.md" for p in DOCS.glob("*.ipynb")}
    named = pages(CONFIG["nav"])
    assert sorted([*named, *OMITTED]) == sorted(own), "nav of mkdocs.yml, or OMITTED with a reason"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def build(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """``make docs`` of the checkout at ``root``, into ``folder``."""
    (line,) = re.findall(r"-m (mkdocs build .*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", *line.split(), "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_every_page_is_built_with_its_tables(site):
    for page in pages(CONFIG["nav"]):
        html = (site / re.sub(r"README\.md$", "index.html", page).replace(".md", ".html")).read_text()
        assert not re.search(r"\|\s*:?---|^:::", html, re.MULTILINE), page


def test_nothing_comes_from_another_host(site):
    tags = [
        tag
        for page in site.rglob("*.html")
        for tag in re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", page.read_text())
    ]
    assert len(tags) > 50
    assert [
        t for t in tags if re.search(r"""\b(?:src|href|srcset)=["']?(?:https?:)?//""", t) and "canonical" not in t
    ] == []
    assert not any(
        re.search(r"(?:@import|url\()[\s\"']*(?:https?:)?//", css.read_text()) for css in site.rglob("*.css")
    )
    # the theme's script asks GitHub for stars where a link has this mark
    assert not any('data-md-component="source"' in page.read_text() for page in site.rglob("*.html"))


def test_the_api_is_the_docstrings(site):
    html = (site / "api.html").read_text()
    assert 'id="lad_dist.Run.open"' in html and "nothing is written before" in html
    for name in ("Recipe", "Profile", "load", "Callback", "results.Result", "methods.Method", "distilled.DistilledSet"):
        assert f'id="lad_dist.{name}"' in html


def test_the_notebook_is_a_page_and_links_out_of_docs_lead_to_the_repository(site):
    assert "run.train_experts" in re.sub(r"<[^>]+>", "", (site / "first-run.html").read_text())
    assert 'href="first-run.html' in (site / "python.html").read_text()
    assert (
        f'href="{CONFIG["repo_url"]}/blob/main/benchmarks/notes-convergence.md"' in (site / "results.html").read_text()
    )
    assert 'href="../' not in "".join(page.read_text() for page in site.glob("*.html"))


def test_dead_links_fail_the_build(tmp_path):
    """Each in a page that nav does not have, which is no fault."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    for entry in ROOT.iterdir():
        if entry.name not in ("docs", "site"):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(DOCS, tmp_path / "docs")
    page = tmp_path / "docs" / "new.md"
    page.write_text("# New\n\n[there](../benchmarks/) and [there](buffer.md)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    page.write_text("# New\n\n[a](../benchmarks/gone.md) [b](gone.md) [c](buffer.md#gone)\n")
    done = build(tmp_path, tmp_path / "site")
    for fault in ("../benchmarks/gone.md", "'gone.md'", "buffer.md#gone"):
        assert fault in done.stderr, done.stderr
    assert done.returncode != 0
