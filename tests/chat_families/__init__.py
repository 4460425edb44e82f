"""Chat templates shaped as those of public model families, one .jinja each, and tiny tokenizers that have their special
tokens: what is proved of a template here is proved of what its family does, without the family's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from align.data.tokenizer import ChatTokenizer, load_tokenizer

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """special, added: tokens that are special, and that are not; ends: those of generation_config.json, the first is
    the EOS; bos: written by the template; metaspace: words begin with a mark, as SentencePiece writes them."""

    special: tuple[str, ...]
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    metaspace: bool = False


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
          "<|eom_id|>", "<|python_tag|>")  # fmt: skip
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
             "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
             "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
             "<｜tool▁output▁end｜>")  # fmt: skip
_PHI = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|tool_call|>",
        "<|/tool_call|>", "<|tool_response|>")  # fmt: skip
_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

FAMILIES = {
    "qwen2_5": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), _TAGS[:2]),
    "qwen3": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), _TAGS),
    "qwen3_coder": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), _TAGS[:4]),
    "smollm2": Family(_CHATML, ("<|im_end|>",)),
    "llama3_1": Family(_LLAMA, ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), bos="<|begin_of_text|>"),
    "mistral_v3": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), ("</s>",), bos="<s>", metaspace=True,
    ),
    "gemma3": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>", "<eos>"),
        ("<table>", "<h1>", "\\n\\n", "▁▁"), bos="<bos>", metaspace=True,
    ),
    "phi4_mini": Family(_PHI, ("<|end|>", "<|endoftext|>")),
    "deepseek_v3": Family(
        _DEEPSEEK, ("<｜end▁of▁sentence｜>",), ("<think>", "</think>"), bos="<｜begin▁of▁sentence｜>"
    ),
    "glm4_5": Family(
        _GLM, ("<|endoftext|>", "<|user|>", "<|observation|>"),
        (*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
}  # fmt: skip


def write_family(folder: Path, name: str, template: str | None = None) -> Path:
    """A folder with the family's tokens, letters of every script as bytes, and its template or another."""
    family = FAMILIES[name]
    tokens = [*family.special, *family.added]
    if family.metaspace:
        words = [f"<0x{n:02X}>" for n in range(256)] + ["▁", *map(chr, range(33, 127))]
        model = models.BPE(vocab=_vocab([*tokens, "<unk>", *words]), merges=[], byte_fallback=True, unk_token="<unk>")
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        words = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [("t", "h"), ("th", "e"), ("o", "n"), ("<", "|"), ("|", ">"), ("Ċ", "Ċ"), ("Ġ", "a"), ("}", "}")]
        words += [a + b for a, b in pairs]
        backend = Tokenizer(models.BPE(vocab=_vocab([*tokens, *words]), merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.added])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": family.ends[0]} | ({"bos_token": family.bos} if family.bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    ends = [backend.token_to_id(token) for token in family.ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    source = template if template is not None else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


def _vocab(words: list[str]) -> dict[str, int]:
    return {word: n for n, word in enumerate(dict.fromkeys(words))}


def load_family(folder: Path, name: str, template: str | None = None, **variables: object) -> ChatTokenizer:
    """The family's tokenizer, written there. variables: `template_args`."""
    return load_tokenizer(write_family(folder, name, template), template_args=variables)
