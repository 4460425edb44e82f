"""The recipe as strict types. Grammar and defaults; no torch, ray, vllm or transformers import.

Every key is spelled out: an unknown one is an error. Cross-checks that need only the recipe live here as validators
(`stages` has those of one stage, `parts` what stages share); those that need files, templates or plugins belong to
`align check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from align.recipe.inputs import Media, Model
from align.recipe.placement import Placement
from align.recipe.stages import Stage
from align.recipe.strict import Strict


class Report(Strict):
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None


class Recipe(Strict):
    """A whole recipe. Made by `align.recipe.load_recipe`, whose errors name file, line and remedy."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    output: str = "runs"
    model: Model
    media: Media = Media()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    placement: Placement = Placement()
    report: Report = Report()

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"{value!r} is a URL, and runs are written to a folder: give a shared path that every node mounts "
                "(a bucket mounted by s3fs, gcsfuse or the like is one)"
            )
        return value

    @property
    def run_folder(self) -> Path:
        """Where the run lies: `output`/`name`."""
        return Path(self.output) / self.name

    def stage(self, stage_id: str) -> Any:
        return next(s for s in self.stages if s.id == stage_id)

    def before(self, stage_id: str) -> Iterator[Any]:
        for stage in self.stages:
            if stage.id == stage_id:
                return
            yield stage

    @model_validator(mode="after")
    def _stage_graph(self) -> Recipe:
        seen: dict[str, Any] = {}
        for stage in self.stages:
            if stage.id in seen:
                raise ValueError(f"two stages have the id {stage.id!r}; ids name folders and must differ")
            alike = next((name for name in seen if name.lower() == stage.id.lower()), None)
            if alike is not None:
                raise ValueError(
                    f"the stages {alike!r} and {stage.id!r} differ in capitals only, and name one folder on file "
                    "systems that do not tell them apart"
                )
            wanted = [stage.from_.partition("@")[0]] if stage.from_ else []
            wanted += [name.partition("@")[0] for name in getattr(stage, "of", ())]
            for source in wanted:
                if source not in seen:
                    known = ", ".join(seen) or "none"
                    raise ValueError(f"stage {stage.id!r} builds on {source!r}, which is no earlier stage ({known})")
                if seen[source].kind == "evaluate":
                    raise ValueError(f"stage {stage.id!r} builds on {source!r}, an evaluate stage: it makes no model")
            seen[stage.id] = stage
        return self
