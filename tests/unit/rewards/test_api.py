"""What a plugin sees and returns, and how it is found, named and described."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rewards import Objective, PluginError, Sample, Score, reward
from rewards.api import ErrorPolicy
from rewards.find import builtin_names, load
from rewards.naming import Named, objective_names
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

ROOT = Path(__file__).parents[3]


def run(folder: Path, source: str, *uses: str | PluginSpec, samples: list[Sample], name: str = "mine.py") -> PoolResult:
    (folder / name).write_text(source)
    specs = [u if isinstance(u, PluginSpec) else PluginSpec(u) for u in uses]
    with RewardPool(specs, folder, seed=7) as pool:
        return pool.score_sync(samples)


def test_a_decorated_function_is_still_a_function() -> None:
    @reward
    def plain(samples):
        return [1.0 for _ in samples]

    @reward(objectives={"a": Objective(kind="cost")}, timeout_s=5, version="2")
    async def judge(samples, ctx):
        return [Score({"a": 1.0}) for _ in samples]

    assert plain([Sample("x")]) == [1.0]
    assert asyncio.run(judge([Sample("x")], None))[0].values == {"a": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0}, {"batch": 0}, {"scope": "token"}, {"on_error": "zero"}, {"max_error_rate": 2},
        {"objectives": {}}, {"isolation": "thread"}, {"retries": -1}, {"concurrency": 0},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_where_they_are_written(options: dict[str, object]) -> None:
    with pytest.raises(PluginError):
        reward(**options)(lambda samples: [])


def test_an_impossible_range_or_kind_is_refused() -> None:
    for wrong in ({"range": (1, 1)}, {"kind": "penalty"}):
        with pytest.raises(PluginError):
            Objective(**wrong)


def test_error_policies_are_read_strictly() -> None:
    assert ErrorPolicy.parse("floor(-1.5)").value == -1.5
    for wrong in ("floor()", "floor(nan)", "floor(1", "skip", "Mask"):
        with pytest.raises(PluginError, match="on_error"):
            ErrorPolicy.parse(wrong)


def test_a_users_file_may_be_called_rewards_py(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 0.25")
    source = (
        "from rewards import reward\nimport helper\n@reward\ndef mine(samples): return [helper.VALUE] * len(samples)"
    )
    result = run(tmp_path, source, "rewards.py:mine", samples=[Sample("a")], name="rewards.py")
    assert result.objectives == ("mine",) and result.scores == [[0.25]]


def test_nothing_in_the_plugins_folder_hides_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('this is not json')")
    source = "import json\ndef mine(samples): return [float(json.loads('2'))] * len(samples)"
    assert run(tmp_path, source, "mine.py:mine", samples=[Sample("a")]).scores == [[2.0]]


def test_a_dotted_module_is_found_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "judges.py").write_text("def kind(samples): return [1] * len(samples)")
    assert run(tmp_path, "", "pkg.judges:kind", samples=[Sample("a")]).scores == [[1.0]]


def test_a_sample_arrives_as_it_was_sent(tmp_path: Path) -> None:
    row = {
        "bytes": b"\x00\xff", "when": datetime.date(2024, 5, 6), "price": decimal.Decimal("1.10"),
        "array": np.arange(3), "count": np.int64(4), "nested": {"list": [1, None, "\ud800"]}, "text": "ü\n",
    }  # fmt: skip
    source = (
        "import datetime, decimal\n"
        "def mine(samples):\n"
        "    s = samples[0]\n"
        "    assert s.row == {'bytes': b'\\x00\\xff', 'when': datetime.date(2024, 5, 6), 'array': [0, 1, 2],\n"
        "        'price': decimal.Decimal('1.10'), 'count': 4, 'nested': {'list': [1, None, '\\ud800']},\n"
        "        'text': 'ü\\n'}, s\n"
        "    assert s.messages == [{'role': 'user', 'content': 'hi'}] and s.token_ids == [5, 6] and s.truncated\n"
        "    assert (s.group_id, s.sample_id, s.policy_version, s.completion) == (3, 2, 9, 'done')\n"
        "    return [1.0]\n"
    )
    sample = Sample("done", [{"role": "user", "content": "hi"}], row, [5, 6], True, 3, 2, (), 9)
    result = run(tmp_path, source, "mine.py:mine", samples=[sample])
    assert result.scores == [[1.0]], result.failures


def test_a_sample_that_cannot_be_sent_is_one_failed_sample(tmp_path: Path) -> None:
    samples = [Sample("a"), Sample("b", row={"odd": object()}), Sample("c")]
    result = run(tmp_path, "def mine(samples): return [1] * len(samples)", "mine.py:mine", samples=samples)
    assert result.scores == [[1.0], [None], [1.0]] and "object" in result.failures[0].message


OBJECTIVES = """
from rewards import reward, Objective, Score

