"""Methods: the package's own, and one of somebody else with fields and a matching loss of its own."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from lad_dist import methods, recipe_file
from lad_dist.distill.matching import match
from lad_dist.errors import RecipeError
from lad_dist.methods import METHODS, Method
from lad_dist.recipe import Recipe


def relative_distance(student_p, expert_p):
    return (student_p - expert_p).square().sum() / expert_p.square().sum()


MINE = Method("Mine", {"matching": "joint", "labels": "hard", "window_epochs": 3}, ("Me, 2026",), relative_distance)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    module = types.ModuleType("mine_too")
    module.MINE, module.STRANGE, module.NONE = MINE, Method("Strange", {"panes": 3}), "lad"
    monkeypatch.setitem(sys.modules, "mine_too", module)


def test_a_method_of_ones_own_is_a_preset():
    recipe = Recipe.model_validate({"method": "mine_too:MINE", "distill": {"labels": "soft"}})
    d = recipe.distill
    assert (d.matching, d.labels, d.window_epochs) == ("joint", "soft", 3)
    assert (methods.title("mine_too:MINE"), methods.cited("mine_too:MINE")) == ("Mine", ("Me, 2026",))
    again = recipe_file.from_document(recipe.model_dump(mode="json"), ["method=lad"])
    assert again.distill == Recipe().distill  # nothing of it is left
    back = recipe_file.from_document(again.model_dump(mode="json"), ["method=mine_too:MINE"])
    assert back.distill.window_epochs == 3 and back.distill.labels == "hard"


@pytest.mark.parametrize(("name", "said"), [
    ("lda", "'lda': should be 'lad', 'lad-fr', 'aligned', 'datm', 'mtt', 'lad-without-wma', 'lad-without-adm' or module:attribute"),
    (3, "method: 3: should be a valid string"),
    ("mine_too:STRANGE", "method: mine_too:STRANGE: sets distill.panes, which is not a field; valid: fields of distill"),
    ("mine_too:NONE", "method: mine_too:NONE: is a str; valid: a lad_dist.methods.Method"),
    ("mine_too:OTHER", "method: mine_too:OTHER: AttributeError"),
    ("nowhere_at_all:M", "method: nowhere_at_all:M: No module named 'nowhere_at_all'; valid: a module that Python finds"),
])  # fmt: skip
def test_what_is_no_method_is_refused_in_one_line(name, said):
    with pytest.raises(RecipeError) as refused:
        recipe_file.from_document({"method": name})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_titles_and_citations_of_what_is_not_here():
    assert methods.title("imported") == "imported" and methods.title("nowhere_at_all:M") == "nowhere_at_all:M"
    assert methods.cited("imported") == ()
    assert all(m.title and m.cite for m in METHODS.values())


def window(moved=0.1):
    draws = torch.Generator().manual_seed(0)
    start, summed = (torch.randn(20, generator=draws, dtype=torch.float64) for _ in range(2))
    return start, start + moved, summed, torch.tensor(0.3, dtype=torch.float64), slice(3, 17)


def test_a_matching_loss_of_ones_own_has_the_gradient_of_the_closed_form():
    ours, theirs = match(*window(), relative_distance), match(*window())
    for name in ("loss", "direction_P", "alpha_gradient", "cosine", "norm_ratio"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    other = match(*window(), lambda student, expert: 1 - torch.cosine_similarity(student, expert, dim=0))
    assert float(other.loss) == pytest.approx(1 - float(theirs.cosine), abs=1e-12)
    assert abs(float(other.alpha_gradient)) < 1e-12  # a cosine does not depend on alpha


@pytest.mark.parametrize("loss", [lambda s, e: s - e, lambda s, e: 1.0, lambda s, e: e.sum()])
def test_a_loss_that_is_none_is_refused(loss):
    with pytest.raises(RecipeError, match=r"^method: its loss returned a .*; valid: a 0-dim tensor"):
        match(*window(), loss)
