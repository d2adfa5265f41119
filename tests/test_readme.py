"""What the README shows works: its example trains a network, its recipe is a recipe. Its commands: test_docs.py."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import torch

from lad_dist import recipe_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(having: str) -> list[str]:
    """The indented blocks that contain a text."""
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", README, re.MULTILINE)
    return [textwrap.dedent(b) for b in found if having in b]


def test_the_example_trains_a_network(pipeline_of, monkeypatch):
    pipeline = pipeline_of("readme")
    pipeline.experts()
    pipeline.distill()
    (example,) = blocks("from lad_dist import load")
    assert len([line for line in example.splitlines() if line and not line.startswith("#")]) <= 12
    run = {"range": range}
    torch.manual_seed(0)
    exec(example.replace("runs/digits-lt/distilled", str(pipeline.run.distilled)), run)
    distilled, network = run["distilled"], run["network"]
    with torch.no_grad():
        learned = float((network(distilled.images).argmax(1) == distilled.labels).float().mean())
        logits = network(distilled.preprocess(pipeline.data.splits.test.images_NCHW))
    assert learned >= 0.5  # of the set itself, where chance is 0.1
    assert logits.shape == (540, 10) and bool(logits.isfinite().all())


def test_the_recipe_is_a_recipe():
    (text,) = blocks("dataset: image-folder")
    recipe = recipe_file.from_document(recipe_file.parse_yaml(text, "README"))
    assert recipe.data.imbalance == "natural"