@reward(objectives={"helpful": Objective(range=(-5, 5)), "harm": Objective(kind="cost")})
async def judge(samples, ctx, *, bias: float = 0.0):
    ctx.log_metric("words", sum(len(s.completion.split()) for s in samples))
    ctx.log_column("upper", [s.completion.upper() for s in samples])
    return [Score({"helpful": 3.0 + bias, "harm": None}, info={"seed": ctx.seed(s)}) for s in samples]

def harm(samples):
    return [None, 2.0]
"""


def test_objectives_are_named_and_none_is_not_applicable(tmp_path: Path) -> None:
    spec = PluginSpec("mine.py:judge", args={"bias": 0.5})
    result = run(tmp_path, OBJECTIVES, spec, "mine.py:harm", samples=[Sample("a b"), Sample("c", sample_id=1)])
    assert result.objectives == ("helpful", "judge.harm", "harm.harm")
    assert result.kinds == ("reward", "cost", "reward")
    assert result.scores == [[3.5, None, None], [3.5, None, 2.0]]
    assert result.failures == () and result.errors == {"judge": 0, "harm": 0}
    assert result.metrics["reward/judge/words"] == 3
    assert [i["judge"]["upper"] for i in result.infos] == ["A B", "C"]
    assert result.infos[0]["judge"]["seed"] != result.infos[1]["judge"]["seed"]


def test_a_samples_seed_does_not_depend_on_how_it_was_batched(tmp_path: Path) -> None:
    source = "def mine(samples, ctx): return [ctx.seed(s) % 1000 for s in samples]"
    samples = [Sample("a", group_id=g) for g in range(6)]
    whole = run(tmp_path, source, "mine.py:mine", samples=samples)
    split = run(tmp_path, source, PluginSpec("mine.py:mine", options={"batch": 1}), samples=samples)
    assert whole.scores == split.scores and len({row[0] for row in whole.scores}) > 1


def test_as_renames_a_plugin_and_its_only_objective() -> None:
    one, two = Named("short", ("brevity",), True), Named("judge", ("helpful", "harm"), True)
    assert objective_names([one, two]) == [("short",), ("helpful", "harm")]
    assert objective_names([two, Named("other", ("harm",), False)]) == [("helpful", "judge.harm"), ("other.harm",)]
    with pytest.raises(PluginError, match="two rewards are called 'x'"):
        objective_names([Named("x", ("a",), False), Named("x", ("b",), False)])


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("nothing", {}, "there is no reward called 'nothing'"),
        ("gone.py:f", {}, "there is no file"),
        ("mine.py:g", {}, "functions there: f, Kind"),
        ("pkg_that_is_not:f", {}, "pkg_that_is_not"),
        ("broken.py:f", {}, "importing it failed: SyntaxError"),
        ("raises.py:f", {}, "raises.py:1"),
        ("mine.py:Kind", {}, "a reward is a function"),
        ("mine.py:f", {"targt": 3}, "f has no argument 'targt'"),
        ("mine.py:f", {"target": "three"}, "argument 'target' of f is 'three'"),
        ("mine.py:f", {"target": True}, "argument 'target' of f is True"),
        ("mine.py:f", {}, "f needs the argument 'target'"),
        ("length", {}, "give `target`"),
        ("regex", {"pattern": "("}, "is no regular expression"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_its_reason(
    tmp_path: Path, use: str, args: dict[str, object], message: str
) -> None:
    (tmp_path / "mine.py").write_text("def f(samples, *, target: int): return []\nclass Kind: pass")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("raise SystemExit(3)")
    with pytest.raises(PluginError) as caught:
        load(PluginSpec(use, args=args), tmp_path)
    assert message in str(caught.value) and use in str(caught.value)
    with RewardPool([PluginSpec(use, args=args)], tmp_path, 0) as pool, pytest.raises(PluginError) as again:
        pool.score_sync([Sample("a")])
    assert str(again.value) == str(caught.value)


def test_a_plugin_that_ends_its_process_on_import_is_refused_with_its_output(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\nprint('last words', flush=True)\nos._exit(4)")
    with RewardPool([PluginSpec("mine.py:f")], tmp_path, 0) as pool, pytest.raises(PluginError, match="last words"):
        pool.score_sync([Sample("a")])


def describe(*arguments: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "rewards.describe", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, json.loads(done.stdout)


def test_describe_prints_one_line_of_json_whatever_the_plugin_prints(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('hello')\n" + OBJECTIVES)
    status, found = describe("mine.py:judge", "--folder", str(tmp_path), "--args", '{"bias": 1}')
    assert status == 0
    assert found["objectives"] == {
        "helpful": {"kind": "reward", "range": [-5, 5]}, "harm": {"kind": "cost", "range": None},
    }  # fmt: skip
    assert found["parameters"] == {"bias": {"required": False, "type": "float", "default": 0.0}}
    assert found["is_async"] and found["source"] == str(tmp_path / "mine.py") and len(found["sha256"]) == 64
    status, found = describe("mine.py:judg", "--folder", str(tmp_path))
    assert status == 2 and "judge" in found["error"]["remedy"]


def test_recipe_options_override_the_decorators(tmp_path: Path) -> None:
    source = "from rewards import reward\n@reward(timeout_s=3, batch=7)\ndef mine(samples): return [1] * len(samples)"
    (tmp_path / "mine.py").write_text(source)
    options = load(PluginSpec("mine.py:mine", options={"timeout_s": 9, "on_error": "fail"}), tmp_path).options
    assert (options.timeout_s, options.batch, options.on_error) == (9, 7, "fail")
    assert load(PluginSpec("mine.py:mine"), tmp_path).scope == "sample"
    assert load(PluginSpec("mine.py:mine", options={"scope": "group"}), tmp_path).scope == "group"
    assert load(PluginSpec("mine.py:mine", signature="trl"), tmp_path).scope == "batch"
    with pytest.raises(PluginError, match="memory_mb"):
        load(PluginSpec("mine.py:mine", options={"memory_mb": 64}), tmp_path)


def test_every_builtin_is_found_by_its_name_and_gives_an_objective_of_that_name(tmp_path: Path) -> None:
    needed = {
        "regex": {"pattern": "x"},
        "format": {"parts": ["x"]},
        "length": {"target": 5},
        "json_schema": {"schema": {}},
        "language": {"language": "en"},
        "soft_overlong": {"max": 10, "cache": 5},
        "judge": {"base_url": "http://localhost:1/v1", "model": "any"},
    }
    ranges = {"soft_overlong": (-1.0, 0.0), "repetition": (-1.0, 0.0), "judge": None}
    assert {"numeric", "exact", "contains", "regex", "format", "length"} <= set(builtin_names())
    for name in builtin_names():
        found = load(PluginSpec(name, args=needed.get(name, {})), tmp_path).describe()
        assert list(found["objectives"]) == [found["name"]] == [name]
        assert found["doc"] and found["objectives"][name]["range"] == ranges.get(name, (0.0, 1.0))


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, rewards.pool, rewards.describe, rewards.process, rewards.builtins.numeric\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy', 'align'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_example_plugin_runs_in_a_pool() -> None:
    with RewardPool([PluginSpec("brevity_reward.py:brevity", args={"words": 1})], ROOT / "examples", 0) as pool:
        assert pool.score_sync([Sample(""), Sample("yes"), Sample("a b c")]).scores == [[1.0], [0.5], [0.25]]


def test_a_slow_async_judge_scores_many_samples_at_once(tmp_path: Path) -> None:
    source = (
        "import asyncio\nfrom rewards import reward\n"
        "@reward(batch=4, concurrency=64)\nasync def judge(samples):\n"
        "    await asyncio.sleep(0.3)\n    return [1.0] * len(samples)"
    )
    (tmp_path / "mine.py").write_text(source)
    with RewardPool([PluginSpec("mine.py:judge")], tmp_path, 0) as pool:
        pool.score_sync([Sample("warm")])
        started = time.monotonic()
        pool.score_sync([Sample("a")] * 256)
        seconds = time.monotonic() - started
    assert 1.2 <= seconds < 6.0, "256 samples, 64 in flight: four rounds of 0.3 s, one after another 19 s"
