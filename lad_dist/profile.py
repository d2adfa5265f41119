"""The typed cluster profile: *where* a job runs. Validated like a recipe (see ``recipe_file.py``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lad_dist.recipe import Bool, Float, Int, Text

MOST_THREADS = 1024  # upper bound on CPU threads; no machine gains from more
Option = bool | int | float | str | dict[str, bool | int | float | str]
OWN_OPTIONS: dict[str, str | None] = {  # options that lad-dist sets, with the profile field that controls each, or None
    "slurm_partition": "slurm.partition",
    "slurm_account": "slurm.account",
    "slurm_qos": "slurm.qos",
    "slurm_constraint": "slurm.constraint",
    "slurm_time": "slurm.time_minutes",
    "slurm_mem": "slurm.mem_gb",
    "slurm_reservation": "slurm.reservation",
    "slurm_dependency": "slurm.dependency",
    "slurm_begin": "slurm.begin",
    "slurm_comment": "slurm.comment",
    "slurm_mail_user": "slurm.mail",
    "slurm_mail_type": "slurm.mail_events",
    "slurm_nodes": "nodes",
    "slurm_gpus_per_node": "gpus_per_node",
    "slurm_ntasks_per_node": "slurm.tasks_per_node",
    "slurm_cpus_per_task": "slurm.cpus_per_task",
    "slurm_setup": "slurm.setup",
    "slurm_signal_delay_s": "slurm.warning_seconds",
    "slurm_max_num_timeout": "slurm.max_requeues",
    "slurm_python": "slurm.python",
    "slurm_signal": "slurm.warning_seconds",
    "slurm_ntasks": "slurm.tasks_per_node",
    "slurm_use_srun": None,
    "slurm_job_name": None,
    "slurm_array": None,
    "slurm_output": None,
    "slurm_error": None,
    "slurm_open_mode": None,
}


class RayConfig(BaseModel):
    """Ray cluster that trains the experts."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    address: Text | None = Field(
        None, description="a running cluster's address; default: RAY_ADDRESS, else a new cluster on this machine"
    )
    dashboard: Bool = Field(True, description="serve the new cluster's dashboard, on the loopback address")
    object_store_mb: Annotated[Int, Field(ge=80)] | None = Field(
        None,
        description="the new cluster's shared memory, MiB; default: what the training images need, at least 80",
    )


def _passed_on(options: dict[str, Option]) -> dict[str, Option]:
    for name, value in options.items():
        if not name.startswith("slurm_"):
            raise ValueError(
                f"{name}: has no prefix slurm_; valid: for example slurm_exclude, slurm_gres, or any other option of sbatch "
                f"in slurm_additional_parameters: {{{name.replace('_', '-')}: ...}}"
            )
        _check_not_own(name, name)
        if name == "slurm_additional_parameters":
            if not isinstance(value, dict):
                raise ValueError(
                    f"{name}: {value!r} is not a mapping; valid: sbatch's long options, such as {{nice: 100}}"
                )
            for option in value:
                _check_not_own(f"slurm_{option.lstrip('-').replace('-', '_')}", f"{name}: {option}")
    return options


def _check_not_own(option: str, shown: str) -> None:
    if option in OWN_OPTIONS:
        field = OWN_OPTIONS[option]
        raise ValueError(f"{shown}: is set by lad-dist; " + (f"valid: the field {field}" if field else "leave it out"))


class StageOnSlurm(BaseModel):
    """SLURM settings of one stage; each unset field keeps the profile's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    partition: Text | None = Field(None, description="as slurm.partition, for this stage")
    account: Text | None = Field(None, description="as slurm.account, for this stage")
    qos: Text | None = Field(None, description="as slurm.qos, for this stage")
    constraint: Text | None = Field(None, description="as slurm.constraint, for this stage")
    reservation: Text | None = Field(None, description="as slurm.reservation, for this stage")
    time_minutes: Annotated[Int, Field(ge=1)] | None = Field(None, description="as slurm.time_minutes, for this stage")
    gpus_per_node: Annotated[Int, Field(ge=0)] | None = Field(None, description="as gpus_per_node, for this stage")
    cpus_per_task: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="as slurm.cpus_per_task, for this stage"
    )
    mem_gb: Annotated[Float, Field(gt=0)] | None = Field(None, description="as slurm.mem_gb, for this stage")
    setup: tuple[Text, ...] | None = Field(None, description="instead of slurm.setup, for this stage")
    options: dict[str, Option] = Field(default_factory=dict, description="beside slurm.options, for this stage")

    _options = field_validator("options")(_passed_on)

    @model_validator(mode="before")
    @classmethod
    def _without_unset_fields(cls, doc: Any) -> Any:
        """Profiles that older versions wrote spell out fields, unset, that the stage does not have."""
        if not isinstance(doc, dict):
            return doc
        return {name: value for name, value in doc.items() if value is not None or name in cls.model_fields}


class ExpertsOnSlurm(StageOnSlurm):
    """SLURM settings of the experts' stage, which has two ways to use several nodes."""

    nodes: Annotated[Int, Field(ge=1)] | None = Field(None, description="as nodes, for this stage")
    mode: Literal["array", "fleet"] = Field(
        "array",
        description="array: as many single-node jobs as nodes, which share the buffer and need no network between them; "
        "fleet: one job of all nodes with a private Ray cluster inside",
    )


class DistillOnSlurm(StageOnSlurm):
    """SLURM settings of the distillation, a job whose tasks are ranks."""

    nodes: Annotated[Int, Field(ge=1)] | None = Field(None, description="as nodes, for this stage")
    tasks_per_node: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="as slurm.tasks_per_node, for this stage"
    )


