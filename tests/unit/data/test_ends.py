"""Where turns end under templates of every shape, what of them is scored, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from align.data.encode import encode
from align.data.records import Conversation, Message
from align.data.render import draft
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import ModelError
from tests.unit.data.build import prepared

SPECIAL = ("<eos>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|eom|>", "<|user|>", "<|observation|>", "</call>")
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
TWICE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eot|><eos>{% endfor %}" + ASKS
ONCE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
)
GLM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{% elif m.role == 'tool' %}<|observation|>\n"
    "{% else %}<|im_start|>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>\n{% endif %}"
)
NOT_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or m.role == 'user' %}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
)
TEXT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
UNASKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|user|>{{ m.content }}<|eot|>{% endfor %}"
    "<|im_start|>assistant<|user|>"
)
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% if m.tool_calls %}<|eom|>{% else %}<|eot|>{% endif %}{% endfor %}" + ASKS
)


def model(folder: Path, template: str, generation: object = None, special: tuple[str, ...] = SPECIAL) -> Path:
    """A tokenizer folder with these special tokens, whose EOS is <eos>."""
    vocab = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<eos>"}))
    (folder / "chat_template.jinja").write_text(template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def scored(tokenizer: ChatTokenizer, *turns: tuple[str, str]) -> list[str]:
    """What of a conversation is scored, part by part; the whole text first."""
    record = Conversation((), tuple(Message(role, content) for role, content in turns))
    [made] = encode([draft(record, tokenizer)], tokenizer)
    assert not isinstance(made, Exception), made
    ids, mask = made.trunk.ids.tolist(), made.trunk.mask
    parts = [tokenizer.decode(ids, False)]
    for n in range(len(ids)):
        if mask[n]:
            parts += [] if n and mask[n - 1] else [""]
            parts[-1] += tokenizer.decode([ids[n]], False)
    return parts


TURNS = (("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))


@pytest.mark.parametrize(
    ("template", "declared", "stops", "parts"),
    [
        pytest.param(CHATML, None, {"<eos>", "<|im_end|>"}, ["b<|im_end|>", "d<|im_end|>"], id="base taught chat"),
        pytest.param(TWICE, None, {"<eos>"}, ["b<|eot|><eos>", "d<|eot|><eos>"], id="special token before EOS"),
        pytest.param(TWICE, [0, 3], {"<eos>", "<|eot|>"}, ["b<|eot|>", "d<|eot|>"], id="both are declared"),
        pytest.param(ONCE, None, {"<eos>", "<|eot|>"}, ["b<|eot|>", "d<|eot|>"], id="EOS behind the last turn alone"),
        pytest.param(GLM, [0, 5, 6], {"<eos>", "<|user|>", "<|observation|>"}, ["b<|user|>", "d<|user|>"], id="header"),
        pytest.param(NOT_LAST, None, {"<eos>", "<|im_end|>"}, ["b<|im_end|>", "d<|im_end|>"], id="none at the end"),
        pytest.param(TEXT, None, {"<eos>"}, ["b\n", "d\n<eos>"], id="text alone"),
        pytest.param(UNASKED, None, {"<eos>", "<|eot|>"}, ["b<|eot|>", "d<|eot|>"], id="header unasked"),
        pytest.param(CALLS, None, {"<eos>", "<|eot|>", "<|eom|>"}, ["b<|eot|>", "d<|eot|>"], id="tools end otherwise"),
    ],
)
def test_a_turn_ends_where_its_template_ends_it(
    tmp_path: Path, template: str, declared: object, stops: set[str], parts: list[str]
) -> None:
    tokenizer = load_tokenizer(model(tmp_path, template, declared))
    assert {tokenizer.decode([i], False) for i in tokenizer.eos_ids} == stops
    assert scored(tokenizer, *TURNS)[1:] == parts


@pytest.mark.parametrize("kind", ["added", "vocabulary", "missing"])
def test_an_end_need_not_be_a_special_token(tmp_path: Path, kind: str) -> None:
    """<|im_end|> is an added token, or one of the vocabulary's own, or none: then its letters end nothing, and EOS
    does."""
    folder = model(tmp_path, CHATML, special=tuple(t for t in SPECIAL if kind != "missing" or t != "<|im_end|>"))
    file = json.loads((folder / "tokenizer.json").read_text())
    if kind == "added":
        file["added_tokens"] = [t | {"special": t["content"] != "<|im_end|>"} for t in file["added_tokens"]]
    if kind == "vocabulary":
        file["added_tokens"] = [t for t in file["added_tokens"] if t["content"] != "<|im_end|>"]
        file["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": "<|im_end|>"},
            "behavior": "Isolated",
            "invert": False,
        }
        file["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(folder)
    ends = {tokenizer.decode([i], False) for i in tokenizer.eos_ids}
    assert ends == ({"<eos>"} if kind == "missing" else {"<eos>", "<|im_end|>"})
    if kind != "vocabulary":  # that one splits nothing else, and has no tokens for letters
        last = scored(tokenizer, *TURNS)[-1]
        assert last == ("d<|im_end|>\n<eos>" if kind == "missing" else "d<|im_end|>")


def test_a_token_between_two_calls_ends_no_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path, CALLS))
    assert tokenizer.ends.call.token == "<|eom|>" and "</call>" not in tokenizer.ends.tokens()
    tokenizer = load_tokenizer(model(tmp_path, GLM, [0, 5, 6]))
    assert tokenizer.ends.call.token == "<|observation|>" and tokenizer.ends.call.appended


def test_a_call_is_scored_to_its_own_end(tmp_path: Path) -> None:
    for template, declared, end in ((CALLS, None, "</call><|eom|>"), (GLM, [0, 5, 6], "</call><|observation|>")):
        tokenizer = load_tokenizer(model(tmp_path, template, declared))
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        record = Conversation((), (Message("user", "a?"), Message("assistant", "", extra={"tool_calls": [call]})))
        [made] = encode([draft(record, tokenizer)], tokenizer)
        assert not isinstance(made, Exception)
        assert tokenizer.decode(made.trunk.ids[made.trunk.mask], False) == f'f {{"x": 1}}{end}'


def test_a_recipe_may_name_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = model(tmp_path, TWICE)
    tokenizer = load_tokenizer(folder, end_of_turn=["<|eot|>"])
    assert scored(tokenizer, *TURNS)[1:] == ["b<|eot|>", "d<|eot|>"]
    assert {tokenizer.decode([i], False) for i in tokenizer.eos_ids} == {"<eos>", "<|eot|>"}
    text = load_tokenizer(model(tmp_path, TEXT), end_of_turn=["<|eot|>"])
    assert scored(text, *TURNS)[1:] == ["b\n", "d\n<|eot|>"]
    assert load_tokenizer(folder).fingerprint != tokenizer.fingerprint


def test_an_end_that_is_no_token_or_is_never_written_is_refused_by_name(tmp_path: Path) -> None:
    folder = model(tmp_path, CHATML)
    with pytest.raises(ModelError, match=r"<\|im_ent\|>` is no token .*\n.*<\|im_end\|>"):
        load_tokenizer(folder, end_of_turn=["<|im_ent|>"])
    with pytest.raises(ModelError, match=r"behind an answer the chat template writes '<\|im_end\|>"):
        _ = load_tokenizer(folder, end_of_turn=["<|eot|>"]).eos_ids


def test_markers_decide_what_is_scored_and_what_they_leave_out_is_said(tmp_path: Path) -> None:
    short = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    tokenizer = load_tokenizer(model(tmp_path / "model", short))
    assert scored(tokenizer, *TURNS)[1:] == ["b", "d"]
    row = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
    [report] = prepared(tmp_path, [row], "conversation", tokenizer).report.sources
    assert any("will not learn to stop" in note and "generation block" in note for note in report.notes)


def test_what_the_files_do_not_declare_is_said_with_its_remedy(tmp_path: Path) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in TURNS]}

    def notes(template: str, declared: object = None) -> str:
        tokenizer = load_tokenizer(model(tmp_path / "model", template, declared))
        return " ".join(prepared(tmp_path, [row], "conversation", tokenizer).report.sources[0].notes)

    said = notes(CHATML)
    assert "ends turns with '<|im_end|>'" in said and "model.end_of_turn" in said and "generation_config.json" in said
    assert "writes no end behind a conversation's last answer: '<eos>'" in notes(TEXT)
    assert notes(CHATML, [0, 2]) == ""


def test_the_reward_of_a_pair_sees_the_same_end_on_both_sides(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path / "model", TEXT))
    row = {"prompt": [{"role": "user", "content": "a?"}]} | {
        side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    [tree] = prepared(tmp_path, [row], "pair", tokenizer).items
    ends = [tokenizer.decode(b.token_ids[b.loss_mask], False) for b in tree.branches]
    assert ends == ["chosen\n<eos>", "rejected\n<eos>"]
