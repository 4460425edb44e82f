"""Packages that a recipe needs and a base installation may lack: asked for by name, before anything starts.

Nothing is imported: a package that is there and broken is `align doctor`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from align.check.findings import Findings
from align.data.media.opening import takes_media
from align.engines import EngineFacts
from align.errors import PluginError, SetupError
from align.recipe.capabilities import TrainStage
from align.recipe.engines import facts_of, those
from align.recipe.families import family_of
from align.recipe.optimizers import OPTIMIZERS
from align.recipe.schema import Recipe
from align.recipe.stages import Stage
from align.recipe.trained_on import quantisation_words
from align.stages.stage_start import Origin, adapter_of

# what transformers' loader of a quantised checkpoint imports, by `quant_method` (transformers.quantizers, 5.19)
_QUANTISERS = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "aqlm": ("aqlm", "aqlm[gpu,cpu]"),
    "auto-round": ("auto_round", "auto-round"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "higgs": ("flute", "flute-kernel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant[gpu]"),
    "sinq": ("sinq", "sinq"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}


class Need(NamedTuple):
    """module: what is imported; package: what pip calls it; key: of the recipe, that asks for it; instead: what to
    write to do without."""

    module: str
    package: str
    key: str
    instead: str
    stage: str | None = None


def check_packages(recipe: Recipe, found: Findings, *, cluster: bool = False) -> None:
    """Add a SetupError for every package that the recipe itself asks for and that is not here. cluster: stages run on
    nodes with packages of their own."""
    _check(of_recipe(recipe, cluster), found)


def check_model_packages(
    recipe: Recipe, config: Mapping[str, Any], origin: Origin, found: Findings, *, cluster: bool = False
) -> None:
    """The same for what the model and the adapter that it starts from ask for."""
    if not cluster:
        _check(of_model(recipe, config, origin), found)


def _check(needs: Iterator[Need], found: Findings) -> None:
    for need in needs:
        if not installed(need.module):
            found.add(
                SetupError(
                    f"the package {need.package!r} is not installed, and `{need.key}` needs it",
                    where=need.key,
                    remedy=f"pip install '{need.package}'{need.instead and ', or '}{need.instead}",
                ),
                need.stage,
            )


def installed(module: str) -> bool:
    """Whether a module can be found. Its parents are imported to look."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def of_recipe(recipe: Recipe, cluster: bool = False) -> Iterator[Need]:
    if recipe.report.wandb is not None:
        yield Need("wandb", "wandb", "report.wandb", "take it out of the recipe")
    if recipe.report.tensorboard:
        yield Need("tensorboard", "tensorboard", "report.tensorboard", "set `report.tensorboard: false`")
    if cluster:
        return
    for stage in recipe.stages:
        engine = _engine_of(stage)
        if engine is not None and engine.package is not None:
            [plain, *_] = those(lambda one: one.package is None)
            instead = f"set `rollout.name: {plain}`"
            yield Need(engine.package, engine.extra or engine.package, "rollout.name", instead, stage.id)
        if not isinstance(stage, TrainStage):
            continue
        if stage.adapter is not None and stage.adapter.quant is not None:
            yield Need("bitsandbytes", "bitsandbytes", "adapter.quant", "use `adapter: {kind: lora}`", stage.id)
        optimizer = OPTIMIZERS[stage.optim.name]
        if optimizer.package:
            instead = f"use {optimizer.saves or type(stage.optim)().name}"
            yield Need(optimizer.package, optimizer.package, "optim.name", instead, stage.id)
    strategy = recipe.placement.trainer.strategy.facts
    if strategy.package:
        yield Need(strategy.package, strategy.package, "placement.trainer.strategy", "leave it out")


def _engine_of(stage: Stage) -> EngineFacts | None:
    """None where there is none, or a user's does not load, which the rules of the recipe tell with its place."""
    try:
        return facts_of(stage.engines.name) if stage.engines is not None else None
    except PluginError:
        return None


def of_model(recipe: Recipe, config: Mapping[str, Any], origin: Origin) -> Iterator[Need]:
    packed = config.get("quantization_config") or {}
    words = quantisation_words(packed).partition(",")[0] if packed else ""
    if words in _QUANTISERS:
        yield Need(*_QUANTISERS[words], "model.path", f"give a base that {words} has not quantised")
    trained = [stage for stage in recipe.stages if stage.trains] if origin.adapter is not None else []
    if any(adapter_of(recipe, stage, origin).quant is not None for stage in trained):
        yield Need("bitsandbytes", "bitsandbytes", "model.adapter", "start from an adapter on full weights")
    if takes_media(config) or family_of(config) is not None:
        yield Need("PIL", "pillow", "model.path", "give a model of text")
        yield Need("cv2", "opencv-python-headless", "model.path", "give a model of text")
        yield Need("torchvision", "torchvision", "model.path", "give a model of text")
        if str(config.get("model_type")).startswith(("smolvlm", "idefics3")):
            yield Need("num2words", "num2words", "model.path", "give another model")
