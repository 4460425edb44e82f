"""The probe at load: what it accepts, what it gives a row per sequence, what it refuses, and what it says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.packing import collate
from align.errors import ModelError
from align.model import policy_module
from align.model.attention.interface import NAME
from align.model.attention.plan import AttentionPlan
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.model.probe.rows import two_tree_batch
from align.protocols.trees import Medium
from tests import tiny_vlms
from tests.architectures import make
from tests.unit.core.families import BASE, make_family
from tests.unit.core.pictures import open_workshop
from tests.unit.core.test_families import trees


def hooked(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> PolicyModule:
    """The model with a first layer whose feed-forward output is changed."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: change(out))
    return PolicyModule(model)


def test_a_layer_that_looks_one_token_back_gets_a_row_a_sequence_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = hooked(make_family("qwen3"), lambda out: out + torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1])
    with caplog.at_level(logging.INFO, logger="align.model.probe"):
        assert probe(module) < 1e-5
    assert (module.layout, module.attention) == ("padded", "sdpa")
    assert len(caplog.messages) == 1
    assert "a sequence a row" in caplog.text
    assert "model.layers.0.mlp is" in caplog.text and "carries a state from one sequence to the next" in caplog.text


def test_a_layer_that_looks_ahead_is_refused_by_name() -> None:
    module = hooked(make_family("qwen3"), lambda out: out + torch.nn.functional.pad(out, (0, 0, 0, 1))[:, 1:])
    with pytest.raises(ModelError, match=r"beyond the causal prefix: what model\.layers\.0\.mlp makes"):
        probe(module)


def test_a_model_that_looks_ahead_behind_a_prefix_of_its_own_is_refused() -> None:
    """Its modules see more places than the row has tokens, so that none of them can be compared token by token."""
    with pytest.raises(ModelError, match="log-probabilities change with the tokens after them"):
        probe(PolicyModule(make("cpmant").eval()))


def test_dropout_that_is_left_on_outside_training_is_refused() -> None:
    module = hooked(make_family("qwen3"), lambda out: torch.nn.functional.dropout(out, 0.1, training=True))
    with pytest.raises(ModelError, match="other values each time"):
        probe(module)
    in_training = PolicyModule(make_family("qwen3", attention_dropout=0.3).train())
    assert probe(in_training) < 1e-5
    assert in_training.trains_with_attention_dropout()
    assert not PolicyModule(make_family("qwen3")).trains_with_attention_dropout()


