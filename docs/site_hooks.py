"""What the site needs beyond mkdocs: a page of the notebook, links that leave docs/, no request to another host."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.site")  # mkdocs counts warnings of its own loggers: --strict fails


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every notebook; the notebook itself stays, to be downloaded."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        text = as_markdown(json.loads(file.content_string), file.name + ".ipynb")
        files.append(File.generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to notebooks at their pages and links to files outside docs/ at the repository; name pages by title."""
    docs = Path(config.docs_dir)

    def outside(link: re.Match[str]) -> str:
        target = Path(os.path.normpath((docs / page.file.src_uri).parent / link["path"]))
        if not target.exists() or not target.is_relative_to(docs.parent):
            log.warning("%s: the link to %s leads nowhere", page.file.src_uri, link["path"])
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(docs.parent).as_posix()
        return f"]({config.repo_url}/{kind}/main/{path}{link['anchor'] or ''})"

    markdown = re.sub(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", outside, markdown)
    markdown = re.sub(r"\]\(([\w./-]+)\.ipynb\)", r"](\1.md)", markdown)
    for path, title in titles(config.nav):  # [python.md](python.md) is right on GitHub only
        name = re.escape(path.removesuffix(".md"))
        markdown = re.sub(rf"\[{name}\.(?:md|ipynb)\]\(({name}\.md(?:#[^)]*)?)\)", rf"[{title}](\1)", markdown)
    return re.sub(r"^(<!--.*-->)\n(?=\|)", r"\1\n\n", markdown, flags=re.MULTILINE)  # a table needs a blank line before


def on_post_page(output: str, **_: Any) -> str:
    """The link to the repository, without the mark by which the theme's script asks GitHub for stars and forks."""
    return output.replace('data-md-component="source"', "")


on_post_template = on_post_page  # 404.html


def titles(nav: Any) -> list[tuple[str, str]]:
    """(path, title) of every page of nav."""
    found: list[tuple[str, str]] = []
    for entry in nav:
        for title, value in entry.items():
            found += [(value, title)] if isinstance(value, str) else titles(value)
    return found


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook's cells as Markdown: text as it is, code as Python, no outputs (the notebook has none)."""
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        cells.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    cells.insert(1, f'As a notebook: <a href="{name}" download>{name}</a>.')
    return "\n\n".join(cells) + "\n"
