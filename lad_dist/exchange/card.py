"""README.md of a Hugging Face data set: YAML front matter, which the hub and ``datasets`` read, and text.

The front matter's values are written as JSON, a subset of YAML, so that class names need no special quoting.
"""

from __future__ import annotations

import json
from typing import Any

from lad_dist.distilled import DistilledSet
from lad_dist.exchange.about import citations, imbalance_factor
from lad_dist.exchange.tables import HF_FILE, hf_features

_MOST_CLASSES = 100  # up to this many classes are listed with their training images

_TEXT = """
# {title}

{count} synthetic images, {ipc} per class of {classes}, distilled from {dataset} ({total:,} training images{tail}).
A network is trained on them instead of on the {total:,}. Method: {method}{how}.

| column | what it holds |
|---|---|
| `image` | the image with the whitening undone, clipped and rounded to 8 bits, for viewing |
| `label` | the class |
| `soft_label` | {labels}: {classes} probabilities |
| `label_logits` | the logits of `soft_label`, before the softmax |
| `whitened` | the learned image, {values} float32 values, flattened from {shape}: what networks are trained on |

Learned learning rate: `{lr!r}`. Whitening: `{whitening}`, fitted on the training images and stored in `whitening.safetensors`;
real images go through it before a network sees them. `lad_dist.json` says how the set was made.{teachers}

```python
import datasets, torch

train = datasets.load_dataset("{repository}", split="train").with_format("torch")
images = train["whitened"][:].reshape(-1, {dimensions})
soft_labels = train["soft_label"][:]
```

`lad-dist import JOB DIR --from hf` evaluates the set; it restores every bit.
{counts}
## Licence

None is set: add `license:` to the head of this file. The images were made from {dataset}, whose terms may apply to them.

## Citation

{cite}
"""


_TEACHERS = """
`teachers.safetensors` holds networks that label augmented batches better than one soft label per image can; lad-dist reads it
(`lad_dist.labeller.Labeller.load`)."""


def card(distilled: DistilledSet) -> str:
    """Return the text of README.md."""
    return (
        "---\n"
        + "".join(f"{key}: {_json(value)}\n" for key, value in _head(distilled).items())
        + "---\n"
        + _text(distilled)
    )


def _head(distilled: DistilledSet) -> dict[str, Any]:
    """Return the front matter for ``datasets`` and the hub. ``license`` is left to the set's publisher."""
    features = [_yaml_feature(name, feature) for name, feature in hf_features(distilled).items()]
    return {
        "pretty_name": title(distilled),
        "tags": ["dataset-distillation", "long-tailed", "lad-dist"],
        "task_categories": ["image-classification"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": HF_FILE}]}],
        "dataset_info": {"features": features},
    }


def _yaml_feature(name: str, feature: dict[str, Any]) -> dict[str, Any]:
    """Return a column's entry in the front matter."""
    if feature["_type"] == "Image":
        return {"name": name, "dtype": "image"}
    if feature["_type"] == "ClassLabel":
        return {"name": name, "dtype": {"class_label": {"names": {str(c): n for c, n in enumerate(feature["names"])}}}}
    return {"name": name, "sequence": feature["feature"]["dtype"], "length": feature["length"]}


def _text(distilled: DistilledSet) -> str:
    meta, whitening = distilled.meta, distilled.whitening
    factor, shape = imbalance_factor(distilled), distilled.images.shape[1:]
    rows = "".join(
        f"| {_cell(name)} | {count:,} |\n" for name, count in zip(meta.class_names, meta.counts, strict=False)
    )
    listed = (
        f"\n## Training images\n\n| class | images |\n|---|---|\n{rows}" if len(meta.counts) <= _MOST_CLASSES else ""
    )
    iterations = f", iteration {meta.iteration:,}, chosen by: {meta.selection}" if meta.iteration else ""
    return _TEXT.format(
        title=title(distilled),
        count=f"{len(distilled):,}",
        ipc=meta.ipc,
        classes=len(meta.class_names),
        dataset=meta.dataset,
        total=sum(meta.counts),
        tail="" if factor is None else f", imbalance factor {factor:g}",
        method=meta.method,
        how=iterations,
        labels="hard labels" if distilled.is_hard else "the learned soft label",
        values=distilled.images[0].numel(),
        shape=tuple(shape),
        dimensions=", ".join(map(str, shape)),
        lr=meta.lr,
        teachers=_TEACHERS if distilled.teachers is not None else "",
        whitening=whitening.kind,
        repository="PATH",
        counts=listed,
        cite="\n".join(f"- {each}" for each in citations(distilled))
        or "The set's author, and the data set it was made from.",
    )


def title(distilled: DistilledSet) -> str:
    """Return the set's name for people."""
    return f"Distilled {distilled.meta.dataset.split('/')[0]}, {distilled.meta.ipc} images per class"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
