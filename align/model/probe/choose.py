"""The two-tree probe: which layout computes what the model's own forward computes. It decides, not a list of names.

At load, two small random trees, one of them on a picture where the model takes images, are run through the packed
forward, kernel by kernel, and where none agrees through the padded one. What they are held against are the values of
the untouched model (`align.model.probe.own`). Two questions are asked apart, since only one of them has noise in it:

- Is it the same function? In float32, layer by layer with the model's real weights, module by module, to the rounding
  of float32: a state that is carried on, a view of a neighbour, a forgotten window, another rotation, a lost bias or
  clamp is a difference of the module's own size there, however small its weights are and however loud the logits.
- Is it as exact in the dtype that is trained? Its error against float32 may be a few times that of the model's own
  forward in that dtype, whatever that is: a pretrained model's bfloat16 is off by 0.03 to 0.15 in a log-probability.

What was exchanged for speed and computes something else is given back, by name; then the next layout is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from align.errors import ModelError
from align.model.attention.interface import kernels_for
from align.model.backbone import text_backbone
from align.model.policy_module import PolicyModule
from align.model.probe.faults import Fault, errors, long_rows_fail, precision, structure
from align.model.probe.give_back import class_names, exchange_again, give_back, given_back_words
from align.model.probe.own import Own, backbone_path, measure
from align.model.probe.rotary_lengths import lengths_of
from align.model.probe.verdict import Layout, Verdict
from align.model.score_head import has_score_head

log = logging.getLogger(__name__)


def probe(module: PolicyModule) -> float:
    """Choose the module's layout and attention, leave the verdict on it, and return the largest difference from the
    model's own forward.

    The own values are those that `align.model.probe.own.measure` took before anything was exchanged, where the module
    has them, or the model's as it is now.
    Raises ModelError where no layout agrees, or where the own forward is random, fails, or looks ahead.
    """
    model = module.model
    own = module.untouched or measure(model, temperature=module.transform.temperature, autocast=module.autocast)
    module.untouched = None
    was_training = module.training
    module.eval()
    try:
        with own.conditions(model), _no_kept_features(module):
            module.lengths = lengths_of(text_backbone(model), backbone_path(model))
            module.verdict = _choose(module, own)
    finally:
        own.picture.close()
        module.train(was_training)
    _report(module)
    return module.verdict.difference


def _choose(module: PolicyModule, own: Own) -> Verdict:
    given_back: list[str] = []
    for again in (False, True):
        tried: list[str] = []
        for layout, attention in _candidates(module):
            fault = _judged(module, own, layout, attention, given_back)
            if fault is None:
                difference, own_error, error = errors(module, own)
                notes = () if module.lengths is None else (module.lengths.words,)
                return Verdict(layout, attention, (*tried, *given_back), notes, difference, own_error, error)
            tried.append(f"{layout} ({attention}): {fault.reason}")
        kinds = {} if again else give_back(module.model, None)
        if not kinds:
            break
        given_back.append(f"{class_names(kinds)} keep their own forward: with the exchanged one no layout agrees")
    what = "scores" if has_score_head(module.model) else "log-probabilities"
    raise ModelError(
        f"{type(module.model).__name__} gives other {what} than its own forward, in packed trees and also where each "
        f"sequence has a row of its own. Tried {'; '.join(tried)}",
        remedy="choose a causal language model, and one without dropout outside training",
    )


def _candidates(module: PolicyModule) -> Iterator[tuple[Layout, str]]:
    """Layouts and attentions to try, best first."""
    weight = next(module.model.parameters())
    dropout = module.trains_with_attention_dropout()
    for kernel in kernels_for(module.wanted_attention, weight.device, module.autocast or weight.dtype, dropout=dropout):
        yield "shared", kernel
    yield "padded", "sdpa"
    yield "padded", "eager"
    yield "alone", "eager"


def _judged(module: PolicyModule, own: Own, layout: Layout, attention: str, given_back: list[str]) -> Fault | None:
    """What is wrong with a layout, if anything. Classes whose exchange is what is wrong are given back on the way."""
    tried: tuple[str | None, type[nn.Module], dict[type[nn.Module], int]] | None = None
    while True:
        module.use(layout, attention)
        fault = structure(module, own)
        if fault is None and own.low is not None:
            module.use(layout, attention)
            fault = precision(module, own)
        if fault is None and layout != "shared":
            fault = long_rows_fail(module)
        if fault is not None and tried is not None and fault.path == tried[0]:
            exchange_again(module.model, *tried[1:])  # it was not the exchange
            given_back.pop()
            return fault
        if fault is None or fault.path is None:
            return fault
        exchanged = type(module.model.get_submodule(fault.path))
        kinds = give_back(module.model, fault.path)
        if not kinds:
            return fault
        tried = fault.path, exchanged, kinds
        given_back.append(given_back_words(kinds, fault.reason))


@contextmanager
def _no_kept_features(module: PolicyModule) -> Iterator[None]:
    """Features of the probe's picture are of several dtypes: none is kept."""
    if module.media is None:
        yield
        return
    limit, module.media.limit = module.media.limit, 0
    try:
        yield
    finally:
        module.media.limit = limit


def _report(module: PolicyModule) -> None:
    verdict = module.verdict
    assert verdict is not None
    if verdict.slower:
        log.warning("%s is computed %s. %s", type(module.model).__name__, verdict.words, "; ".join(verdict.why))
