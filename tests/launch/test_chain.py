"""What a stage asks of SLURM, from the profile alone. No SLURM is needed; tests/slurm submits such requests."""

from __future__ import annotations

import pytest

from lad_dist import catalog, recipe_file
from lad_dist.errors import RecipeError
from lad_dist.launch.chain import Request, request, resources, waits_for
from lad_dist.profile import OWN_OPTIONS, Profile
from lad_dist.recipe import Recipe
from lad_dist.rundir import STAGES
from lad_dist.slurm_jobs import SlurmJob


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


def test_resources_in_words():
    slurm = {"cpus_per_task": 4, "mem_gb": 1.5, "time_minutes": 90}
    made = resources(asked("experts", nodes=3, gpus_per_node=2, slurm=slurm))
    assert made == "3 jobs, each 1 node, 1 task on a node with 8 cores, 2 GPUs on a node, 1.5 GB on a node, 90 min"
    made = resources(asked("distill", nodes=2, gpus_per_node=2, slurm={"stages": {"distill": {"time_minutes": 30}}}))
    assert made == "2 nodes, 2 tasks on a node with 1 core each, 2 GPUs on a node, the cluster's memory, 30 min"


def test_fields_of_sbatch():
    slurm = {"account": "a", "reservation": "r", "dependency": "afterok:7,singleton", "begin": "now+1hour", "comment": "mine",
             "mail": "me@example.org", "setup": ["module load x"],
             "stages": {"report": {"account": "b", "setup": [], "reservation": "other"}}}  # fmt: skip
    first, last = asked("experts", slurm=slurm).parameters, asked("report", slurm=slurm).parameters
    assert first["slurm_account"] == "a" and last["slurm_account"] == "b"
    assert "module load x" in first["slurm_setup"] and last["slurm_setup"] == []
    assert first["slurm_comment"] == "mine"
    assert first["slurm_mail_user"] == "me@example.org" and first["slurm_mail_type"] == "FAIL"
    more, others = first["slurm_additional_parameters"], last["slurm_additional_parameters"]
    assert more["begin"] == "now+1hour" and more["reservation"] == "r" and others["reservation"] == "other"
    plain = asked("experts").parameters
    assert not {"slurm_mail_type", "slurm_account"} & set(plain)


def test_what_a_stage_waits_for():
    array, single = SlurmJob("experts", "7", 2, ""), SlurmJob("distill", "8", None, "")
    assert waits_for("distill", {"experts": array}, [], None) == "afterany:7"
    assert (
        waits_for("report", {"experts": array, "distill": single}, [], "singleton") == "singleton,afterany:7,afterok:8"
    )
    assert waits_for("experts", {"distill": single}, [array, array, single], None) == "afterany:7"
    assert waits_for("experts", {}, [], None) is None


@pytest.mark.parametrize(("ranks", "nodes", "gpus", "made"), [
    (None, 2, 8, (2, 8, 8)),
    (4, 2, 8, (1, 4, 4)),  # near each other where they fit
    (16, 2, 8, (2, 8, 8)),
    (4, 2, 0, (2, 2, None)),
    (3, 2, 0, (1, 3, None)),
    (4, 1, 1, (1, 4, 4)),
])  # fmt: skip
def test_ranks_of_a_distillation(ranks, nodes, gpus, made):
    one = asked("distill", ranks=ranks, nodes=nodes, gpus_per_node=gpus)
    p = one.parameters
    assert (p["nodes"], p["tasks_per_node"], p.get("gpus_per_node")) == made
    assert one.profile.ranks == made[0] * made[1]


@pytest.mark.parametrize(("options", "said"), [
    ({"slurm_dependency": "afterok:7"}, "slurm_dependency: is set by lad-dist; valid: the field slurm.dependency"),
    ({"slurm_additional_parameters": {"dependency": "afterok:7"}}, "dependency: is set by lad-dist; valid: the field slurm.dep"),
    ({"slurm_additional_parameters": {"cpus-per-task": 7}}, "cpus-per-task: is set by lad-dist; valid: the field slurm.cpus_per"),
    ({"slurm_additional_parameters": "nice"}, "'nice' is not a mapping; valid: sbatch's long options"),
    ({"slurm_job_name": "x"}, "slurm_job_name: is set by lad-dist; leave it out"),
    ({"mail-type": "FAIL"}, "mail-type: has no prefix slurm_; valid: for example slurm_exclude"),
])  # fmt: skip
def test_options_that_fields_say(options, said):
    for section in ({"options": options}, {"stages": {"distill": {"options": options}}}):
        with pytest.raises(RecipeError) as refused:
            recipe_file.validated(Profile, {"slurm": section}, "p.yaml")
        assert said in str(refused.value)


def test_refusals_name_fields_that_exist():
    fields = {field for field, _ in recipe_file.fields_of(Profile)}
    assert {field for field in OWN_OPTIONS.values() if field is not None} <= fields


def test_a_dependency_on_any_of_several():
    with pytest.raises(RecipeError, match=r"slurm\.dependency: .*valid: ,"):
        recipe_file.validated(Profile, {"slurm": {"dependency": "afterok:7?afterok:8"}}, "p.yaml")
