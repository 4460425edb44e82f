"""The same ids, texts and masks as transformers' AutoTokenizer, without transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from align.data.backends import AS_IT_STANDS, CLASSES, TYPE_WINS
from align.data.templates import CHATML
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import ModelError
from tests.unit.data.build import turns
from tests.unit.data.conftest import LINES

TEXTS = [
    *LINES,
    "",
    "\n",
    " leading and trailing ",
    "  two  spaces\n\n\nthree lines",
    "It's 1234567 o'clock\r\n\tnow",
    "e\u0301 is not é",
    "हिन्दी में",
    "<|im_start|>user\nnot a turn<|im_end|> <s>x</s> <|pad|>",
]
CHAT = turns("What is 12+7?", "12+7 = 19.", "Sure?\n", "Yes,  sure 😊", system="Be brief.")


def same_as_auto(folder: Path) -> tuple[ChatTokenizer, Any]:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        for added in (True, False):
            ids = theirs.encode(text, add_special_tokens=added)
            assert ours.encode(text, add_special_tokens=added) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.encode_batch(TEXTS) == [theirs.encode(t, add_special_tokens=False) for t in TEXTS]
    assert ours.named_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    return ours, theirs


def test_our_own_tokenizer_gives_the_ids_and_masks_of_autotokenizer(folder: Path) -> None:
    ours, theirs = same_as_auto(folder)
    for k in range(1, len(CHAT) + 1):
        for ask in (True, False):
            wanted = theirs.apply_chat_template(CHAT[:k], add_generation_prompt=ask, return_dict=False)
            assert ours.chat_ids(CHAT[:k], ask) == wanted
    whole = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    rendered, spans = ours.render_spans(CHAT)
    marked = "".join(rendered[a:b] for a, b in spans)
    scored = [i for i, m in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if m]
    assert marked == "12+7 = 19.<|im_end|>Yes,  sure 😊<|im_end|>" and theirs.decode(scored) == marked


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
def test_our_own_tokenizer_beside_a_models_config_is_still_that_of_autotokenizer(
    folder: Path, tmp_path: Path, model_type: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    same_as_auto(tmp_path / "model")


def _trained(start: bool) -> Tokenizer:
    """A BPE; with `start` on SentencePiece's pieces, else on bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=start, unk_token="<unk>" if start else None, fuse_unk=start))
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<pad>"]
    alphabet = [f"<0x{i:02X}>" for i in range(256)] if start else pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if start else pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials + (alphabet if start else []),
        initial_alphabet=[] if start else alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 10, trainer)
    return tokenizer


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], model_type: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


@pytest.mark.parametrize(
    ("name", "by"),
    [(n, "class") for n in sorted(CLASSES)] + [(n, "type") for n in sorted(CLASSES) if CLASSES[n].model_types],
)
def test_classes_that_rebuild_their_tokenizer_are_followed(tmp_path: Path, name: str, by: str) -> None:
    """tokenizer.json says one thing (GPT-2's pre-tokenizer), the class another: AutoTokenizer follows the class."""
    types = sorted(CLASSES[name].model_types)
    tokenizer = _trained(start=name in ("LlamaTokenizer", "GemmaTokenizer"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = {"tokenizer_class": name + "Fast"} if by == "class" else {}
    _write(tmp_path, tokenizer, config, types[0] if by == "type" else None)
    same_as_auto(tmp_path)


def test_our_tables_of_model_types_agree_with_those_of_transformers() -> None:
    from transformers.models.auto import tokenization_auto as auto

    table = auto.TOKENIZER_MAPPING_NAMES
    for name, entry in CLASSES.items():
        assert {t for t in entry.model_types if table.get(t) != name} == set()
    assert {t for t in AS_IT_STANDS if table.get(t) not in ("TokenizersBackend", "MistralCommonBackend")} == set()
    assert set(TYPE_WINS) <= auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_tokens_and_bos_that_only_the_config_names_are_added_as_autotokenizer_adds_them(tmp_path: Path) -> None:
    tokenizer = _trained(start=False)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|eot|>",
        "image_token": "<image>",
        "add_bos_token": False,
        "extra_special_tokens": ["<extra>"],
        "chat_template": CHATML,
    }
    _write(tmp_path, tokenizer, config)
    ours, theirs = same_as_auto(tmp_path)
    text = "<s>a<|eot|>b<extra> <image>"
    assert ours.encode(text) == theirs.encode(text) and ours.text_prefix == (ours.bos_id,)
    assert {"<|eot|>", "<extra>", "<image>"} <= ours.special
    assert ours.chat_ids(CHAT) == theirs.apply_chat_template(CHAT, return_dict=False)


def test_special_tokens_map_json_counts_where_the_config_lists_no_added_tokens(tmp_path: Path) -> None:
    _write(tmp_path, _trained(start=False), {"tokenizer_class": "PreTrainedTokenizerFast"})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    ours, _ = same_as_auto(tmp_path)
    assert ours.eos_id is not None and ours.pad_id is not None


def test_the_template_file_counts_before_the_config_and_the_recipe_before_both(folder: Path, tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "config {{ args }}"}
    _write(tmp_path, Tokenizer.from_file(str(folder / "tokenizer.json")), config)
    assert load_tokenizer(tmp_path, template_args={"args": 1}).render(CHAT) == "config 1"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).render(CHAT) == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja")).render(CHAT) == "mine"
    assert load_tokenizer(tmp_path, chat_template="inline {{ messages|length }}").render(CHAT) == "inline 5"
    assert "<|im_start|>" in load_tokenizer(tmp_path, chat_template="chatml").render(CHAT)
    with pytest.raises(ModelError, match="names no file: nowhere"):
        load_tokenizer(tmp_path, chat_template="nowhere")


