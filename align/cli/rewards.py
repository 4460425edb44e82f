"""`align rewards`: list reward plugins; try one on data before a run. No torch."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from align import errors
from align.actors.plugins import align_errors
from align.check.scratch import scratch
from align.check.trial_data import Trial, read_trial
from align.cli.arguments import add_debug
from align.plugins import REWARDS, describe_in_child, shadowed
from align.recipe.document import parse_value
from rewards import trial
from rewards.api import PluginError, Sample
from rewards.budget import allowed_failures
from rewards.describe import describe
from rewards.find import ENTRY_POINTS, builtin_names, installed
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

_TEXT = 100  # characters of a text on a line
_DEFAULT = 40  # of an argument's default


def add(parser: argparse.ArgumentParser) -> None:
    """The verbs `list` and `try`; `arguments.action` says which."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="action")
    every = verbs.add_parser("list", help="ours and those of installed packages, with what they give and take")
    one = verbs.add_parser("try", help="score completions that are in a file; prove its gold answers")
    for verb in (every, one):
        add_debug(verb)
    one.add_argument("name", help="one of ours, an entry point, file.py:function or package.module:function")
    one.add_argument("--data", required=True, metavar="FILE", help="data file or folder, or a run's rollouts")
    one.add_argument("--completion", required=True, metavar="COLUMN", help="column with the text to score, or a list")
    one.add_argument(
        "--args", nargs="+", default=[], metavar="key=value", help="the plugin's arguments; values are YAML"
    )
    one.add_argument(
        "--columns", nargs="+", default=[], metavar="ours=theirs", help="as in a recipe, such as prompt=question"
    )
    one.add_argument("--limit", type=int, default=100, metavar="ROWS", help="rows to read (default 100)")
    one.add_argument("--show", type=int, default=5, metavar="N", help="samples to print with their texts (default 5)")
    one.add_argument("--signature", choices=("align", "trl", "swift"), default="align")
    one.add_argument("--scope", choices=("sample", "batch", "group"), help="as in a recipe: what a call may hold")
    one.add_argument(
        "--text",
        choices=("stripped", "raw"),
        help="as in a recipe: of a run's rollouts, with special tokens or without",
    )


def run(arguments: argparse.Namespace) -> int:
    """0; of `try`, 1 where too many samples fail or a gold answer does not score best. Raises UserError."""
    if arguments.action == "list":
        print("\n".join(_listed()))
        return 0
    return _try(arguments)


# ------------------------------------------------------------------------------------------------- list


def _listed() -> list[str]:
    """Every plugin that a name finds; one that does not load is listed with the reason."""
    out = []
    ours = {name: name for name in builtin_names()} | REWARDS
    for name in sorted(ours):
        try:
            out += _entry(describe(PluginSpec(ours[name]), ".", check=False), "")
        except PluginError as error:
            out += [name, f"    does not load: {error.what}"]
    for name in sorted(set(installed()) - set(ours)):
        try:
            found = describe_in_child("rewards.describe", [name, "--unchecked"], name=name)
            out += _entry(found, f"  (installed: {found['source']})")
        except errors.PluginError as error:
            out += [name, f"    does not load: {error.what}"]
    said = (shadowed(name, ENTRY_POINTS, sorted(ours)) for name in sorted(set(installed()) & set(ours)))
    return out + [f"note: {note}" for note in said if note is not None]


def _entry(described: dict[str, Any], whence: str) -> list[str]:
    gives = ", ".join(_objective(name, o, described["name"]) for name, o in described["objectives"].items())
    takes = ", ".join(_parameter(name, p) for name, p in described["parameters"].items())
    doc = described["doc"].splitlines()[0] if described["doc"] else "(no description)"
    scope = "; sees whole groups" if described["scope"] != "sample" else ""
    gold = "; has gold answers" if described["gold"] else ""
    return [
        f"{described['name']}{whence}",
        f"    {doc}",
        f"    gives: {gives}{scope}{gold}",
        f"    args:  {takes or 'none'}{', and any other' if described['open_args'] else ''}",
    ]


