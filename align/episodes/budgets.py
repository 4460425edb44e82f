"""What one answer may add to an episode: text beyond it is cut in the middle, and says so."""

from __future__ import annotations

from align.data.tokenizer import ChatTokenizer


def cut_middle(text: str, most: int, tokenizer: ChatTokenizer) -> tuple[str, int]:
    """(the text, within about `most` tokens; how many tokens were taken out of its middle, 0 where it fits).

    A text that could not fit whatever its tokens are is cut by its characters first, so that a flood costs no more than
    what is kept.
    """
    widest = most * tokenizer.longest_token
    skipped = 0
    if len(text) > 2 * widest:
        skipped = len(text) - 2 * widest
        text = text[:widest] + text[-widest:]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= most and not skipped:
        return text, 0
    head, tail = ids[: (most + 1) // 2], ids[len(ids) - most // 2 :]
    gone = max(0, len(ids) - most) + skipped // max(1, tokenizer.longest_token)
    begun = tokenizer.decode(head, skip_special_tokens=False)
    ended = tokenizer.decode(tail, skip_special_tokens=False) if tail else ""
    return f"{begun}\n[... {gone} tokens cut ...]\n{ended}", gone
