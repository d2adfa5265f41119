"""The typed cluster profile: *where* a job runs. Read with the same care as a recipe (see ``recipe_file.py``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lad_dist.recipe import Bool, Float, Int, Text


class RayConfig(BaseModel):
    """The Ray cluster that the fleet of experts runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    address: Text | None = Field(
        None, description="a running cluster's address; default: RAY_ADDRESS, else a cluster of its own on this machine"
    )
    dashboard: Bool = Field(True, description="serve the dashboard of a cluster of its own, on the loopback address")
    object_store_mb: Annotated[Int, Field(ge=80)] | None = Field(
        None, description="shared memory of a cluster of its own, MiB; default: what the training images need, at least 80"
    )


class Profile(BaseModel):
    """One place to run on. Nothing here changes what is computed, only where and with how much of the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: Text = Field("local", description="how the profile is called")
    launcher: Literal["local"] = Field("local", description="local: in this process on this machine")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a CUDA GPU if there is one, else the CPU")
    threads: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="CPU threads; default: as many as there are cores"
    )
    buffers: Text | None = Field(
        None, description="folder of shared trajectory buffers, each under its recipe's hash; default: inside the run"
    )
    fleet: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: experts are trained by Ray actors; off: in this process; auto: on where two or more fit",
    )
    experts_per_gpu: Annotated[Int, Field(ge=1)] = Field(1, description="experts trained at a time on one GPU")
    threads_per_expert: Annotated[Int, Field(ge=1)] = Field(1, description="CPU threads, and cores, of one fleet expert")
    expert_retries: Annotated[Int, Field(ge=0)] = Field(
        3, description="how often an expert that failed, or whose process died, is tried again from its last part"
    )
    ray: RayConfig = RayConfig()
    nodes: Annotated[Int, Field(ge=1)] = Field(1, description="hosts; more than one needs a cluster's launcher")
    gpus_per_node: Annotated[Int, Field(ge=0)] = Field(0, description="GPUs to use of each host; 0: one, if there is one")
    ranks: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="processes that share a distillation, one device each; default: one per GPU, else 1"
    )
    rank_restarts: Annotated[Int, Field(ge=0)] = Field(
        3, description="how often the ranks start again from the last checkpoint after one of them died"
    )
    rank_timeout: Annotated[Float, Field(gt=0)] = Field(
        600.0, description="seconds that a rank waits for the others before it gives up"
    )

    @property
    def world(self) -> int:
        """How many ranks share a distillation or an evaluation."""
        return self.ranks if self.ranks is not None else max(1, self.nodes * self.gpus_per_node)
