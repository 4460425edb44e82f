"""What one answer may add to an episode: text beyond it is cut in the middle, and says so."""

from __future__ import annotations

from typing import Any

from align.data.tokenizer import ChatTokenizer


def within(content: Any, most: int, tokenizer: ChatTokenizer) -> tuple[Any, bool]:
    """(a message's content whose texts have about `most` tokens together, whether something was taken out). Of content
    parts the first texts are kept whole, the one that does not fit is cut, and those behind it are gone."""
    if isinstance(content, str):
        text, gone = cut_middle(content, most, tokenizer)
        return text, gone > 0
    kept, left, cut = list[Any](), most, False
    for part in content or ():
        if not isinstance(part.get("text"), str):
            kept.append(part)
            continue
        text, gone = cut_middle(part["text"], left, tokenizer) if left else ("", len(part["text"]))
        cut |= gone > 0
        left = 0 if gone else left - len(tokenizer.encode(text, add_special_tokens=False))
        kept += [{**part, "text": text}] if text else []
    return kept if cut else content, cut


def cut_middle(text: str, most: int, tokenizer: ChatTokenizer) -> tuple[str, int]:
    """(the text, within about `most` tokens; how many characters were taken out of its middle, 0 where it fits).

    A text that could not fit whatever its tokens are is cut by its characters first, so that a flood costs no more than
    what is kept.
    """
    widest = most * tokenizer.longest_token
    looked = text if len(text) <= 2 * widest else text[:widest] + text[-widest:]
    ids = tokenizer.encode(looked, add_special_tokens=False)
    if len(ids) <= most and looked is text:
        return text, 0
    head, tail = ids[: (most + 1) // 2], ids[max(0, len(ids) - most // 2) :] if most > 1 else []
    begun = tokenizer.decode(head, skip_special_tokens=False)
    ended = tokenizer.decode(tail, skip_special_tokens=False) if tail else ""
    gone = len(text) - len(begun) - len(ended)
    return f"{begun}\n[... {gone} characters cut ...]\n{ended}", gone
