"""The student's convolutions in bfloat16: near float32, really used, and said how near."""

from __future__ import annotations

import pytest
import torch

from lad_dist.distill.precision import set_precision
from lad_dist.distilled import DistilledSet
from lad_dist.errors import RecipeError
from lad_dist.models.convnet import build
from lad_dist.models.convolution import Convolution
from lad_dist.progress import read_events
from lad_dist.recipe_file import from_document


def events(pipeline, kind: str) -> list[dict]:
    return [e for e in read_events(pipeline.run.events) if e["kind"] == kind]


def gradients(low: bool) -> list[torch.Tensor]:
    """Value, first derivatives, and derivatives of a mixture of those."""
    torch.manual_seed(0)
    layer = Convolution(3, 8, 3, padding=1)
    layer.rounded = low
    x = torch.randn(4, 3, 10, 10, requires_grad=True)
    leaves = [x, *layer.parameters()]
    y = layer(x)
    u = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, u, create_graph=True)
    second = torch.autograd.grad(first, [u, *leaves[:2]], [torch.randn_like(g) for g in first])
    return [t.detach() for t in (y, *first, *second)]


def test_every_derivative_is_near_and_none_is_the_same():
    for rough, exact in zip(gradients(True), gradients(False), strict=True):
        assert rough.dtype == torch.float32
        far = float((rough - exact).abs().max() / exact.abs().max())
        cosine = float(torch.cosine_similarity(rough.flatten(), exact.flatten(), dim=0))
        assert far < 0.02 and cosine > 0.9999
    different = [not torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True)]
    assert sum(different) >= len(different) - 1  # the sum over images that the bias gets needs no convolution


def test_it_is_set_for_every_convolution_and_taken_back():
    module = build(1, 8, 10, 4, 2, seed=0, purpose=("test",))
    convolutions = [m for m in module.modules() if isinstance(m, Convolution)]
    assert len(convolutions) == 2 and not any(c.rounded for c in convolutions)
    set_precision(module, "bfloat16")
    assert all(c.rounded for c in convolutions)
    set_precision(module, "float32")
    assert not any(c.rounded for c in convolutions)


def test_a_run_says_how_near_its_gradients_are(pipeline_of):
    rough, exact = pipeline_of("rough", distill={"precision": "bfloat16"}), pipeline_of("exact")
    for pipeline in (rough, exact):
        pipeline.distill()
    (said,) = events(rough, "precision")
    assert set(said["cosine"]) == {"representation", "classifier"}
    assert all(0.98 < cosine < 1 for cosine in said["cosine"].values())
    assert events(exact, "precision") == []
    images = [DistilledSet.load(p.run.distilled).images for p in (rough, exact)]
    assert not torch.equal(*images)
    torch.testing.assert_close(*images, rtol=0, atol=0.2)


def test_other_precisions_are_refused():
    with pytest.raises(RecipeError, match=r"distill\.precision"):
        from_document({"distill": {"precision": "float16"}})
