"""What a stage asks of SLURM, from the profile alone. No SLURM is needed; tests/slurm submits such requests."""

from __future__ import annotations

import pytest

from lad_dist import catalog, recipe_file
from lad_dist.errors import RecipeError
from lad_dist.launch.chain import Request, request
from lad_dist.pipeline import STAGES
from lad_dist.profile import Profile
from lad_dist.recipe import Recipe


def asked(stage: str, **fields) -> Request:
    """The request of a stage with these fields of the profile."""
    profile = Profile.model_validate({"launcher": "slurm", **fields})
    return request(stage, Recipe(), profile, "run", "submission")


SHIPPED = [name for name, file in catalog.profiles().items() if "launcher: slurm" in file.read_text()]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_stage_of_a_shipped_profile_runs_on_a_gpu_only_where_it_asks_for_one(name):
    profile = recipe_file.validated(Profile, recipe_file.read_document(catalog.profiles()[name]), name)
    for stage in STAGES:
        made = request(stage, Recipe(), profile, "run", "submission")
        assert made.profile.device != "cuda" or made.parameters["gpus_per_node"] > 0, stage
    assert made.profile.device == "cpu"


def test_the_shipped_profiles_with_gpus_are_among_them():
    assert {"slurm-a100", "slurm-small", "dev-slurm"} <= set(SHIPPED)


@pytest.mark.parametrize("stage", ["experts", "distill", "evaluate"])
def test_a_gpu_that_no_job_asks_for(stage):
    fields = {"device": "cuda", "gpus_per_node": 1, "slurm": {"stages": {stage: {"gpus_per_node": 0}}}}
    with pytest.raises(RecipeError, match=rf"{stage} asks SLURM for no GPU; .*slurm\.stages\.{stage}\.gpus_per_node"):
        asked(stage, **fields)
    by_option = {"device": "cuda", "slurm": {"options": {"slurm_gres": "gpu:a100:1"}}}
    assert asked(stage, **by_option).profile.device == "cuda"
    assert asked(stage, **{**fields, "device": "auto"}).profile.device == "auto"
