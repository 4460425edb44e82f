"""Checks of a model folder that nobody has tried here before: does every way that a run takes it give the same values?

Each check stands alone and goes on after another's failure; the first, loading, is what all of them need. Written
folders go below a working folder, which the caller removes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from align.errors import AlignError, ModelError
from align.export.compare import BOUNDS, distance, log_probabilities, random_tokens
from align.export.export import ENGINES, TIME_LIMIT_S, export
from align.export.images import image_samples
from align.export.merge import merge
from align.model import adapters
from align.model.load import load_model
from align.model.lora_targets import fresh_config, linear_modules, targeted_modules
from align.model.parts import parts_of, sizes
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.recipe.adapter import PARTS, Adapter, Part

Status = Literal["passed", "failed", "not checked"]
SCALE = 0.05  # of the random lora_B: far enough from the base to see, near enough to stay a model


@dataclass(frozen=True)
class Check:
    """One line of the suite's table. detail: what was measured, or what went wrong."""

    name: str
    status: Status
    detail: str
    seconds: float


@dataclass
class Subject:
    """The model under test. Checks that change it load their own."""

    folder: Path
    work: Path
    trust_remote_code: bool
    engines: tuple[str, ...]
    time_limit_s: float
    tuned: Adapter = field(default_factory=Adapter)  # then LoRA wherever the model has linear layers

    def load(self) -> Any:
        return load_model(self.folder, dtype=torch.float32, trust_remote_code=self.trust_remote_code)

    def samples(self, model: Any, folder: Path | None = None) -> list[Any]:
        pictures = image_samples(folder or self.folder, 0, self.trust_remote_code)
        return [*random_tokens(model.config, 0), *pictures]


def run_suite(
    folder: Path,
    work: Path,
    *,
    trust_remote_code: bool = False,
    engines: tuple[str, ...] = ENGINES,
    time_limit_s: float = TIME_LIMIT_S,
) -> Iterator[Check]:
    """The checks of the model in `folder`, each as soon as it is done. work: an empty folder for what is written."""
    subject = Subject(folder, work, trust_remote_code, engines, time_limit_s)
    checks: list[tuple[str, Callable[[Subject], Iterator[tuple[str, Status, str]]]]] = [
        ("loads in transformers", _loads),
        ("reads a picture", _reads_a_picture),
        ("packed = padded", _packed),
        ("LoRA targets", _targets),
        ("adapter is saved and loaded", _round_trip),
        ("merge = adapter on", _merges),
        ("export", _exports),
    ]
    for number, (name, check) in enumerate(checks):
        started = time.perf_counter()
        failed = False
        try:
            for line, status, detail in check(subject):
                yield Check(line or name, status, detail, round(time.perf_counter() - started, 1))
        except AlignError as error:
            failed = True
            yield Check(name, "failed", str(error), round(time.perf_counter() - started, 1))
        if failed and number == 0:
            return


Lines = Iterator[tuple[str, Status, str]]


def _loads(subject: Subject) -> Lines:
    model = subject.load()
    found = ", ".join(f"{part} {size:,}" for part, size in sizes(model).items())
    yield "", "passed", f"{type(model).__name__}; parameters: {found}"


def _reads_a_picture(subject: Subject) -> Lines:
    """Two pictures under one question must give other values, as text and token counts cannot."""
    model = subject.load()
    if parts_of(model).one:
        yield "", "not checked", "a model of text"
        return
    pictures = [image_samples(subject.folder, seed, subject.trust_remote_code) for seed in (0, 1)]
    if not pictures[0]:
        yield (
            "",
            "failed",
            "the folder has no processor: copy its preprocessor_config.json beside the weights",
        )
        return
    one, two = (log_probabilities(model, sample)[0] for sample in pictures)
    apart = float((one - two).abs().max()) if one.shape == two.shape else float("inf")
    tokens = pictures[0][0]["input_ids"].shape[1]
    words = f"{tokens} tokens; another picture moves log-probabilities by {apart:.2g}"
    yield "", "passed" if apart > 0 else "failed", words


