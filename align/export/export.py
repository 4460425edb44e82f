"""A model folder for others, in the format that they load, proved by loading it (`align.export.formats`)."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.errors import ModelError, Unsupported
from align.export.formats import OWN, Proof, load_format
from align.export.load_proof import LoadCheck
from align.model.adapter_config import CONFIG as ADAPTER_CONFIG
from align.model.folders import require_free, written_aside
from align.model.score_head import scoring
from align.model.scoring_class import nobody_elses, own_class_for
from align.recipe.engines import those

log = logging.getLogger(__name__)

ENGINES = tuple(those(lambda engine: engine.loads_exports))
REPORT = "export_report.json"
TIME_LIMIT_S = 900.0


@dataclass(frozen=True)
class ExportReport:
    """What was exported and which loaders took it."""

    source: str
    out: str
    format: str
    dtype: str
    tensors: int
    bytes: int
    files: tuple[str, ...]
    checks: tuple[LoadCheck, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    folder: Path,
    out: Path,
    *,
    format: str = OWN,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
    engines: tuple[str, ...] = ENGINES,
) -> ExportReport:
    """Write the plain model in `folder` to the new folder `out` in `format` and `dtype`, proved by loading it.

    dtype: "auto" keeps the stored one. engines: rollout engines that must load it, where they are installed.
    Besides the model, `out` gets export_report.json.

    Raises UserError where `out` holds files, ModelError or Unsupported where `folder` cannot be exported, ExportError
    where a loader fails, takes longer than `time_limit_s` seconds, or computes something else; nothing is left then.
    """
    started = time.perf_counter()
    folder, out = Path(folder), Path(out)
    try:
        form = load_format(format)
    except ValueError as error:
        raise Unsupported(str(error), where="format") from None
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError("this is an adapter, not a whole model", where=folder, remedy="merge it first")
    if scoring(folder) and (model_type := own_class_for(folder)) is not None:
        raise nobody_elses(model_type)
    require_free(out, "export")
    plan = form.plan(folder, dtype)
    with written_aside(out, "export") as aside:
        written = form.write(plan, aside)
        checks = form.prove(plan, aside, Proof(engines, seed, trust_remote_code, time_limit_s))
        report = ExportReport(
            source=str(folder),
            out=str(out),
            format=format,
            dtype=str(plan.dtype).removeprefix("torch."),
            tensors=written.tensors,
            bytes=written.bytes,
            files=written.files,
            checks=checks,
            seconds=round(time.perf_counter() - started, 3),
        )
        (aside / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    for check in checks:
        if check.message:
            log.warning("%s: %s in %s: %s", out, check.status, check.loader, check.message)
    return report
