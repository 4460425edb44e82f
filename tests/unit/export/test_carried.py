"""What an adapter's folder says of tokenizer, template and base, and what becomes of it where it is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from align.cli.main import main
from align.data.carried import carried
from align.errors import ExportError, ModelError
from align.export import merge as merging
from align.export.merge import merge
from align.export.merge_proof import expected_weights, require_weights
from align.export.soup import soup
from align.model import adapters
from align.model.load import load_model
from align.model.weights import merged_parameters
from align.recipe.adapter_folder import QUANTISED, quantised_base
from align.recipe.chat_files import ChatFiles
from align.recipe.trained_on import require_base, weights_digest, write_trained_on
from tests.unit.model.tiny import LLAMA, TEMPLATE, lora, train_a_little, write_tiny

THEIRS = TEMPLATE.replace("<|im_end|>", "<|pad|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("model") / "base", LLAMA)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.7, "do_sample": true}')
    return folder


def adapter(base: Path, out: Path, *, ours: bool = False, scale: float = 0.2) -> Path:
    """An adapter on `base`; ours: with what a stage of this engine writes beside it."""
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(), None, seed=0)
    train_a_little(peft, scale=scale)
    chat = carried(base, None, chat_template=THEIRS).files if ours else None
    adapters.save(peft, out, chat=chat, base=base if ours else None)
    return out


def with_tokenizer(folder: Path, base: Path, **changes: Any) -> Path:
    """Give an adapter the tokenizer and template that TRL and others write."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "chat_template.jinja").write_text(THEIRS)
    return folder


# ------------------------------------------------------------------------------------------------- tokenizer, template