def _packed(subject: Subject) -> Lines:
    """The probe of every training run: packed trees against the model's own forward, with a picture where it sees."""
    module = PolicyModule(subject.load())
    difference = probe(module)
    words = f"{module.layout} ({module.attention}): largest difference {difference:.1e}"
    yield "", "passed", words


def _targets(subject: Subject) -> Lines:
    """LoRA on each part reaches all of its linear layers but the output head, and no other's."""
    model = subject.load()
    parts = parts_of(model)
    linear = {part: [name for name in linear_modules(model) if parts.of(name) == part] for part in PARTS}
    offered: list[Part] = [part for part in PARTS if linear[part]]
    for part in sizes(model):
        if part not in offered:
            yield f"LoRA targets: {part}", "not checked", "it has no linear layer: full or frozen"
            continue
        found = targeted_modules(model, fresh_config(model, _lora_on([part])))
        missed = set(linear[part]) - found
        others = {name for name in found if parts.of(name) != part}
        heads = {name for name in missed if model.get_submodule(name) is model.get_output_embeddings()}
        fine = not others and missed <= heads
        detail = f"{len(found)} layers" if fine else f"missed {sorted(missed - heads)[:3]}, others {sorted(others)[:3]}"
        yield f"LoRA targets: {part}", "passed" if fine else "failed", detail
    subject.tuned = _lora_on(offered)


def _lora_on(parts: list[Part]) -> Adapter:
    return Adapter.model_validate(
        {"rank": 4, "alpha": 8, "tune": {part: "lora" if part in parts else "frozen" for part in PARTS}}
    )


def _round_trip(subject: Subject) -> Lines:
    """An adapter with random weights, saved, and loaded on a fresh model."""
    model = subject.load()
    samples = subject.samples(model)
    base = log_probabilities(model, samples)
    peft = adapters.attach(model, subject.tuned, None, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in adapters.lora_layers(peft):
            weight = layer.lora_B["default"].weight
            weight.add_(SCALE * torch.randn(weight.shape, generator=generator))
    trained = log_probabilities(peft, samples)
    adapters.save(peft, subject.work / "adapter")
    again = adapters.attach(subject.load(), None, subject.work / "adapter", seed=1)
    apart = distance(trained, log_probabilities(again, samples))
    moved = distance(trained, base)
    if not apart.kl_mean <= BOUNDS[torch.float32].kl:
        raise ModelError(f"the loaded adapter differs from the saved one by a KL of {apart.kl_mean:.1e}")
    yield "", "passed", f"KL {apart.kl_mean:.1e}, of the {moved.kl_mean:.1e} that it moves the model by"


def _merges(subject: Subject) -> Lines:
    if not (subject.work / "adapter").is_dir():
        yield "", "not checked", "there is no adapter to merge"
        return
    report = merge(
        subject.folder,
        subject.work / "adapter",
        subject.work / "merged",
        dtype="float32",
        trust_remote_code=subject.trust_remote_code,
    )
    yield "", "passed", f"{report.modules} modules, each within {report.module_error:.1e}; KL {report.kl_mean:.1e}"


def _exports(subject: Subject) -> Lines:
    """The merged folder (or the model's own), exported and loaded in transformers and in the engines."""
    source = subject.work / "merged"
    report = export(
        source if source.is_dir() else subject.folder,
        subject.work / "exported",
        dtype="float32",
        trust_remote_code=subject.trust_remote_code,
        time_limit_s=subject.time_limit_s,
        engines=subject.engines,
    )
    for check in report.checks:
        proved = check.status == "proved"
        said = f"largest difference {check.max_difference:.1e}" if proved else ""
        detail = "; ".join(text for text in (said, check.message) if text)
        yield f"export loads in {check.loader}, same values", "passed" if proved else "not checked", detail
