"""What the probe found: how a model is computed from now on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["shared", "padded", "alone"]


@dataclass(frozen=True)
class Verdict:
    """How a model is computed from now on, and why not better.

    why: what was tried before and is wrong with it, and what was not exchanged. notes: what else a user may want to
    know. difference: largest, from the model's own forward in the trained dtype; own_error, error: mean, of that
    forward and of this one, against float32.
    """

    layout: Layout
    attention: str
    why: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    difference: float = 0.0
    own_error: float = 0.0
    error: float = 0.0

    @property
    def slower(self) -> bool:
        """Whether something was given up that costs speed: packed trees, the attention asked for, an exchanged part."""
        return bool(self.why)

    @property
    def words(self) -> str:
        return {
            "shared": f"packed, shared prompts once ({self.attention})",
            "padded": f"a sequence a row, shared prompts repeated ({self.attention} attention)",
            "alone": f"one sequence at a time, shared prompts repeated ({self.attention} attention)",
        }[self.layout]
