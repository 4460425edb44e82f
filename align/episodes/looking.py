"""What an episode is shown: images in the messages of its environment, and the tokens that they become.

What the environment's process sends is a data URL, or an address for the recipe's `media.hosts`; a path is never read
here, since that process is not trusted. An image that cannot be shown is text that says why, which the policy reads; it
is counted, and none vanishes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from align.data.media.shown import Shown
from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.episodes.budgets import within as cut_within
from align.episodes.images import Images
from align.episodes.joins import Joins
from align.episodes.spoken import Message, text_of
from align.mediastore import described
from align.protocols.fleet import PromptItem
from align.protocols.trees import Medium

Ids = tuple[list[int], tuple[Medium, ...]]
"""Ids and what stands where in them."""
Made = TypeVar("Made")
_KINDS = ("image", "image_url", "input_image")
_SEEN_BY = ("data:", "http://", "https://")


class Written(NamedTuple):
    """Ids, what stands where in them, and the messages that were added, as the policy reads them."""

    ids: list[int]
    media: tuple[Medium, ...]
    added: list[Message]


class Eye:
    """The images of one episode. counts: of the episode; `images`, `refused_images` and `call_errors` grow here. most:
    images that it may be shown."""

    def __init__(self, images: Images | None, joins: Joins, prompt: PromptItem, counts: dict[str, float], most: int):
        self._images, self._joins, self._prompt, self._counts, self._most = images, joins, prompt, counts, most
        counts |= {"images": 0.0, "refused_images": 0.0}
        self._shown: list[Shown] = []  # in what the environment said last
        self._past: list[Shown] = []  # in what it said before, and the policy has read

    async def look(self, message: Message, most: int | None = None) -> tuple[Message, int]:
        """A message with its images looked at, and how many tokens those have; most: that they may."""
        left = self._most - int(self._counts["images"])
        content = message.get("content")
        seen = await observed(self._images, self._prompt.group_id, content, left=left, of=self._most, tokens=most)
        self._shown += seen.shown
        self._counts["images"] += len(seen.shown)
        self._counts["refused_images"] += seen.refused
        self._counts["call_errors"] += seen.refused > 0 and message["role"] == "tool"
        if seen.content is content:
            return message, 0
        return {**message, "content": seen.content}, sum(len(shown.token_ids) for shown in seen.shown)

    async def within(self, added: Sequence[Message], most: int, tokenizer: ChatTokenizer) -> list[Message]:
        """What the environment says between two turns within `most` tokens: each message has an equal share of what
        those before it left; its images are looked at, and its text is cut."""
        left, out = most, list[Message]()
        for number, message in enumerate(added):
            share = left // (len(added) - number)
            message, taken = await self.look(message, share)
            content, cut = cut_within(message.get("content"), share - taken, tokenizer)
            self._counts["cut_answers"] += cut
            out.append({**message, "content": content} if cut else message)
            left -= min(left, taken + len(tokenizer.encode(text_of(content), add_special_tokens=False)))
        return out

    def close(self) -> None:
        """What was looked at last is shown to no policy: the episode is over."""
        self._counts["images"] -= len(self._shown)
        self._shown = []

    async def opening(self, messages: Sequence[Message], added: Sequence[Message]) -> Written:
        """The prompt written anew; see `Joins.opening`. added: messages that were looked at."""
        rows = await self._rows()

        def write(added: Sequence[Message], shown: Sequence[Shown]) -> Ids:
            whole = [*rows, *shown]
            return self._joins.placed(self._joins.opening(messages, added, shown=whole), whole)

        (ids, media), added = self._write(write, added)
        return Written(ids, media, added)

    def join(self, messages: Sequence[Message], added: Sequence[Message], sampled_end: int | None) -> Written:
        """What is appended behind a turn; see `Joins.join`. added: messages that were looked at."""

        def write(added: Sequence[Message], shown: Sequence[Shown]) -> Ids:
            return self._joins.placed(self._joins.join(messages, added, sampled_end, shown), shown)

        (ids, media), added = self._write(write, added)
        return Written(ids, media, added)

    async def anew(
        self, messages: Sequence[Message], added: Sequence[Message], sampled_end: int | None, *, own: int
    ) -> tuple[Written, int]:
        """The whole conversation as the template writes it now, and how many of the last ids are what a join would have
        appended. own: how many of the messages are the row's; messages, added, sampled_end: as for `join`."""
        before = [*await self._rows(), *self._past]

        def write(added: Sequence[Message], shown: Sequence[Shown]) -> tuple[Ids, list[int]]:
            whole, every = [*messages, *added], [*before, *shown]
            tail, _ = self._joins.placed(self._joins.join(messages, added, sampled_end, shown), shown)
            return self._joins.placed(self._joins.opening(whole, trusted=own, shown=every), every), tail

        ((ids, media), tail), added = self._write(write, added)
        new = next((n for n, (a, b) in enumerate(zip(ids[::-1], tail[::-1], strict=False)) if a != b), len(tail))
        return Written(ids, media, added), new

    async def _rows(self) -> list[Shown]:
        return [] if self._images is None else await self._images.of_prompt(self._prompt)

    def _write(
        self, write: Callable[[Sequence[Message], Sequence[Shown]], Made], added: Sequence[Message]
    ) -> tuple[Made, list[Message]]:
        """What is written with the images that were looked at, or without them where the template does not write them;
        and the messages as the policy reads them. Raises RowError where it is refused either way."""
        shown, added = self._shown, list(added)
        try:
            made = write(added, shown)
        except RowError as error:
            if not shown:
                raise
            shown, added = [], self._unseen(added, str(error))
            made = write(added, shown)
        self._past += shown
        self._shown = []
        return made, added

    def _unseen(self, added: Sequence[Message], why: str) -> list[Message]:
        """Messages without their images, which the template does not write: the policy reads why."""
        self._counts["images"] -= len(self._shown)
        self._counts["refused_images"] += len(self._shown)
        out = [{**m, "content": unseen(m["content"], why)} if "content" in m else m for m in added]
        self._counts["call_errors"] += sum(m["role"] == "tool" and m != was for m, was in zip(out, added, strict=True))
        return out


