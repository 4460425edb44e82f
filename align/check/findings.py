"""Problems gathered over a whole check, so that a user corrects them in one go, each with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from align.errors import UserError
from align.recipe.document import Document
from align.recipe.grammar import keys_of, stage_models
from align.recipe.schema import Recipe

_STAGE_KEYS = frozenset(key for stage in stage_models().values() for key in keys_of(stage))


class Findings:
    """What was found wrong. `document`, where there is one, turns dotted keys into lines of the recipe."""

    def __init__(self, document: Document | None = None):
        self.document = document
        self.errors: list[UserError] = []

    def add(self, error: UserError, stage: str | None = None, key: str | None = None) -> None:
        """Keep an error, each once. A key of a stage (`rollout.weights`) gets the stage's place; an error about a file
        keeps the file as its place and says in which `key` of the recipe it is named."""
        where, what = self._placed(error.where or key, stage), error.what
        if key and error.where and where == error.where:
            what = f"{what}\n  named at {self._placed(key, stage)}"
        placed = type(error)(what, where=where, remedy=error.remedy)
        if str(placed) not in [str(known) for known in self.errors]:
            self.errors.append(placed)

    @contextmanager
    def gather(self, stage: str | None = None, key: str | None = None) -> Iterator[None]:
        """Keep a UserError of the block and go on."""
        try:
            yield
        except UserError as error:
            self.add(error, stage, key)

    def raise_any(self) -> None:
        """The only error as it is, or one error that lists them all."""
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        listed = "\n".join(str(error) for error in self.errors)
        raise UserError(f"{len(self.errors)} problems\n{listed}")

    def _placed(self, where: str | None, stage: str | None) -> str | None:
        first = (where or "").partition(".")[0]
        if where is None:
            dotted = f"stages.{stage}" if stage else None
        elif stage and first in _STAGE_KEYS:
            dotted = f"stages.{stage}.{where}"
        elif first in Recipe.model_fields:
            dotted = where
        else:
            return where  # a file, or file:line
        return self.document.place(dotted) if self.document and dotted else dotted