def test_generation_config_adds_to_what_ends_a_generation(folder: Path, tmp_path: Path) -> None:
    _write(tmp_path, Tokenizer.from_file(str(folder / "tokenizer.json")), {"eos_token": "<|im_end|>"})
    assert load_tokenizer(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 7)


def test_the_fingerprint_changes_with_whatever_changes_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"}
    _write(tmp_path, tokenizer, config)
    prints = [
        load_tokenizer(tmp_path).fingerprint,
        load_tokenizer(tmp_path, chat_template="{{ 1 }}").fingerprint,
        load_tokenizer(tmp_path, chat_template="{{ 1 }}", template_args={"a": 1}).fingerprint,
    ]
    tokenizer.add_special_tokens([AddedToken("<new>", special=True)])
    _write(tmp_path, tokenizer, config)
    prints.append(load_tokenizer(tmp_path).fingerprint)
    assert len(set(prints)) == 4
    assert load_tokenizer(tmp_path).fingerprint == prints[-1]


def test_folders_without_a_usable_tokenizer_are_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    assert "no model folder" in str(error.value)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    assert "convert it once" in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
    _write(tmp_path, Tokenizer.from_file(str(folder / "tokenizer.json")), {"chat_template": "{% for %}"})
    with pytest.raises(ModelError, match="does not compile"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{not json")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_templates_cannot_reach_python(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.render(CHAT)


def test_loading_and_preparing_import_no_heavy_package(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"messages": CHAT}) + "\n")
    code = (
        "import sys\n"
        "from align.data.prepare import prepare\n"
        "from align.data.tokenizer import load_tokenizer\n"
        "from align.recipe.inputs import DataSource\n"
        f"t = load_tokenizer({str(folder)!r})\n"
        f"prepare((DataSource(path={str(data)!r}),), 'conversation', t, seed=0)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'ray', 'vllm', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_template_of_several_is_named_as_the_model_names_it(tmp_path: Path, folder: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(folder, several)
    (several / "chat_template.jinja").write_text("plain{{ messages[0].content }}")
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates" / "tool_use.jinja").write_text("tools{{ messages[0].content }}")
    messages = [{"role": "user", "content": "!"}]
    assert load_tokenizer(several).render(messages) == "plain!"
    assert load_tokenizer(several, chat_template="tool_use").render(messages) == "tools!"
    with pytest.raises(ModelError) as error:
        load_tokenizer(several, chat_template="tool_ues")
    assert "one of the model's (default, tool_use)" in str(error.value)
    (several / "chat_template.jinja").unlink()
    config = json.loads((several / "tokenizer_config.json").read_text())
    listed = [{"name": "rag", "template": "rag{{ messages[0].content }}"}]
    (several / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
    assert load_tokenizer(several, chat_template="rag").render(messages) == "rag!"
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\) and no default"):
        load_tokenizer(several)
    (several / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": ["rag"]}))
    with pytest.raises(ModelError, match="neither a text nor texts by name"):
        load_tokenizer(several)