@dataclass
class Observed:
    """An answer as the policy reads it. content: its images as `align.mediastore.described` has them, those that cannot
    be shown as text that says why. shown: those that can, in order. refused: how many cannot."""

    content: Any
    shown: list[Shown] = field(default_factory=list)
    refused: int = 0


async def observed(
    images: Images | None, group: int, content: Any, *, left: int, of: int, tokens: int | None = None
) -> Observed:
    """A message's content with its images looked at.

    Args:
        left: images that the episode may still be shown, of so many in all. tokens: that those of one answer may have
            (None: any number).
    """
    if not isinstance(content, list | tuple):
        return Observed(content)
    content = [_sound(part) for part in content]
    if all(part["type"] == "text" for part in content):
        return Observed(content)
    sources = [_source(part) for part in content]
    whys: dict[int, str] = {}
    wanted = [n for n, source in enumerate(sources) if source is not None]
    for n, part in enumerate(content):
        if part.get("type") != "text" and sources[n] is None:
            whys[n] = f"no image with a data URL or an address, and nothing else can be shown ({part.get('type')})"
    if images is None:
        whys |= dict.fromkeys(wanted, "the model sees no images")
    else:
        most = max(0, left)
        whys |= dict.fromkeys(wanted[most:], f"at most {of} images an episode are shown")
        wanted = wanted[:most]
    found: dict[int, Shown] = {}
    if images is not None and wanted:
        for n, one in zip(wanted, await images.show(group, [sources[n] or "" for n in wanted]), strict=True):
            size = 0 if isinstance(one, str) else len(one.token_ids)
            if isinstance(one, str):
                whys[n] = one
            elif tokens is not None and size > tokens:
                whys[n] = f"it takes {size} tokens, and an answer may add {tokens}; make it smaller"
            else:
                found[n], tokens = one, None if tokens is None else tokens - size
    parts = [
        dict(described(found[n].medium(0))) if n in found else part if n not in whys else _told(whys[n], bool(n))
        for n, part in enumerate(content)
    ]
    return Observed(parts if found else text_of(parts), list(found.values()), len(whys))


def _sound(part: Any) -> Mapping[str, Any]:
    """A part with a kind, whose text is text: whatever an environment's process sent."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return {"type": "text", "text": str(part)}
    return {"type": "text", "text": str(part.get("text") or "")} if part["type"] == "text" else part


def _source(part: Mapping[str, Any]) -> str | None:
    """Where an image comes from; None where the part is none that can be read."""
    given = part.get("image", part.get("image_url")) if part.get("type") in _KINDS else None
    source = given.get("url") if isinstance(given, Mapping) else given
    return source if isinstance(source, str) and source[:8].lower().startswith(_SEEN_BY) else None


def _told(why: str, behind: bool) -> dict[str, str]:
    text = f"error: an image was not shown: {why}"
    return {"type": "text", "text": f"\n{text}" if behind else text}


def unseen(content: Any, why: str) -> str:
    """A content with a text in the place of each image."""
    if isinstance(content, str):
        return content
    return text_of([part if part.get("type") == "text" else _told(why, bool(n)) for n, part in enumerate(content)])