def test_a_merge_takes_the_adapters_tokenizer_and_template_and_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = with_tokenizer(adapter(base, tmp_path / "adapter"), base, eos_token="<|im_start|>")
    out = tmp_path / "out"
    assert main(["merge", "--base", str(base), "--adapter", str(ours), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "chat template: takes the adapter's" in said and "'<|im_start|>' in place of '<|im_end|>'" in said
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == THEIRS and tokenizer.eos_token == "<|im_start|>"
    config = GenerationConfig.from_pretrained(out)
    assert set(config.eos_token_id) == {2, 1, 0} and config.temperature == 0.7, "what ends a turn there is <|pad|>"
    assert (
        main(
            ["merge", "--base", str(base), "--adapter", str(ours), "--out", str(tmp_path / "b"), "--tokenizer", "base"]
        )
        == 0
    )
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 2


def test_a_template_in_the_tokenizers_own_file_is_not_hidden_by_the_bases(base: Path, tmp_path: Path) -> None:
    ours = with_tokenizer(adapter(base, tmp_path / "adapter"), base, chat_template=THEIRS)
    (ours / "chat_template.jinja").unlink()
    merge(base, ours, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == THEIRS


def test_our_own_adapters_carry_the_template_of_the_recipe_and_the_ends_it_has(base: Path, tmp_path: Path) -> None:
    ours = adapter(base, tmp_path / "adapter", ours=True)
    assert (ours / "chat_template.jinja").read_text() == THEIRS and (ours / "tokenizer.json").is_file()
    assert json.loads((ours / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    merge(base, ours, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == THEIRS
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]
    found = carried(base, ours)
    assert found.tokenizer.folder == base and found.files.template == THEIRS and found.tokenizer.eos_ids == (0, 2)
    told = carried(base, ours, chat_template=TEMPLATE).notes
    assert any("another chat template than `model.chat_template`" in note for note in told)


def test_a_tokenizer_that_grew_beyond_the_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    ours = with_tokenizer(adapter(base, tmp_path / "adapter"), base)
    grown = Tokenizer.from_file(str(ours / "tokenizer.json"))
    grown.add_special_tokens([AddedToken(f"<tool_{n}>", special=True) for n in range(300)])
    grown.save(str(ours / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"300 tokens .*no embeddings for .*\n.*--tokenizer base"):
        carried(base, ours)
    assert carried(base, ours, whose="base").files.tokenizer == base


def test_ids_that_mean_something_else_are_refused_and_renamed_reserved_ones_are_said(
    base: Path, tmp_path: Path
) -> None:
    ours = with_tokenizer(adapter(base, tmp_path / "adapter"), base)
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    (ours / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|turn|>"), encoding="utf-8")
    (ours / "chat_template.jinja").write_text(THEIRS.replace("<|im_start|>", "<|turn|>"))
    assert any("1: '<|turn|>' for '<|im_start|>'" in note for note in carried(base, ours).notes)
    other = json.loads(text)
    names = sorted(other["model"]["vocab"], key=lambda name: other["model"]["vocab"][name])
    other["model"]["vocab"] = {name: n for n, name in enumerate([*names[:3], *reversed(names[3:])])}
    (ours / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ModelError, match=r"another tokenizer than that of .*ids mean something else"):
        carried(base, ours)
    assert carried(base, ours, whose="adapter").files.tokenizer == ours


# ------------------------------------------------------------------------------------------------- base


def test_another_base_of_equal_shapes_is_noticed_by_digest_and_by_name(base: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", LLAMA, seed=1)
    kept, named = adapter(base, tmp_path / "kept", ours=True), adapter(base, tmp_path / "named")
    for one in (kept, named):
        with pytest.raises(ModelError, match=r"is another model: its weights are others\n.*--other-base"):
            merge(other, one, tmp_path / "out")
        assert require_base(base, one) == []
    report = merge(other, kept, tmp_path / "out", other_base=True)
    assert any("is another model" in warning for warning in report.warnings)


def test_what_cannot_be_known_of_a_base_is_a_note(base: Path, tmp_path: Path) -> None:
    named = adapter(base, tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_text())

    def call(name: object) -> list[str]:
        (named / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        return require_base(base, named)

    assert "cannot be known" in call("org/model")[0]
    assert "a quantised one" in call("unsloth/model-bnb-4bit")[0]
    assert "names no base" in call(None)[0]
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    shutil.copytree(base, snapshot)
    call("org/model")
    assert require_base(snapshot, named) == []
    call("org/another")
    with pytest.raises(ModelError, match="this one is called org/model"):
        require_base(snapshot, named)


def test_a_digest_is_of_weights_however_they_are_stored(base: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    cast, parts = tmp_path / "cast", tmp_path / "parts"
    for folder in (cast, parts):
        folder.mkdir()
    save_file({name: t.bfloat16() for name, t in state.items()}, cast / "model.safetensors")
    for n, (name, tensor) in enumerate(state.items()):
        save_file({name: tensor}, parts / f"model-{n}.safetensors")
    assert weights_digest(base) == weights_digest(cast) == weights_digest(parts)
    state["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(state, cast / "model.safetensors")
    assert weights_digest(base) != weights_digest(cast)
    assert weights_digest(tmp_path) is None


def test_an_adapter_on_a_quantised_base_is_another_model_on_a_full_one(base: Path, tmp_path: Path) -> None:
    packed, ours = tmp_path / "packed", adapter(base, tmp_path / "adapter")
    shutil.copytree(base, packed)
    config = json.loads((packed / "config.json").read_text())
    for settings, words in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
    ):
        (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        state = load_file(base / "model.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in state.items()}, packed / "model.safetensors")
        write_trained_on(ours, packed)
        assert json.loads((ours / QUANTISED).read_text())["quant_method"] == settings["quant_method"]
        assert quantised_base(ours) is None, "nobody here packed it"
        with pytest.raises(ModelError, match=rf"quantised \({words}\).*another model than the one that was trained"):
            merge(base, ours, tmp_path / "out")


def test_a_soup_of_adapters_with_other_templates_or_bases_is_refused(base: Path, tmp_path: Path) -> None:
    one, two = (adapter(base, tmp_path / name, ours=True) for name in ("one", "two"))
    made = soup([one, two], [0.5, 0.5], tmp_path / "soup")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "trained_on.json"):
        assert (made.out / name).read_bytes() == (one / name).read_bytes()
    (two / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(ModelError, match=r"another chat_template\.jinja"):
        soup([one, two], [0.5, 0.5], tmp_path / "other")
    write_trained_on(two, write_tiny(tmp_path / "seed1", LLAMA, seed=1))
    with pytest.raises(ModelError, match="bases whose weights differ"):
        soup([one, two], [0.5, 0.5], tmp_path / "other")


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_weights_that_are_not_base_and_adapter_are_told_from_rounding_in_every_dtype(
    base: Path, dtype: torch.dtype, kind: str
) -> None:
    """An adapter so small that what the model says hardly changes: rounding to bfloat16 moves it further."""
    kinds: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"kind": "dora"}}
    changes = kinds[kind]
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(**changes), None, seed=0)
    train_a_little(peft, scale=1e-3)
    wanted, written = expected_weights(peft, 0), load_model(base, dtype=torch.float32)
    assert len(wanted) == 14
    with torch.no_grad():
        merged = {path: merged_parameters(layer, "default")[0] for path, layer in adapters.lora_layers(peft)}
        for path, weight in merged.items():
            written.get_submodule(path).weight.copy_(weight.to(dtype).float())
    assert require_weights(written, wanted, dtype) <= 1
    path, other = (f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qk")
    weight = written.get_submodule(path).weight
    plain = peft.get_base_model().get_submodule(path).get_base_layer().weight
    change = (merged[path] - plain).detach()
    swapped = (merged[other] - peft.get_base_model().get_submodule(other).get_base_layer().weight).detach()
    for wrong in (2 * change, 0.5 * change, 0 * change, change.T, swapped):
        with torch.no_grad():
            weight.copy_((plain + wrong).to(dtype).float())
        with pytest.raises(ExportError, match=rf"q_proj differs from base .* beyond {str(dtype)[6:]}'s bounds"):
            require_weights(written, wanted, dtype)


def test_a_module_that_is_forgotten_in_bfloat16_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merging.replacements

    def forgetful(plan: Any, peft: Any) -> Any:
        return {name: make for name, make in right(plan, peft).items() if "layers.1.self_attn.q_proj" not in name}

    ours = adapter(base, tmp_path / "adapter", scale=1e-3)
    monkeypatch.setattr(merging, "replacements", forgetful)
    with pytest.raises(ExportError, match=r"q_proj differs from base \+ adapter beyond bfloat16's bounds"):
        merge(base, ours, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_files_without_a_recipe_say_what_they_can(base: Path, tmp_path: Path) -> None:
    ours = adapter(base, tmp_path / "adapter")
    assert ChatFiles.of(base, ours) == ChatFiles(base)
    (ours / "chat_template.jinja").write_text(THEIRS)
    assert ChatFiles.of(base, ours).template == THEIRS
    assert ChatFiles.of(base, with_tokenizer(ours, base)).tokenizer == ours


@pytest.mark.parametrize("ids", ['"x"', "[-1]", "[2, null]", "true", "[1.0]", "[4294967296]"])
def test_ends_that_are_no_token_ids_are_refused_with_their_file(base: Path, tmp_path: Path, ids: str) -> None:
    shutil.copy(base / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(ModelError, match="`eos_token_id` must be a token's number") as error:
        carried(base, tmp_path)
    assert "generation_config.json" in str(error.value)


def test_a_tokenizer_in_an_older_form_is_not_passed_over_in_silence(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not carried(base, tmp_path).notes
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    note = "the adapter's tokenizer (tokenizer_config.json, tokenizer.model) is not read, and the base's is taken"
    assert [line for line in carried(base, tmp_path).notes if line.startswith(note)]
    (tmp_path / "chat_template.jinja").write_text(THEIRS)
    assert [line for line in carried(base, tmp_path).notes if line.startswith(note)]
    assert not [line for line in carried(base, tmp_path, whose="base").notes if line.startswith(note)]
