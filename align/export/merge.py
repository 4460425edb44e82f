"""Base and adapter into one plain model folder, proved equal to what was trained: plan, validate, apply, prove.

1. Plan: which stored tensor each adapted module replaces; whether the head is untied. Refuses before it computes.
2. Validate, in float32: each merged module against base + adapter (peft's own forward) on random inputs.
3. Apply: rewrite the checkpoint file by file, aside.
   An adapter that was trained on weights in four bits is merged into those: the base is packed again, as it was.
4. Prove: every tensor read back bit by bit; the folder loaded in plain transformers, its weights compared with base +
   adapter in float64 (`merge_proof`), and what it says with what the adapter-on model says on random tokens, and on a
   picture where it reads images. A fault in any step leaves nothing behind; only then the folder is renamed into place.

Without an adapter the folder is copied and cast, under the same proofs.

An adapter of a reward model or classifier brings a score head: it takes the place of the language model head, and the
proofs compare, in place of the next token's distribution, whether a text is preferred to one of score 0, by output.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align.errors import ExportError, Unsupported
from align.export.checkpoint import Checkpoint, Replacements, open_checkpoint, rewrite, verify
from align.export.compare import BOUNDS, Distance, Sample, distance, log_probabilities, random_tokens, require_close
from align.export.images import image_samples
from align.export.merge_proof import Expected, expected_weights, require_weights
from align.export.merge_report import MergeReport
from align.model.adapter_config import read_adapter_config, refuse_beyond_lora, scores
from align.model.adapters import load_frozen, lora_layers
from align.model.folders import copy_all_but_weights, require_free, written_aside
from align.model.load import load_model, resolve_dtype
from align.model.quantised import Packed, quantise, quantised_layers
from align.model.score_head import (
    LANGUAGE_HEAD,
    WEIGHT,
    adapter_labels,
    edit_score_config,
    folder_labels,
    has_score_head,
    load_score_model,
    trained_head,
)
from align.model.weights import edit_config, merged_parameters, stored_names
from align.recipe.adapter_folder import quantised_base
from align.recipe.chat_files import ChatFiles
from align.recipe.labels import Labels
from align.recipe.trained_on import require_base

MODULE_BOUND = 1e-5
REPORT = "merge_report.json"


@dataclass(frozen=True)
class Plan:
    """modules: path of each adapted module -> names of the stored weight and bias that it replaces."""

    source: Checkpoint
    adapter: Path | None
    out: Path
    dtype: torch.dtype
    seed: int
    modules: dict[str, tuple[str, str | None]]
    untied: bool


@dataclass(frozen=True)
class Proofs:
    """errors: by module path; cast: merged folder against adapter-on; moved: adapter-on against base."""

    errors: dict[str, float]
    cast: Distance
    moved: Distance
    tensors: int
    bytes: int


def merge(
    base: Path,
    adapter: Path | None,
    out: Path,
    *,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    chat: ChatFiles | None = None,
    other_base: bool = False,
) -> MergeReport:
    """Write `base` with `adapter` merged in to the new folder `out`, proved as this module's docstring says.

    dtype: of the written weights; "auto" keeps the base's. seed: of the random inputs and tokens of the proofs. chat:
    tokenizer, template and ends of turns to write; None: what the adapter carries, else the base's. other_base: take
    this base also where the adapter was trained on another.
    Besides the model, `out` gets merge_report.json.

    Raises UserError where `out` holds files, ModelError or Unsupported where base or adapter cannot be used,
    ExportError where a proof fails; nothing is left behind then.
    """
    started = time.perf_counter()
    base, out, adapter = Path(base), Path(out), None if adapter is None else Path(adapter)
    require_free(out, "merged model")
    source = open_checkpoint(base)
    notes = [] if adapter is None else require_base(base, adapter, anyway=other_base)
    source, model = _loaded(source, adapter, trust_remote_code)
    tokens = random_tokens(model.config, seed)
    samples: list[Sample] = [*tokens, *image_samples(base, seed, trust_remote_code)]
    without = log_probabilities(model, samples)
    tied = _is_tied(model)
    peft = None if adapter is None else load_frozen(model, adapter, use="merge")
    written = source.dtype if dtype == "auto" else resolve_dtype(dtype, "cpu")
    plan = Plan(source, adapter, out, written, seed, *plan_modules(source, model, peft, tied))
    errors = {} if peft is None else prove_modules(peft, seed)
    trained = without if peft is None else log_probabilities(peft, samples)
    weights = {} if peft is None else expected_weights(peft, seed)
    with written_aside(out, "merged model") as aside:
        replaced = replacements(plan, peft)
        size = rewrite(source, aside, plan.dtype, replaced)
        copy_all_but_weights(base, aside)
        (chat or ChatFiles.of(base, adapter)).write(aside, base)
        edit_config(aside / "config.json", plan.dtype, untie=plan.untied)
        if has_score_head(model):
            edit_score_config(aside / "config.json", model)
        count = verify(source, aside, plan.dtype, replaced)
        replaced, peft, model = {}, None, None
        gc.collect()  # the proof loads a second model: let go of the first
        samples = [*tokens, *image_samples(aside, seed, trust_remote_code)]
        measured = prove_folder(aside, plan, trained, samples, weights, trust_remote_code)
        proofs = Proofs(errors, measured, distance(trained, without), count, size)
        report = _report(plan, proofs, notes, time.perf_counter() - started)
        (aside / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


def _loaded(source: Checkpoint, adapter: Path | None, trust_remote_code: bool) -> tuple[Checkpoint, Any]:
    """The base's model as the adapter was trained on it, and its stored tensors less the head that a score head takes
    the place of. Raises ModelError or Unsupported where base or adapter cannot be used."""
    base = source.folder
    config = None if adapter is None else read_adapter_config(adapter)
    brings_head = config is not None and scores(config)
    labels = adapter_labels(adapter) if adapter is not None and brings_head else folder_labels(base)
    scored = labels is not None
    if adapter is not None and config is not None:
        refuse_beyond_lora(config, adapter, "merge", score_head=scored)
    if scored:
        source = replace(source, files={k: v for k, v in source.files.items() if not k.startswith(LANGUAGE_HEAD)})
    model = _load(base, labels, trust_remote_code)
    packed = None if adapter is None else quantised_base(adapter)
    if packed is not None:  # the base that was trained on: the packed one
        quantise(model, packed.quant, packed.parts, dtype=resolve_dtype(packed.dtype, "cpu"))
    return source, model


def _load(folder: Path, labels: Labels | None, trust_remote_code: bool) -> Any:
    """With a score head of these labels, or (None) as a language model."""
    if labels is not None:
        return load_score_model(folder, dtype=torch.float32, seed=0, labels=labels, trust_remote_code=trust_remote_code)
    return load_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def plan_modules(
    source: Checkpoint, model: Any, peft: Any, tied: bool
) -> tuple[dict[str, tuple[str, str | None]], bool]:
    """The stored tensors that the adapted modules replace, and whether the head gets a weight of its own.

    Raises Unsupported where a module's weight is not stored under its own name.
    """
    modules: dict[str, tuple[str, str | None]] = {}
    untied = False
    stored = {} if peft is None else stored_names(model)
    for path in bare_packed(model):
        modules[path] = (_in_source(source, stored, path, f"{path}.weight"), None)
    for path, layer in () if peft is None else lora_layers(peft):
        is_tied_head = tied and layer is model.get_output_embeddings()
        untied = untied or is_tied_head
        weight, bias = f"{path}.weight", f"{path}.bias" if layer.lora_bias.get("default") else None
        if is_tied_head:
            modules[path] = (stored.get(weight, weight), None if bias is None else stored.get(bias, bias))
            continue
        weight = _in_source(source, stored, path, weight)
        modules[path] = (weight, None if bias is None else _bias_in_source(source, stored, path, bias))
    return modules, untied


def _in_source(source: Checkpoint, stored: dict[str, str], path: str, name: str) -> str:
    """The name that a parameter of module `path` is stored under. Raises Unsupported where it has none of its own."""
    found = stored.get(name, name)
    if found not in source.files:
        raise Unsupported(
            f"the base stores {path!r} under another name or fused with others",
            where=source.folder,
            remedy="save the base once with model.save_pretrained(folder) in transformers",
        )
    return found


def _bias_in_source(source: Checkpoint, stored: dict[str, str], path: str, name: str) -> str:
    if stored.get(name, name) not in source.files:
        raise Unsupported(
            f"the adapter has a bias for {path!r} (lora_bias), and the base has none there that could hold it",
            where=source.folder,
            remedy="serve the adapter as it is, in peft",
        )
    return _in_source(source, stored, path, name)


def bare_packed(model: Any) -> dict[str, Packed]:
    """Packed weights that no adapter is on, by the path of their layers."""
    layers = quantised_layers(model).items()
    return {path: layer.packed for path, layer in layers if not path.endswith(".base_layer")}


def replacements(plan: Plan, peft: Any) -> Replacements:
    """How to make each replaced tensor, float32, on demand: one merged weight exists at a time."""
    if peft is None:
        return {}
    layers = dict(lora_layers(peft))
    bare = bare_packed(peft.get_base_model())
    made: dict[str, Callable[[], Tensor]] = {}
    for path, (weight, bias) in plan.modules.items():
        if path in bare:
            made[weight] = bare[path].dense
            continue
        made[weight] = partial(_merged, layers[path], 0)
        if bias is not None:
            made[bias] = partial(_merged, layers[path], 1)
    model = peft.get_base_model()
    if has_score_head(model):
        made[WEIGHT] = lambda: trained_head(model).weight.detach()
    return made


def _merged(layer: Any, which: Literal[0, 1]) -> Tensor:
    tensor = merged_parameters(layer, "default")[which]
    assert tensor is not None
    return tensor


# ------------------------------------------------------------------------------------------------------- proofs


def prove_modules(peft: Any, seed: int) -> dict[str, float]:
    """Relative error of each merged module against base + adapter. Raises ExportError beyond MODULE_BOUND."""
    errors = {}
    for number, (path, layer) in enumerate(lora_layers(peft)):
        weight, bias = merged_parameters(layer, "default")
        errors[path] = module_error(layer, weight, bias, seed + number)
        if not errors[path] <= MODULE_BOUND:
            raise ExportError(
                f"the merged {path} differs from base + adapter by {errors[path]:.1e} (at most {MODULE_BOUND:.0e})",
                remedy="nothing was written; report this model and adapter",
            )
    return errors


@torch.no_grad()
def module_error(layer: Any, weight: Tensor, bias: Tensor | None, seed: int, samples: int = 32) -> float:
    """Largest over output features of rms(difference) / rms(output), on standard normal inputs, in float32.

    By feature, so that a wrong row shows however many right ones there are. A feature that is hardly ever used (below
    a thousandth of the layer's rms) is measured against the layer's.
    """
    inner = weight.shape[0] if getattr(layer, "fan_in_fan_out", False) else weight.shape[1]
    x = torch.randn(samples, inner, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    both = layer(x)
    alone = x @ (weight if getattr(layer, "fan_in_fan_out", False) else weight.T)
    alone = alone if bias is None else alone + bias
    scale = both.square().mean(0).sqrt()
    floor = 1e-3 * float(both.square().mean().sqrt())
    return float(((both - alone).square().mean(0).sqrt() / scale.clamp(min=max(floor, 1e-30))).max())


def prove_folder(
    folder: Path,
    plan: Plan,
    trained: list[Tensor],
    samples: list[Sample],
    weights: Mapping[str, Expected],
    trust_remote_code: bool,
) -> Distance:
    """Load a written folder in plain transformers and compare it with what was trained, weight by weight and in what
    it says. Raises ExportError."""
    model = _load(folder, folder_labels(folder), trust_remote_code)
    require_weights(model, weights, plan.dtype)
    measured = distance(trained, log_probabilities(model, samples))
    require_close(measured, BOUNDS[plan.dtype], "the merged model", plan.dtype)
    return measured


def _report(plan: Plan, proofs: Proofs, notes: list[str], seconds: float) -> MergeReport:
    dtype = str(plan.dtype).removeprefix("torch.")
    worst = max(proofs.errors, key=lambda path: proofs.errors[path], default=None)
    warnings = list(notes)
    if plan.adapter is not None and proofs.cast.kl_mean > 0.5 * proofs.moved.kl_mean:
        warnings.append(
            f"rounding to {dtype} costs a KL of {proofs.cast.kl_mean:.1e}, of the {proofs.moved.kl_mean:.1e} that the "
            "adapter moves the model by: merge in float32 to keep what was trained"
        )
    return MergeReport(
        base=str(plan.source.folder),
        adapter=None if plan.adapter is None else str(plan.adapter),
        out=str(plan.out),
        dtype=dtype,
        modules=len(proofs.errors),
        module_error=0.0 if worst is None else proofs.errors[worst],
        module_bound=MODULE_BOUND,
        worst_module=worst,
        untied_head=plan.untied,
        kl_mean=proofs.cast.kl_mean,
        kl_max=proofs.cast.kl_max,
        kl_bound=BOUNDS[plan.dtype].kl,
        top1=proofs.cast.top1,
        top1_bound=BOUNDS[plan.dtype].top1,
        adapter_kl=proofs.moved.kl_mean,
        tensors=proofs.tensors,
        bytes=proofs.bytes,
        seed=plan.seed,
        seconds=round(seconds, 3),
        warnings=tuple(warnings),
    )
