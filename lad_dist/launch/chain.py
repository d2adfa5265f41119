"""SLURM requests of a run: which stages are left, as which jobs, with which options. Calls no SLURM command.

StageSelection  the stages that a command submits, and the question that it asks of an evaluation
stages_left     the unfinished stages, by what is on disk
Request         one job, or one job array, in submitit's terms; ``resources`` says it in words
waits_for       the dependencies of a job
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lad_dist import results
from lad_dist.errors import RecipeError
from lad_dist.launch.job import Order
from lad_dist.profile import DistillOnSlurm, EvaluateOnSlurm, ExpertsOnSlurm, Option, Profile, SlurmConfig, StageOnSlurm
from lad_dist.recipe import MOST_TEACHERS, Recipe
from lad_dist.rundir import STAGES, RunDir
from lad_dist.slurm_jobs import SlurmJob

if TYPE_CHECKING:
    from lad_dist.distilled import DistilledSet


@dataclass(frozen=True)
class Question:
    """Sources to evaluate and the recipe to measure them by, where these differ from the run's own."""

    sources: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Hash that tells this question's jobs from those of others."""
        asked = json.dumps([self.sources, self.recipe.evaluate.model_dump(mode="json")])
        return hashlib.sha256(asked.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class StageSelection:
    """The stages that a command submits. ``again``: finished ones too, leaving the run's recipe unchanged."""

    stages: tuple[str, ...]
    again: bool = False
    question: Question | None = None

    def means(self, job: SlurmJob) -> bool:
        """Return whether a job of the run is one that this selection may submit."""
        return job.stage != "evaluate" or job.question == self.name

    @property
    def name(self) -> str:
        """Name of the question; empty without one."""
        return "" if self.question is None else self.question.name


def stages_left(recipe: Recipe, run: RunDir, wanted: Sequence[str], buffer: Path | str | None = None) -> list[str]:
    """Return those of ``wanted`` that are not done, in order; the report is due after any other stage.

    ``buffer``: the trajectory buffer, if the run does not exist yet. An imported set needs no experts. Raises
    TrajectoryError if the buffer is damaged or another recipe's, DistilledError if the distilled set is damaged,
    RunDirError if the results are damaged.
    """
    from lad_dist.distilled import DistilledSet

    left = []
    whole = DistilledSet.load(run.distilled) if run.distilled.exists() else None
    made = None if whole is None else whole.meta
    imported = made is not None and made.imported
    if not imported and experts_left(recipe, run.trajectories if buffer is None else buffer):
        left.append("experts")
    if made is None or made.grows_into(recipe):
        left.append("distill")
    measured = {
        (row["source"], row["architecture"], row["seed"])
        for row in results.read(run.results)
        if _as_asked(recipe, row, whole)
    }
    if "distill" in left or not _networks(recipe, results.wanted(recipe, run)) <= measured:
        left.append("evaluate")
    if left or not (run.report / "index.html").exists():
        left.append("report")
    return [stage for stage in STAGES if stage in left and stage in wanted]


def experts_left(recipe: Recipe, trajectories: Path | str) -> list[int]:
    """Return the incomplete experts, ascending. Raises TrajectoryError if the buffer is damaged or another recipe's."""
    from lad_dist.trajectories.reader import Buffer

    buffer = Buffer(trajectories, expected_hash=recipe.experts_hash())
    experts = range(recipe.experts.count)
    return sorted(set(experts) - set(buffer.complete(recipe.experts.last_epochs, experts)))


def _as_asked(recipe: Recipe, row: results.Row, whole: DistilledSet | None) -> bool:
    """Return whether a row was measured with the recipe's settings, as far as they are known without data and experts.

    ``whole``: the run's distilled set.
    """
    from lad_dist.evaluate import tune
    from lad_dist.evaluate.measure import settings_in
    from lad_dist.evaluate.sources import labels_of, settings_with

    try:
        said = settings_in(row)
    except (KeyError, TypeError, ValueError):
        return False
    source, e = str(row["source"]), recipe.evaluate
    wanted, tuned = settings_with(recipe, source, said.lr), tune.asked(recipe, source)
    if tuned:  # chosen by the evaluation
        wanted = replace(wanted, lr=said.lr, epochs=said.epochs)
    told = {**row["settings"].get("network", {}), **row["settings"]}
    other = {"norm": e.norm, "stored_views": e.stored_views, "labels": labels_of(source, whole)}
    alike = all(told.get(k, v) == v for k, v in other.items()) and ("chosen" in told) == tuned
    if results.labels_stored(source) and wanted.cutmix:
        alike = alike and "mixed" in told
    return row["split"] == e.split and said == wanted and alike and _by_these(recipe, told.get("labelled_by"), source)


def _by_these(recipe: Recipe, labelled_by: str | None, source: str) -> bool:
    """Return whether a row's teachers are of the run that the recipe names and, of its own, as many as it asks for."""
    e = recipe.evaluate
    if labelled_by is None or not results.uses_experts(source):
        return True
    other = re.search(r" of (.+) \([0-9a-f]{8}\), epoch", labelled_by)
    named = None if e.teachers_from is None else Path(e.teachers_from).expanduser().name
    count = re.match(r"mean logits of (\d+) ", labelled_by)
    own = named is None and "came with the set" not in labelled_by and not results.labelled_by_experts(source)
    expected = min(recipe.experts.count, MOST_TEACHERS if e.teachers is None else e.teachers)
    as_many = not own or count is None or int(count[1]) == expected
    return (None if other is None else other[1]) == named and as_many


def _networks(recipe: Recipe, sources: Sequence[str]) -> set[tuple[str, str, int]]:
    """Return (source, architecture, seed) of every network that the evaluation trains."""
    return {(source, *network) for source in sources for network in results.networks(recipe, source)}


@dataclass(frozen=True)
class Request:
    """``count`` jobs that share ``stage`` (1: a single job), each submitted with submitit's ``parameters``."""

    stage: str
    count: int
    fleet: bool
    profile: Profile  # used inside the jobs
    parameters: dict[str, Any]
    question: Question | None = None

    def orders(self, run: RunDir, logs: Path, after: str | None) -> list[Order]:
        """Return the order of each job. ``after``: the preceding stage, if it is queued."""
        document = self.profile.model_dump(mode="json")
        folder, q = str(run.root.resolve()), self.question
        asked = None if q is None else {"sources": list(q.sources), "recipe": q.recipe.model_dump(mode="json")}
        return [
            Order(self.stage, folder, document, str(logs), index, self.count, self.fleet, after, asked)
            for index in range(self.count)
        ]


def request(
    stage: str, recipe: Recipe, profile: Profile, name: str, submission: str, question: Question | None = None
) -> Request:
    """Return the request for a stage's jobs. ``name``: the run's; ``submission``: the id in their comment.

    Raises RecipeError if the profile's numbers contradict each other.
    """
    s, own = profile.slurm, getattr(profile.slurm.stages, stage)
    nodes = getattr(own, "nodes", None) or profile.nodes
    gpus = profile.gpus_per_node if own.gpus_per_node is None else own.gpus_per_node
    tasks, count, fleet = 1, 1, False
    if isinstance(own, ExpertsOnSlurm):
        fleet = own.mode == "fleet"
        count = 1 if fleet else min(nodes, recipe.experts.count)
        nodes = nodes if fleet else 1
    elif isinstance(own, EvaluateOnSlurm):
        asked = question or Question(tuple(results.asked(recipe)), recipe)
        jobs = own.jobs if question is None else profile.ranks or own.jobs
        count, nodes = min(jobs, len(_networks(asked.recipe, asked.sources))), 1
        gpus = min(gpus, 1) if own.gpus_per_node is None else gpus
    elif isinstance(own, DistillOnSlurm):
        tasks = own.tasks_per_node or s.tasks_per_node or max(1, gpus)
        if profile.ranks is not None:
            nodes, tasks = _spread(profile.ranks, nodes, tasks)
            gpus = tasks if gpus else 0
    else:
        nodes, gpus = 1, own.gpus_per_node or 0
    # Cores are requested per task; a single task that uses all GPUs gets the cores of all.
    cpus = own.cpus_per_task or s.cpus_per_task * (max(1, gpus) if tasks == 1 and stage != "report" else 1)
    device: str = profile.device
    if stage == "report":
        device = "cpu"
    elif device == "cuda" and gpus == 0 and not _gpus_by_options({**s.options, **own.options}):
        raise RecipeError(
            f"profile: device: cuda, but {stage} asks SLURM for no GPU; valid: gpus_per_node or slurm.stages.{stage}."
            "gpus_per_node of 1 or more, or device: auto, which uses a GPU only where the job has one"
        )
    minutes = own.time_minutes or s.time_minutes
    if s.warning_seconds >= minutes * 60:
        raise RecipeError(
            f"profile: slurm.warning_seconds: {s.warning_seconds} s is not below the {minutes} min of "
            f"{'slurm' if own.time_minutes is None else f'slurm.stages.{stage}'}.time_minutes; valid: a part of it, "
            "enough for one iteration or epoch and a checkpoint"
        )
    parameters = {
        "name": f"{name}-{stage}",
        "timeout_min": minutes,
        "nodes": nodes,
        "tasks_per_node": tasks,
        "cpus_per_task": cpus,
        **_optional(s, own, gpus),
        "slurm_signal_delay_s": s.warning_seconds,
        "slurm_comment": s.comment or f"lad-dist {submission}",
        "slurm_setup": setup_lines(s.setup if own.setup is None else own.setup),
        **_options(s, own, tasks * nodes > 1),
    }
    inside = profile.model_copy(
        update={
            "launcher": "local",
            "device": device,
            "nodes": 1,
            "gpus_per_node": gpus,
            "ranks": nodes * tasks if stage == "distill" else 1,
            "threads": profile.threads or cpus,
            "buffers": None,  # recorded in the run folder
            "slurm": SlurmConfig(),
        }
    )
    return Request(stage, count, fleet, inside, parameters, question)


def resources(wanted: Request) -> str:
    """Return a stage's resources for users: ``2 jobs, each 1 node, 4 tasks on a node with 2 cores each, 60 min``."""
    p = wanted.parameters
    tasks, gpus, memory = p["tasks_per_node"], p.get("gpus_per_node"), p.get("mem_gb")
    asked = [
        _many(p["nodes"], "node"),
        f"{_many(tasks, 'task')} on a node with {_many(p['cpus_per_task'], 'core')}{' each' if tasks > 1 else ''}",
        *([f"{_many(gpus, 'GPU')} on a node"] if gpus else []),
        "the cluster's memory" if memory is None else f"{memory:g} GB on a node",
        f"{p['timeout_min']} min",
    ]
    return (f"{wanted.count} jobs, each " if wanted.count > 1 else "") + ", ".join(asked)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _spread(ranks: int, nodes: int, tasks: int) -> tuple[int, int]:
    """Return (nodes, tasks per node): at most ``tasks`` if the ranks fit on ``nodes``, else the fewest possible."""
    even = [n for n in range(1, nodes + 1) if ranks % n == 0]
    used = next((n for n in even if ranks // n <= tasks), even[-1])
    return used, ranks // used


def waits_for(stage: str, before: Mapping[str, SlurmJob], ending: Sequence[SlurmJob], own: str | None) -> str | None:
    """Return sbatch's ``--dependency`` of a stage's jobs: the profile's ``own``, the stages ``before`` it, and its own
    jobs that are still ``ending``.

    An array need only be over, since others may have done the share of its cancelled jobs; the new job checks.
    """
    earlier = [before[s] for s in STAGES[: STAGES.index(stage)] if s in before]
    waits = [own] if own else []
    waits += [f"{'afterok' if job.array is None else 'afterany'}:{job.id}" for job in earlier]
    waits += [f"afterany:{number}" for number in dict.fromkeys(job.id for job in ending if job.stage == stage)]
    return ",".join(waits) or None


def _gpus_by_options(options: Mapping[str, Option]) -> bool:
    """Return whether the options request GPUs themselves: ``slurm_gres: gpu:1``, ``slurm_gpus_per_task: 1``."""
    return any("gpu" in f"{name}={value}" for name, value in options.items())


def _optional(s: SlurmConfig, own: StageOnSlurm, gpus: int) -> dict[str, Any]:
    asked = {
        "gpus_per_node": gpus or None,
        "mem_gb": own.mem_gb or s.mem_gb,
        "slurm_partition": own.partition or s.partition,
        "slurm_account": own.account or s.account,
        "slurm_qos": own.qos or s.qos,
        "slurm_constraint": own.constraint or s.constraint,
        "slurm_mail_user": s.mail,
        "slurm_mail_type": None if s.mail is None else s.mail_events,
    }
    return {name: value for name, value in asked.items() if value is not None}


def setup_lines(lines: Sequence[str]) -> list[str]:
    """Return the profile's lines, so wrapped that a failing one ends the job and is named in its log."""
    if not lines:
        return []
    say = 'echo "error: slurm.setup: exit code $?: $BASH_COMMAND" >&2'
    return ["set -e", f"trap '{say}' ERR", *lines, "trap - ERR", "set +e"]


def _options(s: SlurmConfig, own: StageOnSlurm, several: bool) -> dict[str, Any]:
    """Return the profile's options plus every job's: a failing task ends the others, a dead node requeues the job."""
    options: dict[str, Option] = {**s.options, **own.options}
    more = options.get("slurm_additional_parameters", {})
    fields = {"begin": s.begin, "reservation": own.reservation or s.reservation}
    always = {"requeue": True, "kill-on-invalid-dep": "yes", **{k: v for k, v in fields.items() if v is not None}}
    arguments = options.get("slurm_srun_args", "")
    srun = [*(["--kill-on-bad-exit=1"] if several else []), *str(arguments).split()]
    return {
        **options,
        "slurm_additional_parameters": {**always, **(more if isinstance(more, dict) else {})},
        "slurm_srun_args": srun,
    }
