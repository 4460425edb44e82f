"""What every part of the recipe is made of: strict models and numbers with bounds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


PositiveInt = Annotated[int, Field(gt=0, le=10**9)]  # of steps, rows, tokens, processes: more is a slip
LargeInt = Annotated[int, Field(gt=0, le=10**15)]  # of bytes and pixels
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


_NAME = re.compile(r"\w[\w.-]*")


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is to be the name of metrics and objectives: letters, digits, `_`, `-` and `.` alone, and "
            "one of the first three at its beginning"
        )
    return name


Name = Annotated[str, AfterValidator(_plain)]  # of metrics and of what lies in files by it