@pytest.mark.parametrize("window", [3, 4096])
def test_a_window_that_the_kernel_forgets_is_found_however_long_it_is(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_family("mistral", sliding_window=window)
    assert probe(PolicyModule(model)) < 1e-5
    assert model.config.sliding_window == window
    from align.model.attention import interface

    whole = interface.sdpa_attention
    monkeypatch.setattr(interface, "sdpa_attention", lambda *a, **kw: whole(*a, **(kw | {"sliding_window": None})))
    module = PolicyModule(model)
    assert probe(module) < 1e-5
    assert module.layout == "padded"
    assert model.config.sliding_window == window


def test_wrong_positions_of_m_rope_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("qwen2_5_vl")
    text = model.model.language_model
    rotate = text.rotary_emb.forward

    def of_the_row(x: torch.Tensor, positions: torch.Tensor) -> Any:
        return rotate(x, torch.arange(x.shape[1]).expand(positions.shape))

    text.rotary_emb.forward = of_the_row  # a branch no longer continues its trunk
    module = PolicyModule(model)
    assert probe(module) < 1e-5
    assert module.layout == "padded"


def test_the_vision_tower_keeps_its_own_attention() -> None:
    module = PolicyModule(make_family("qwen2_5_vl"))
    config = module.model.config
    assert config.text_config._attn_implementation == NAME
    assert config.vision_config._attn_implementation == "eager"


def test_images_for_a_model_without_a_tower_are_refused() -> None:
    batch = collate(trees())
    batch.media, batch.media_at = (Medium("image", "key", "/nowhere", 0, 1, 1),), (0,)
    with pytest.raises(ModelError, match="takes no images"):
        PolicyModule(make_family("qwen2"))(batch)


def test_a_forward_that_takes_no_plan_is_told_clearly_and_gets_a_row_a_sequence() -> None:
    model = make_family("llama")
    whole = model.model.forward

    def narrow(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: bool = False) -> Any:
        return whole(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    module = PolicyModule(model)
    model.model.forward = narrow
    with pytest.raises(
        ModelError, match=r"cannot be run over packed trees: .*unexpected keyword argument 'align_plan'"
    ):
        module(collate(trees()))
    monkey = model.forward
    model.forward = lambda input_ids, attention_mask=None, use_cache=False: _logits(model, input_ids, attention_mask)
    assert probe(module) < 1e-5
    assert module.layout == "padded"
    model.forward = monkey


def _logits(model: Any, input_ids: Any, attention_mask: Any) -> Any:
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return type("Output", (), {"logits": model.lm_head(hidden)})


def test_a_model_whose_attention_cannot_be_registered_gets_a_row_a_sequence() -> None:
    config = AutoConfig.for_model("bloom", **BASE, n_head=4, n_layer=2)
    module = PolicyModule(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match="lets no attention be registered"):
        module(collate(trees()))
    assert probe(module) < 1e-5
    assert module.layout == "padded"


def test_a_model_that_fails_on_longer_rows_alone_is_refused_at_load() -> None:
    """As transformers' Reformer does with positions, and xLSTM's recurrence in bfloat16: no short row reaches it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **BASE, n_head=4, n_layer=2))
    own = model.transformer.forward

    def short_only(input_ids: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 64:
            raise RuntimeError("upper bound and lower bound inconsistent with step sign")
        return own(input_ids, **kwargs)

    model.transformer.forward = short_only
    with pytest.raises(ModelError, match=r"in rows of 290 tokens .*upper bound"):
        probe(PolicyModule(model))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16_noise_passes_and_a_wrong_plan_does_not(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("qwen3")
    if how == "weights":
        model = model.to(torch.bfloat16)
    module = PolicyModule(model, autocast=torch.bfloat16 if how == "autocast" else None)
    assert 0 < probe(module) < 0.25
    assert module.layout == "shared"

    def parentless(batch: Any, kernel: str, blocks: Any) -> AttentionPlan:
        plan = plan_attention(batch, kernel, blocks)
        return AttentionPlan([(a, b, 0, 0) for a, b, *_ in plan.segments], plan.device, kernel)

    plan_attention = policy_module.plan_attention
    monkeypatch.setattr(policy_module, "plan_attention", parentless)
    probe(module)
    assert module.layout == "padded"


def test_a_reference_follows_its_policys_layout() -> None:
    policy, reference = PolicyModule(make_family("qwen3_next")), PolicyModule(make_family("qwen3_next"))
    probe(policy)
    reference.follow(policy)
    batch, _ = two_tree_batch(97, "cpu")
    assert reference.layout == "padded"
    assert torch.equal(reference(batch).logps, policy(batch).logps)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe", "qwen3_5_text"])
def test_gradient_checkpointing_changes_neither_values_nor_gradients(family: str) -> None:
    module = PolicyModule(make_family(family))
    probe(module)
    batch = collate(trees())

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        module.train().zero_grad()
        logps = module(batch).logps
        logps.square().sum().backward()
        return logps.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]

    values, grads = run()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.model.enable_input_require_grads()
    seen: list[int] = []
    module.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    again, again_grads = run()
    assert len(seen) == 2 or module.layout == "padded"  # once forward, once again for backward
    assert torch.equal(values, again)
    largest = max(g.abs().max() for g in grads)
    assert max((a - b).abs().max() for a, b in zip(grads, again_grads, strict=True)) / largest < 1e-6


def test_the_probe_sees_that_a_models_pictures_see_each_other_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3: its mask joins an image's tokens. Where packing does not say so, a row a sequence is all that agrees."""
    shop = open_workshop("gemma3", tmp_path)
    module = PolicyModule(shop.model)
    assert probe(module) < 1e-5 and module.layout == "shared"
    assert module.media is not None and module.media.computed > 0
    monkeypatch.setattr(policy_module, "BOTH_WAYS", ())
    other = PolicyModule(shop.model)
    assert probe(other) < 1e-5
    assert other.layout == "padded"
    assert "model.language_model.layers.0.self_attn is" in caplog.text and "carries a state" not in caplog.text


def test_without_a_processor_beside_it_a_model_is_probed_on_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = open_workshop("smolvlm", tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (shop.folder / name).unlink(missing_ok=True)
    module = PolicyModule(shop.model)
    with caplog.at_level(logging.INFO, logger="align.model.probe.rows"):
        assert probe(module) < 1e-5
    assert "probed on text alone" in caplog.text and module.media is not None and module.media.computed == 0


def test_linear_attention_with_pictures_gets_a_row_a_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = {f"linear_num_{what}_heads": n for what, n in (("key", 2), ("value", 4))}
    linear |= {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
    monkeypatch.setitem(tiny_vlms.FAMILIES, "qwen3_5", tiny_vlms.FAMILIES["qwen3_vl"])
    shop = open_workshop("qwen3_5", tmp_path, layer_types=["linear_attention", "full_attention"], **linear)
    module = PolicyModule(shop.model)
    assert probe(module) < 1e-5 and module.layout == "padded"
    assert module.media is not None and module.media.computed > 0