def _objective(name: str, objective: dict[str, Any], plugin: str) -> str:
    limits = objective["range"]
    within = f" in [{limits[0]:g}, {limits[1]:g}]" if limits else ""
    return f"{'' if name == plugin else name + ': '}{objective['kind']}{within}"


def _parameter(name: str, parameter: dict[str, Any]) -> str:
    if parameter["required"]:
        return f"{name} (needed)"
    default = json.dumps(parameter["default"], ensure_ascii=False)
    return f"{name}={default}" if len(default) <= _DEFAULT else f"{name}={default[: _DEFAULT - 3]}..."


# ------------------------------------------------------------------------------------------------- try


def _try(arguments: argparse.Namespace) -> int:
    columns = {key: str(value) for key, value in _pairs(arguments.columns, "--columns").items()}
    args = _pairs(arguments.args, "--args")
    asked = {name: value for name in ("scope", "text") if (value := getattr(arguments, name)) is not None}
    own = PluginSpec(REWARDS.get(arguments.name, arguments.name), None, args, asked, arguments.signature)
    # every failure is shown, and none ends the trial
    spec = replace(own, options={**asked, "on_error": "mask", "max_error_rate": 1.0})
    with scratch() as aside:
        data = read_trial(Path(arguments.data), arguments.completion, columns, arguments.limit, aside)
        return _judge(data, spec, own, arguments.show)


def _judge(data: Trial, spec: PluginSpec, own: PluginSpec, show: int) -> int:
    """Print what the plugin says of the samples; 0 where it holds. own: as the plugin itself would run."""
    with align_errors(), _told_once(), RewardPool([spec], Path.cwd(), seed=0) as pool:
        [described] = pool.run(pool.start())
        if described["options"]["text"] == "raw":  # what is shown is what is scored
            data.samples = [s if s.raw is None else replace(s, completion=s.raw, raw=None) for s in data.samples]
        result = pool.score_sync(data.samples)
        print("\n".join([*_head(described, data), *_shown(data, result, show), *_summary(data, result)]))
        failed = result.errors[described["name"]]
        bad = failed > allowed_failures(_own_rate(own), len(data.samples), _unit(described, data.samples))
        if described["gold"]:
            proof = pool.run(trial.prove_gold(pool, data.samples))
            print("\n".join(_proof(data, proof)))
            bad = bad or not proof.holds
    return int(bad)


@contextmanager
def _told_once() -> Iterator[None]:
    """Calls that fail are counted and shown in the summary: the line that a run logs for each is left out."""
    log = logging.getLogger("rewards.execution")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _unit(described: dict[str, Any], samples: Sequence[Sample]) -> int:
    """How many samples may fail for one fault."""
    return 1 if described["scope"] == "sample" else max(Counter(s.group_id for s in samples).values())


def _own_rate(spec: PluginSpec) -> float:
    """The plugin's own max_error_rate, which a run would hold it to."""
    arguments = [spec.use, "--args", json.dumps(spec.args), "--signature", spec.signature]
    described = describe_in_child("rewards.describe", arguments, name=spec.use)
    return float(described["options"]["max_error_rate"])


