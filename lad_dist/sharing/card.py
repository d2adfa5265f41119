"""README.md of a shared set: YAML front matter for the hub, and text with picture, results, recipe, licence, citation.

The front matter's values are written as JSON, a subset of YAML.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lad_dist import __version__, methods
from lad_dist.distilled import DistilledSet
from lad_dist.exchange.about import citations, imbalance_factor
from lad_dist.exchange.card import title
from lad_dist.report.tables import SELECTION, headings, result_lines

PICTURE = "synthetic.png"
_TAGS = ("dataset-distillation", "long-tailed", "image-classification", "lad-dist")

_TEXT = """
# {title}

{count:,} synthetic images, {ipc} per class of {classes}, distilled from {total:,} training images of {dataset}{tail}.
A network is trained on them instead of on the {total:,}. Method: {method}.

![The images, a row per class, whitening undone]({picture})

```python
from lad_dist import load

distilled = load("{address}")
images, soft_labels, lr = distilled
```

`images` are whitened, {shape} each; real images go through `distilled.preprocess` first. Whitening: `{whitening}`, fitted on
the training images. Labels: {labels}. Learned learning rate: `{lr!r}`.{teachers}

## Results
{results}
## Recipe

`recipe.yaml` is the recipe without paths: say where the data are (`data.root`; `data.train` and `data.test` of lists), and a
run that it started from or took teachers of, and `lad-dist run recipe.yaml` repeats the run. Made with {versions}.
Iteration {iteration:,}. {selection}

## Files

`meta.json` says how the set was made; tensors are safetensors; `SHA256SUMS` has the checksum of every file but this one:
`sha256sum --check SHA256SUMS`. The real images that the distillation started from are not among them.

## Licence

{license}

## Citation

{cite}
"""


def card(distilled: DistilledSet, measured: Sequence[dict[str, Any]], address: str, license_name: str) -> str:
    """Return the text of README.md. ``measured``: summaries of the results, as ``results.summary`` makes them."""
    head = {
        "pretty_name": title(distilled),
        "license": license_name,
        "tags": [*_TAGS, *([distilled.meta.method] if distilled.meta.method in methods.METHODS else [])],
        "task_categories": ["image-classification"],
        "size_categories": [_size(len(distilled))],
        "viewer": False,  # the hub's viewer reads tables and pictures
    }
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())
    return f"---\n{lines}---\n{_text(distilled, measured, address, license_name)}"


def _text(distilled: DistilledSet, measured: Sequence[dict[str, Any]], address: str, license_name: str) -> str:
    meta, factor = distilled.meta, imbalance_factor(distilled)
    dataset = meta.dataset.split("/")[0]
    carried = "" if distilled.teachers is None else f" {len(distilled.teachers.weights)} networks that label augmented "
    of_licence = (
        "None is known: whoever publishes the set sets one." if license_name == "unknown" else license_name + "."
    )
    return _TEXT.format(
        title=title(distilled),
        count=len(distilled),
        ipc=meta.ipc,
        classes=len(meta.class_names),
        total=sum(meta.counts),
        dataset=dataset,
        tail="" if factor is None else f" (imbalance factor {factor:g})",
        method=methods.title(meta.method),
        picture=PICTURE,
        address=address,
        shape="x".join(map(str, distilled.images.shape[1:])),
        whitening=distilled.whitening.kind,
        labels="hard" if distilled.is_hard else "soft, learned",
        lr=meta.lr,
        teachers=carried and f"{carried}batches are in\n`teachers.safetensors`: `distilled.labeller()`.",
        results=table(measured) or "\nNot measured.\n",
        versions=", ".join(f"{name} {version}" for name, version in meta.versions.items()),
        iteration=meta.iteration,
        selection=SELECTION.get(meta.selection, ""),
        license=f"{of_licence} The images were made from {dataset}, whose terms may apply to them.",
        cite="\n".join(f"- {each}" for each in (*citations(distilled), f"lad-dist {__version__}")),
    )


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table with what it compares; empty without results."""
    if not measured:
        return ""
    rows = [("trained on", *headings()[1:]), *(line.cells() for line in result_lines(measured))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    note = (
        f"Accuracy on the {measured[0]['split']} images in percent, mean ± standard deviation over seeds of training; head, "
        "medium, tail: thirds of\nthe classes by their number of training images."
    )
    return "\n" + note + "\n\n" + "\n".join(lines) + "\n"


def _size(count: int) -> str:
    """Return the hub's category of size."""
    for bound, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K")):
        if count < bound:
            return name
    return "100K<n<1M"
