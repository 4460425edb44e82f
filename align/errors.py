"""One class per cause that a user can meet.

Every error says what was wrong, where, and what to do. The command line prints exactly that, without a traceback,
and exits with ``exit_code``: 2 where the user's input must change, 1 where something failed while it ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class AlignError(Exception):
    """A failure with a place and a remedy.

    Args:
        what: one sentence: what was wrong, with the offending value.
        where: file, file:line, or the dotted key; shown before the sentence.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  -> {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # keyword arguments do not survive pickle's default; Ray pickles exceptions
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(cls: type[AlignError], what: str, where: str | None, remedy: str | None) -> AlignError:
    return cls(what, where=where, remedy=remedy)


class UserError(AlignError):
    """The user's input must change before this can work."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe or an override is wrong: unknown key, wrong type, impossible combination."""


class DataError(UserError):
    """A data file is missing or unreadable, or a row cannot be used."""


class ModelError(UserError):
    """The model, tokenizer, adapter or chat template cannot be used as asked."""


class PluginError(UserError):
    """A plugin (reward, loss, data generator) was not found or does not fit."""


class PlacementError(UserError):
    """The cluster cannot hold what the recipe asks for."""


class RunFolderError(UserError):
    """The run folder exists, differs from the recipe, or cannot be resumed."""


class SetupError(UserError):
    """A package or system facility that this recipe needs is missing or broken on this machine."""


class Unsupported(UserError):
    """Understood, but not offered by this version; the message says what to use instead."""


class EngineError(AlignError):
    """A generation engine failed, or holds weights other than those it was sent."""


class StalenessError(AlignError):
    """A group that is older than the recipe allows was about to be trained on."""


class RewardError(AlignError):
    """Rewards failed more often than the recipe allows."""


class CheckpointError(AlignError):
    """A checkpoint is incomplete, damaged or does not fit the run."""


class ExportError(AlignError):
    """A merge or export could not be proved equal to what was trained."""


class NonFiniteError(AlignError):
    """Loss or gradient was not finite for too many steps in a row."""


class LostError(AlignError):
    """A process of the run, or the node that it was on, is gone. To start again from the last checkpoint may help."""


class EngineLostError(EngineError, LostError):
    """An engine's process or node went while it started, or again and again: the fleet alone cannot replace it."""


class RanksError(LostError):
    """Another rank of the trainer ended, or stopped answering."""


class Interrupted(AlignError):
    """The user stopped the run; a checkpoint was saved and ``--resume`` continues it."""

    exit_code = 130
