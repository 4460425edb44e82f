"""What a language model says of a completion, over any OpenAI-compatible endpoint (`/chat/completions`).

    - use: judge
      args: {base_url: http://localhost:8000/v1, model: Qwen/Qwen3-8B, parse: choice, choices: {good: 1, bad: 0}}

The API key is read from the environment variable that `api_key_env` names, and stands in no recipe. The judge is asked
at temperature 0 unless told otherwise. It is shown the images of the prompt, unless `images: false` says that it reads
text alone. 429 and 5xx are asked again until the deadline, after the time that Retry-After
says, or else after 0.5 s, 1 s, 2 s... An answer that cannot be read is a failure, never a score.

How an answer is read, after a reasoning model's <think>...</think>:
    number  [[7]] (MT-bench, 2306.05685), else the last number after "score" or "rating", else the last number; "7/10"
            is 7
    choice  [[good]], else the choice that stands last as a word of its own; `choices` gives its value
    json    the last JSON object in the answer; `key` is a number or a boolean of it
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import os
import re
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rewards.api import Context, Sample, Score, reward

if TYPE_CHECKING:
    import aiohttp

PROMPT = """Judge how well the answer serves the one who asked. Be strict and consistent.

[Question]
{prompt}

[Answer]
{completion}

Explain in one or two sentences, then give a whole number from 1 (useless) to 10 (perfect) as: [[number]]"""

Parse = Literal["number", "choice", "json"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_MARKED = re.compile(r"\[\[\s*([^\[\]]+?)\s*\]\]")
_NAMED = re.compile(rf"(?:score|rating)\W{{0,12}}?(?:is\W{{1,4}})?({_NUMBER})", re.IGNORECASE)
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})(?:\s*/\s*\d+)?(?![\w])")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_BACKOFF_SECONDS = 0.5
_MARGIN_SECONDS = 0.25  # before the deadline, so that what the endpoint said last is told
_BRACES = "braces that are meant are doubled: {{ }}"
_KEPT = 2000  # characters of an answer that are kept as info


def _check(
    base_url: str,
    prompt: str = PROMPT,
    system: str | None = None,
    parse: Parse = "number",
    choices: dict | None = None,
    scale: list[float] | None = None,
    api_key_env: str | None = None,
) -> None:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base_url!r}; it starts with http:// or https:// and usually ends in /v1")
    for text in (prompt, system or ""):
        _check_template(text)
    if "{completion" not in prompt:
        raise ValueError("the prompt has no {completion}: the judge would not see what it judges")
    if (parse == "choice") != bool(choices):
        raise ValueError("`parse: choice` and `choices: {word: value, ...}` go together")
    for word, value in (choices or {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"choices.{word} is {value!r}, not a number")
    if scale is not None and not (len(scale) == 2 and scale[0] < scale[1]):
        raise ValueError(f"scale is [lowest, highest], not {scale}")
    if api_key_env is not None and not os.environ.get(api_key_env):
        raise ValueError(f"the environment variable {api_key_env} is not set here; it holds the key of {base_url}")


def _check_template(text: str) -> None:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"the prompt is no template ({error}); {_BRACES}") from error
    for name in fields:
        if not re.fullmatch(r"prompt|completion|row\[[^\[\]]+\]", name):
            raise ValueError(
                f"the prompt has {{{name}}}; known are {{prompt}}, {{completion}} and {{row[column]}}; {_BRACES}"
            )


@reward(batch=1, concurrency=256, timeout_s=120, retries=1, cache=True, validate=_check)
async def judge(
    samples: Sequence[Sample],
    ctx: Context,
    *,
    base_url: str,
    model: str,
    prompt: str = PROMPT,
    system: str | None = None,
    parse: Parse = "number",
    choices: dict | None = None,
    key: str = "score",
    scale: list[float] | None = None,
    api_key_env: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 512,
    extra: dict | None = None,
    images: bool = True,
) -> list[Score]:
    """A language model's verdict on each completion, over any OpenAI-compatible endpoint.

    Args:
        base_url: of the API, such as http://localhost:8000/v1. model: the name that it serves.
        prompt, system: templates with {prompt}, {completion} and {row[column]}.
        parse: how its answer is read: number, choice (by `choices`: word -> value) or json (`key` of an object).
        scale: [lowest, highest] that a score may be; outside is a failure.
        api_key_env: name of the environment variable that holds the key.
        temperature, max_tokens: of the judge's answer. extra: further fields of the request.
        images: whether the judge is shown the images of the prompt, before its text.
    """
    headers = {"authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
    url = base_url.rstrip("/") + "/chat/completions"
    fixed = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(extra or {})}

    async def one(sample: Sample) -> Score:
        text = _filled(prompt, sample)
        shown = await asyncio.to_thread(_images, sample) if images else []
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}
        ]
        if system is not None:
            asked.insert(0, {"role": "system", "content": _filled(system, sample)})
        reply = await _ask(url, headers, {**fixed, "messages": asked}, ctx)
        value = read_answer(reply, parse, choices or {}, key)
        if scale is not None and not scale[0] <= value <= scale[1]:
            raise ValueError(f"the judge's score {value:g} is outside {scale}; its answer: {reply[:300]!r}")
        return Score(value, info={"answer": reply[:_KEPT]})

    return list(await asyncio.gather(*(one(sample) for sample in samples)))


def _filled(template: str, sample: Sample) -> str:
    return template.format(prompt=_conversation(sample), completion=sample.completion, row=sample.row)


def _images(sample: Sample) -> list[dict[str, Any]]:
    """The sample's images as parts of a message, as the policy saw them. ValueError where it has other media."""
    parts = []
    for medium in sample.media:
        if medium["type"] != "image":
            raise ValueError(f"a judge is shown images alone, and the prompt has {medium['type']}; set images: false")
        data = base64.b64encode(Path(medium["path"]).read_bytes()).decode("ascii")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return parts


