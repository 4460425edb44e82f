"""What is said of a step in which engines or reward actors were lost: those who hold them start them again, and the
stage goes on; the user hears of it."""

from __future__ import annotations

from align.protocols.trainer import Metrics


def lost_words(stage_id: str, step: int, metrics: Metrics) -> str | None:
    """Of a step's metrics; None where nothing was lost."""
    engines, actors = (int(metrics.get(name, 0)) for name in ("rollout/restarts", "reward/restarts"))
    again = int(metrics.get("rollout/reissued", 0))
    said = []
    if engines:
        groups = f" ({again} group{'s are' if again != 1 else ' is'} sampled again)" if again else ""
        said.append(f"{_counted(engines, 'engine was', 'engines were')} lost and started again{groups}")
    if actors:
        said.append(f"{_counted(actors, 'reward actor was', 'reward actors were')} lost and started again")
    if not said:
        return None
    return f"{stage_id}: step {step}: {', '.join(said)}; what they printed last is in the run's logs/"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