class EvaluateOnSlurm(StageOnSlurm):
    """SLURM settings of the evaluation, an array of single-node jobs over architectures and seeds."""

    jobs: Annotated[Int, Field(ge=1)] = Field(8, description="jobs of the array, at most; never more than networks")


class StagesOnSlurm(BaseModel):
    """SLURM settings of single stages, which override the profile's."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    experts: ExpertsOnSlurm = ExpertsOnSlurm()
    distill: DistillOnSlurm = DistillOnSlurm()
    evaluate: EvaluateOnSlurm = EvaluateOnSlurm()
    report: StageOnSlurm = StageOnSlurm()


class SlurmConfig(BaseModel):
    """SLURM settings of every stage; ``nodes`` and ``gpus_per_node`` are fields of the profile itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    partition: Text | None = Field(None, description="sbatch --partition; default: the cluster's")
    account: Text | None = Field(None, description="sbatch --account; default: the user's")
    qos: Text | None = Field(None, description="sbatch --qos; default: the account's")
    constraint: Text | None = Field(None, description="sbatch --constraint, for example a100")
    reservation: Text | None = Field(None, description="sbatch --reservation")
    dependency: Text | None = Field(
        None,
        description="sbatch --dependency, beside those of the chain: every job waits for it, for example afterok:1234",
    )
    begin: Text | None = Field(
        None, description="sbatch --begin: no job starts before, for example now+2hours or 20:00"
    )
    comment: Text | None = Field(None, description="sbatch --comment; default: lad-dist and the submission's name")
    mail: Text | None = Field(None, description="sbatch --mail-user: recipient of SLURM's mail; default: nobody")
    mail_events: Text = Field("FAIL", description="sbatch --mail-type: its events, for example BEGIN,END,FAIL")
    time_minutes: Annotated[Int, Field(ge=1)] = Field(
        240, description="time limit of one job; it is requeued to continue"
    )
    tasks_per_node: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="ranks of a distillation on each node; default: one per GPU, else 1"
    )
    cpus_per_task: Annotated[Int, Field(ge=1)] = Field(1, description="CPU cores of one task")
    mem_gb: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="memory per node, GB; default: the cluster's"
    )
    setup: tuple[Text, ...] = Field((), description="shell lines before each job, for example: module load cuda/12.4")
    python: Text | None = Field(None, description="command that starts Python on the nodes; default: this interpreter")
    logs: Text | None = Field(None, description="folder of logs, shared by all nodes; default: slurm/logs in the run")
    warning_seconds: Annotated[Int, Field(ge=1)] = Field(
        120, description="time before the limit at which a job saves its state and is requeued"
    )
    max_requeues: Annotated[Int, Field(ge=0)] = Field(
        20, description="how often a job that ran out of time is requeued"
    )
    options: dict[str, Option] = Field(
        default_factory=dict,
        description="other options, by submitit's names: slurm_exclude, slurm_gres; any other option of sbatch under "
        "slurm_additional_parameters, for example {nice: 100, licenses: matlab}",
    )
    stages: StagesOnSlurm = StagesOnSlurm()

    _options = field_validator("options")(_passed_on)

    @field_validator("dependency")
    @classmethod
    def _all_of_them(cls, value: str | None) -> str | None:
        if value is not None and "?" in value:
            raise ValueError(f"{value!r}: SLURM cannot combine ? (any) with the chain's dependencies; valid: , (all)")
        return value


class Profile(BaseModel):
    """Execution environment of a job. No field changes what is computed, except for rounding (threads, ranks, device)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: Text = Field("local", description="name of the profile")
    launcher: Literal["local", "slurm"] = Field(
        "local", description="local: in this process on this machine; slurm: as a chain of SLURM jobs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a CUDA GPU if there is one, else the CPU")
    threads: Annotated[Int, Field(ge=1, le=MOST_THREADS)] | None = Field(
        None,
        description="CPU threads per rank (with several ranks at most the cores divided by the ranks); default: "
        "the fastest in a few timed steps, up to all cores, kept with the run",
    )
    buffers: Text | None = Field(
        None, description="folder of shared trajectory buffers, each under its recipe's hash; default: inside the run"
    )
    fleet: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: experts are trained by Ray actors; off: in this process; auto: on if two or more fit",
    )
    experts_per_gpu: Annotated[Int, Field(ge=1)] = Field(1, description="experts trained at a time on one GPU")
    threads_per_expert: Annotated[Int, Field(ge=1, le=MOST_THREADS)] = Field(
        1, description="CPU threads, and cores, of one fleet expert"
    )
    expert_retries: Annotated[Int, Field(ge=0)] = Field(
        3, description="how often an expert that failed, or whose process died, is retried from its last part"
    )
    log: tuple[Text, ...] = Field(
        (),
        description="receivers of the run's events: wandb, an entry point of lad_dist.loggers, or module:attribute "
        "(docs/extending.md)",
    )
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()
    nodes: Annotated[Int, Field(ge=1)] = Field(1, description="hosts; more than one needs a cluster's launcher")
    gpus_per_node: Annotated[Int, Field(ge=0)] = Field(
        0, description="GPUs to use of each host; 0: one, if there is one"
    )
    ranks: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="processes that share a distillation, one device each; default: one per GPU, else 1"
    )
    rank_restarts: Annotated[Int, Field(ge=0)] = Field(
        3, description="how often the ranks restart from the last checkpoint after one of them died"
    )
    rank_timeout: Annotated[Float, Field(gt=0)] = Field(
        600.0, description="seconds that a rank waits for the others before it gives up"
    )

    @property
    def world(self) -> int:
        """Number of ranks that share a distillation or an evaluation."""
        gpus = 0 if self.device == "cpu" else self.nodes * self.gpus_per_node
        return self.ranks if self.ranks is not None else max(1, gpus)