def _conversation(sample: Sample) -> str:
    """The prompt as text: a single message as it stands, several under their roles."""
    texts = [_text(m.get("content")) for m in sample.messages]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{m.get('role')}: {text}" for m, text in zip(sample.messages, texts, strict=True))


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "".join(p.get("text", "") if isinstance(p, Mapping) else str(p or "") for p in parts)


# ------------------------------------------------------------------------------------------------- the endpoint

_sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}


def _session() -> aiohttp.ClientSession:
    """One per process: connections are kept and used again. The pool bounds the calls in flight."""
    import aiohttp

    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        _sessions[loop] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=True)
    return _sessions[loop]


async def _ask(url: str, headers: Mapping[str, str], body: Mapping[str, Any], ctx: Context) -> str:
    """The text of the answer. Raises RuntimeError with what the endpoint said where it gives none in time."""
    import aiohttp

    attempt = 0
    while True:
        wait = None
        limit = aiohttp.ClientTimeout(total=max(0.1, ctx.remaining() - _MARGIN_SECONDS))
        try:
            async with _session().post(url, json=body, headers=headers, timeout=limit) as answer:
                text = await answer.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        else:
            if answer.status == 200:
                return _content(text)
            said = f"status {answer.status}: {text[:300]}"
            if answer.status != 429 and answer.status < 500:
                raise RuntimeError(f"{url} answered {said}")
            wait = _retry_after(answer.headers.get("retry-after"))
        wait = _BACKOFF_SECONDS * 2**attempt if wait is None else wait
        attempt += 1
        if wait >= ctx.remaining():
            raise RuntimeError(f"{url} gave no answer in time, asked {attempt} times; the last: {said}")
        await asyncio.sleep(wait)


def _retry_after(value: str | None) -> float | None:
    """Seconds that Retry-After asks for: a number of them, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _content(body: str) -> str:
    """The first choice's text. RuntimeError where there is none."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"the endpoint's answer is no chat completion ({error!r}): {body[:300]!r}") from error
    if not isinstance(content, str):
        raise RuntimeError(f"the judge's answer has no text: {body[:300]!r}; perhaps max_tokens ended its reasoning")
    return content


# ------------------------------------------------------------------------------------------------- its answer


def read_answer(text: str, parse: Parse, choices: Mapping[str, float], key: str) -> float:
    """The score in a judge's answer. ValueError, with the answer, where it holds none."""
    answer = _THOUGHT.sub("", text).strip()
    found = {"number": _number, "choice": lambda a: _choice(a, choices), "json": lambda a: _json(a, key)}[parse](answer)
    if found is None:
        raise ValueError(f"no {parse} can be read in the judge's answer {answer[:300]!r}")
    return found


def _number(answer: str) -> float | None:
    for marked in reversed(_MARKED.findall(answer)):
        found = _ANY.fullmatch(marked)
        if found:
            return float(found[1])
    named = _NAMED.findall(answer)
    plain = _ANY.findall(answer)
    return float(named[-1]) if named else float(plain[-1]) if plain else None


def _choice(answer: str, choices: Mapping[str, float]) -> float | None:
    values = {str(word).casefold(): float(value) for word, value in choices.items()}
    for marked in reversed(_MARKED.findall(answer)):
        if marked.casefold() in values:
            return values[marked.casefold()]
    longest = sorted(map(re.escape, values), key=len, reverse=True)
    found = re.findall(rf"(?<!\w)(?:{'|'.join(longest)})(?!\w)", answer.casefold())
    return values[found[-1]] if found else None


def _json(answer: str, key: str) -> float | None:
    decoder = json.JSONDecoder()
    found, at = None, answer.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except ValueError:
            end = at + 1
        else:
            number = value.get(key)
            if isinstance(number, int | float):  # True is 1
                found = float(number)
        at = answer.find("{", end)
    return found