def _pairs(words: Sequence[str], flag: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise errors.UserError(f"{word!r} is no key=value", where=flag, remedy=f"for example {flag} column=answer")
        found[key] = parse_value(value)
    return found


def _head(described: dict[str, Any], data: Trial) -> list[str]:
    where = f"{len(data.samples)} completions of {len({s.group_id for s in data.samples})} rows"
    lines = [f"{described['name']} on {where}, column {data.column!r} of {data.path}"]
    return lines + [f"note: {note}" for note in data.notes] + [""]


def _shown(data: Trial, result: PoolResult, count: int) -> list[str]:
    """The first samples: where from, their scores, which text was scored, and what the plugin told about it."""
    lines = []
    for i, sample in enumerate(data.samples[:count]):
        scores = ", ".join(f"{n} {_value(v)}" for n, v in zip(result.objectives, result.scores[i], strict=True))
        lines += [f"{data.origins[i]}: {scores}", f"    scored: {_short(sample.completion)}"]
        lines += [f"    info: {_cut(json.dumps(info, ensure_ascii=False))}" for info in result.infos[i].values()]
    return [*lines, ""] if lines else []


def _summary(data: Trial, result: PoolResult) -> list[str]:
    lines = []
    for k, (name, kind) in enumerate(zip(result.objectives, result.kinds, strict=True)):
        values = [value for row in result.scores if (value := row[k]) is not None]
        missing = len(result.scores) - len(values)
        if values:
            spread = f"mean {statistics.fmean(values):.4g}, std {statistics.pstdev(values):.4g}"
            lines.append(f"{name} ({kind}): {spread}, from {min(values):.4g} to {max(values):.4g}, missing {missing}")
        else:
            lines.append(f"{name} ({kind}): no score, missing {missing}")
    [(name, failed)] = result.errors.items()
    seconds = result.metrics[f"reward/{name}/seconds"]
    latencies = sorted(result.series[f"reward/{name}/latency"]) or [0.0]
    p50, p95 = (latencies[min(len(latencies) - 1, int(share * len(latencies)))] for share in (0.5, 0.95))
    lines.append(
        f"time: {seconds:.3g} s, {len(data.samples) / max(seconds, 1e-9):,.0f} samples/s; {len(latencies)} calls of "
        f"{1e3 * statistics.fmean(latencies):.3g} ms (p50 {1e3 * p50:.3g}, p95 {1e3 * p95:.3g})"
    )
    if result.failed_calls:
        calls = Counter((call.cause, call.message) for call in result.failed_calls)
        lines.append(f"failed calls: {len(result.failed_calls)} of {int(result.metrics[f'reward/{name}/calls'])}")
        lines += [f"    {count} x {cause}: {message}" for (cause, message), count in calls.most_common(5)]
    if blind := int(result.metrics.get(f"reward/{name}/stripped", 0)):
        lines.append(
            f"note: {blind} texts were scored without their special tokens; --text raw scores what was generated"
        )
    lines.append(f"errors: {failed} of {len(data.samples)} samples failed" if failed else "errors: none")
    for f in result.failures[:10]:
        lines.append(f"    {data.origins[f.index]}: {f.cause}: {f.message}")
        lines.append(f"        scored: {_short(data.samples[f.index].completion)}")
    return lines


def _proof(data: Trial, proof: trial.GoldProof) -> list[str]:
    if not proof.with_gold and not proof.errors:
        return [f"gold: none of the {proof.rows} rows has a gold answer: nothing is proved"]
    where = {s.group_id: origin for s, origin in zip(data.samples, data.origins, strict=True)}
    best = proof.with_gold - len({b.group_id for b in proof.beaten})
    lines = [
        f"gold: best on {best} of {proof.with_gold} rows with a gold answer; above {proof.above} other answers, "
        f"equal to {proof.equal}"
    ]
    for b in proof.beaten[:10]:
        than = f"{b.objective} {_value(b.value)}, worse than {_value(b.rival_value)} of {_short(b.rival)}"
        lines.append(f"    {where[b.group_id]}: {than if b.value is not None else b.rival}")
    lines += [f"    {where[number]}: gold failed: {message}" for number, message in proof.errors[:10]]
    if not proof.beaten and not proof.errors and not proof.holds:
        lines.append("    no other answer scores less than a gold one: the reward does not tell them apart")
    return lines


def _value(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


def _short(text: str) -> str:
    """In quotes, with its line breaks escaped."""
    return _cut(json.dumps(text, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 20]} ... ({len(text)} characters)"
