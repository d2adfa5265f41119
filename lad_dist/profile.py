"""The typed cluster profile: *where* a job runs. Read with the same care as a recipe (see ``recipe_file.py``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lad_dist.recipe import Int, Text


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
