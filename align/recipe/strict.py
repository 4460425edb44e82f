"""What every part of the recipe is made of: strict models and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


PositiveInt = Annotated[int, Field(gt=0, le=10**9)]  # of steps, rows, tokens, processes: more is a slip
LargeInt = Annotated[int, Field(gt=0, le=10**15)]  # of bytes and pixels
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
