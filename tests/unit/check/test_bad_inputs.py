"""What users get wrong: each mistake gives one message with a place and a remedy, exit code 2, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from align.cli.main import main
from tests.unit.check.workshop import Workshop, conversation, pair

Spoil = Callable[[Workshop], object]


@dataclass(frozen=True)
class Case:
    """name: the mistake. spoil: makes it. says: what the message must have (place, value, remedy). more: arguments."""

    name: str
    says: tuple[str, ...]
    spoil: Spoil = lambda shop: None
    more: tuple[str, ...] = ()
    verb: str = "check"


def changed(old: str, new: str) -> Spoil:
    return lambda shop: shop.change(old, new)


def both(*spoils: Spoil) -> Spoil:
    def spoil(shop: Workshop) -> None:
        for one in spoils:
            one(shop)

    return spoil


def rows(name: str, *spoilt: object) -> Spoil:
    """The data file with these lines (rows, or text as it stands) after two good ones."""
    good = [conversation(1), conversation(2)] if name == "sft.jsonl" else [pair(1), pair(2)]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in [*good, *spoilt]]
    return lambda shop: shop.write(name, "\n".join(lines) + "\n")


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


REINFORCE = """\
from align.losses.base import LossConfig as Config, Needs

def needs(config):
    return Needs(record="group")

def loss(inputs, config):
    raise NotImplementedError
"""

RECIPE = [
    Case(
        "an unknown key",
        ("recipe.yaml:21", "batchh", "did you mean `batch`"),
        changed("    batch: {seq", "    batchh: {seq"),
    ),
    Case(
        "TRL's num_generations",
        ("recipe.yaml:36", "num_generations", "value 8", "`num_generations` is `batch.group_size`"),
        changed("    rewards:\n", "    num_generations: 8\n    rewards:\n"),
    ),
    Case(
        "gradient_accumulation_steps",
        ("recipe.yaml:20", "is not needed: `batch` is global"),
        changed("    adapter: {kind: full}\n", "    adapter: {kind: full}\n    gradient_accumulation_steps: 4\n"),
    ),
    Case(
        "a wrong type",
        ("recipe.yaml:21", "stages.sft.batch.sequences", "a whole number", "'many'"),
        changed("sequences: 4", "sequences: many"),
    ),
    Case("true for a number", ("recipe.yaml:2", "`seed`", "a whole number", "true"), changed("seed: 3", "seed: true")),
    Case(
        "a number out of range",
        ("recipe.yaml:30", "stages.dpo.batch.pairs", "greater than 0", "-4"),
        changed("pairs: 4", "pairs: -4"),
    ),
    Case(
        "a missing key", ("recipe.yaml:24", "`data` is missing in `stages.dpo`"), changed("    data: pairs.jsonl\n", "")
    ),
    Case(
        "a duplicate key",
        ("recipe.yaml:3", "`seed` stands twice", "line 2"),
        changed("output: runs\n", "seed: 4\noutput: runs\n"),
    ),
    Case("a duplicate stage id", ("two stages have the id 'sft'",), changed("id: dpo", "id: sft")),
    Case(
        "an unknown stage kind",
        ("recipe.yaml:25", "`kind: prefrence`", "did you mean `preference`"),
        changed("kind: preference", "kind: prefrence"),
    ),
    Case(
        "a peer's name of a stage",
        ("recipe.yaml:25", "`kind: orpo`", "named under `loss` of `kind: preference`"),
        changed("kind: preference", "kind: orpo"),
    ),
    Case(
        "a classify stage without labels",
        ("recipe.yaml:24", "give `labels: [names]`, or `num_labels`"),
        changed(
            "kind: preference\n    from: sft\n    adapter: {rank: 8}\n    data: pairs.jsonl\n"
            "    loss: {name: dpo, beta: 0.2}\n    batch: {pairs: 4}\n",
            "kind: classify\n    from: sft\n    data: pairs.jsonl\n",
        ),
    ),
    Case("from: of an unknown stage", ("'dpp'", "no earlier stage", "sft"), changed("from: dpo", "from: dpp")),
    Case(
        "from: a best that nobody chose",
        ("recipe.yaml:33", "chooses no best checkpoint", "save: {best"),
        changed("from: dpo", "from: dpo@best"),
    ),
    Case("YAML that is none", ("recipe.yaml:24", "not valid YAML"), changed("  - id: dpo", "  - id: dpo: x")),
    Case(
        "an empty recipe",
        ("recipe.yaml", "empty", "name, model and stages"),
        lambda shop: shop.write("recipe.yaml", ""),
    ),
    Case(
        "no such recipe",
        ("other.yaml", "no such recipe", "recipe2.yaml"),
        lambda shop: shop.recipe.rename(shop.folder / "recipe2.yaml"),
    ),
    Case(
        "epochs and steps",
        ("recipe.yaml:17", "`epochs` or `steps`, not both"),
        changed("    epochs: 2\n", "    epochs: 2\n    steps: 5\n"),
    ),
    Case(
        "a batch in the wrong unit",
        ("recipe.yaml:30", "counted in pairs", "pairs: 4"),
        changed("batch: {pairs: 4}", "batch: {sequences: 4}"),
    ),
    Case(
        "dropping where nothing can be late",
        ("overdue: drop", "`staleness` above 0"),
        more=("stages.grpo.overdue=drop",),
    ),
    Case(
        "dynamic sampling that can replace no group",
        ("max_factor: 1.1` of 2 groups", "at least 1.5"),
        more=("stages.grpo.dynamic_sampling={max_factor: 1.1}",),
    ),
    Case(
        "ms-swift's word for dynamic sampling",
        ("dynamic_sample", "dynamic_sampling: {max_factor: 3}"),
        changed("    from: dpo\n    data", "    from: dpo\n    dynamic_sample: true\n    data"),
    ),
    Case(
        "an adapter that changes on the way",
        ("recipe.yaml:", "rank: 8 -> 4", "merge stage"),
        changed("    from: dpo\n    data", "    from: dpo\n    adapter: {rank: 4}\n    data"),
    ),
    Case(
        "options of another kind of adapter",
        ("recipe.yaml:27", "quant", "kind: qlora"),
        changed("{rank: 8}", "{rank: 8, quant: {type: nf4}}"),
    ),
    Case(
        "a DoRA adapter for engines that serve none",
        ("recipe.yaml:", "magnitudes (DoRA)", "use merged"),
        both(changed("{rank: 8}", "{rank: 8, kind: dora}"), changed("{max_tokens: 32}", "{weights: adapter}")),
    ),
    Case(
        "an optimizer of later versions",
        ("recipe.yaml:28", "galore", "adamw_8bit"),
        changed("adapter: {rank: 8}", "adapter: {rank: 8}\n    optim: {name: galore}"),
    ),
    Case(
        "top-p",
        ("recipe.yaml:40", "top_p", "sampling distribution"),
        changed("rollout: {max_tokens: 32}", "rollout: {max_tokens: 32, top_p: 0.9}"),
    ),
    Case(
        "greedy rollouts to learn from",
        ("recipe.yaml:40", "temperature: 0", "use 1.0"),
        changed("rollout: {max_tokens: 32}", "rollout: {max_tokens: 32, temperature: 0}"),
    ),
    Case(
        "minibatches that do not divide the groups",
        ("stages.grpo", "`minibatches: 4` does not divide `batch.groups: 6`", "it takes 1, 2, 3, 6"),
        more=("stages.grpo.batch.groups=6", "stages.grpo.minibatches=4"),
    ),
    Case(
        "verl's ppo_epochs",
        ("recipe.yaml:36", "`ppo_epochs` is `updates_per_batch`"),
        changed("    rewards:\n", "    ppo_epochs: 2\n    rewards:\n"),
    ),
    Case(
        "several updates with a loss that has no ratio",
        ("updates_per_batch: 2", "reinforce.py' has no importance ratio", "use grpo"),
        lambda shop: shop.write("reinforce.py", REINFORCE),
        more=("stages.grpo.loss=reinforce.py", "stages.grpo.updates_per_batch=2"),
    ),
    Case(
        "an unknown engine option",
        ("max_num_seq", "did you mean", "max_num_seqs"),
        more=("stages.grpo.rollout.engine.max_num_seq=4",),
    ),
    Case(
        "a placement that cannot fit",
        ("64000 CPUs are asked for (trainer 64000", "this machine has", "placement.*.cpus"),
        more=("placement.trainer.cpus=64000",),
    ),
    Case(
        "more GPUs than there are",
        ("1000 GPUs are asked for", "this machine has"),
        more=("placement.trainer.gpus=1000",),
    ),
    Case(
        "more ranks of what has one",
        ("placement.reference.ranks: 2", "not offered"),
        more=("placement.reference.ranks=2",),
    ),
    Case(
        "FSDP",
        ("placement.trainer.strategy", "FSDP is not offered by this version", "zero3"),
        more=("placement.trainer.strategy=fsdp2",),
    ),
    Case(
        "tensor parallelism, as a map",
        ("placement.trainer.strategy", "tensor parallelism is not offered"),
        more=("placement.trainer.strategy={name: tp}",),
    ),
    Case(
        "no strategy",
        ("placement.trainer.strategy", "zer2", "zero1, zero2, zero3"),
        more=("placement.trainer.strategy=zer2",),
    ),
    Case(
        "offloaded parameters that are not spread",
        ("placement.trainer.strategy", "`offload.parameters` needs zero3", "zero2"),
        more=("placement.trainer.strategy={name: zero2, offload: {parameters: cpu}}",),
    ),
    Case(
        "ZeRO over ranks that share a GPU",
        ("strategy: zero2", "share a GPU", "gpus: 1"),
        more=("placement.trainer={ranks: 2, gpus: 0.5, strategy: zero2}",),
    ),
    Case(
        "zero3 with a trained tower",
        ("strategy: zero3", "adapter.tune.vision: lora", "use zero2"),
        more=("placement.trainer.strategy=zero3", "stages.dpo.adapter.tune={vision: lora}"),
    ),
    Case(
        "another optimizer",
        ("optim.name: muon", "not offered by this version", "adamw"),
        more=("stages.sft.optim.name=muon",),
    ),
    Case(
        "training in float16",
        ("model.dtype", "float16", "bfloat16"),
        more=("model.dtype=float16",),
    ),
]

OVERRIDES = [
    Case(
        "an override without a value",
        ("override `seed=`", "a whole number", "nothing"),
        more=("seed=",),
    ),
    Case(
        "an override of an unknown stage",
        ("override `stages.grop.steps=3`", "no 'grop'", "did you mean 'grpo'", "sft, dpo, grpo"),
        more=("stages.grop.steps=3",),
    ),
    Case(
        "an override of an unknown reward",
        ("no 'brevty'", "'brevity'", "numeric, brevity"),
        more=("stages.grpo.rewards.brevty.timeout_s=3",),
    ),
    Case(
        "an override of an unknown key",
        ("override `stages.grpo.rollout.worker=2`", "did you mean `workers`"),
        more=("stages.grpo.rollout.worker=2",),
    ),
    Case("an override that is no YAML", ("override `name=[`", "not valid YAML"), more=("name=[",)),
]

LOSSES = [
    Case(
        "an unknown option within an option",
        ("`correction.lvel` of loss 'grpo'", "did you mean `level`"),
        more=("stages.grpo.loss={name: grpo, correction: {lvel: token}}",),
    ),
    Case(
        "a choice within an option that there is not",
        ("`correction.mode` of loss 'grpo'", "truncate or mask", "'clip'"),
        more=("stages.grpo.loss={name: grpo, correction: {mode: clip}}",),
    ),
    Case(
        "a correction without a bound",
        ("`correction` needs `cap`, `floor` or both",),
        more=("stages.grpo.loss={name: grpo, correction: {cap: null}}",),
    ),
    Case(
        "a cap that cuts what needs no correction",
        ("`correction.cap` of loss 'grpo'", "greater than or equal to 1", "0.5"),
        more=("stages.grpo.loss={name: grpo, correction: {cap: 0.5}}",),
    ),
    Case(
        "TRL's correction",
        ("vllm_importance_sampling_mode", "`loss.correction`", "{level: sequence, mode: mask}"),
        more=("stages.grpo.loss={name: grpo, vllm_importance_sampling_mode: sequence_mask}",),
    ),
    Case(
        "an unknown loss",
        ("recipe.yaml:29", "no loss named 'dpoo'", "did you mean 'dpo'"),
        changed("{name: dpo, beta: 0.2}", "{name: dpoo}"),
    ),
    Case(
        "an unknown option of a loss",
        ("recipe.yaml:29", "`bta` of loss 'dpo'", "did you mean `beta`"),
        changed("beta: 0.2", "bta: 0.2"),
    ),
    Case(
        "a loss option out of range",
        ("recipe.yaml:29", "`beta`", "greater than 0", "-1"),
        changed("beta: 0.2", "beta: -1"),
    ),
    Case(
        "a loss named as a function of its file",
        ("focal.py:loss", "a loss is a file, not a function in one: name", "focal.py, with all three"),
        lambda shop: shop.write("focal.py", "def loss(inputs, config):\n    return None\n"),
        ("stages.sft.loss=focal.py:loss",),
    ),
    Case(
        "a loss on other records",
        ("override", "'dpo' learns from pairs", "kind: preference"),
        more=("stages.sft.loss=dpo",),
    ),
]

PLUGINS = [
    Case("an unknown reward", ("numerc", "recipe.yaml:37", "ours:", "numeric"), changed("- numeric\n", "- numerc\n")),
    Case(
        "a reward's file is missing",
        ("nowhere.py", "recipe.yaml:38"),
        changed("judge.py:brevity", "nowhere.py:brevity"),
    ),
    Case(
        "a reward that its file does not have",
        ("judge.py", "brevitty", "brevity"),
        changed("judge.py:brevity", "judge.py:brevitty"),
    ),
    Case(
        "a reward that fails to import",
        ("judge.py", "no_such_module"),
        lambda shop: shop.write("judge.py", "import no_such_module\n"),
    ),
    Case(
        "a reward that leaves at import",
        ("judge.py", "recipe.yaml:38"),
        lambda shop: shop.write("judge.py", "import os\nos._exit(3)\n"),
    ),
    Case(
        "an unknown argument of a reward",
        ("numeric", "tolerence"),
        changed("- numeric\n", "- {use: numeric, args: {tolerence: 1}}\n"),
    ),
    Case(
        "a reward that compares, on rows without an answer",
        ("prompts.jsonl:1", "numeric finds no answer in any of 3 rows", "it has: prompt", "recipe.yaml:37"),
        lambda shop: (
            shop.write("prompts.jsonl", [{"prompt": f"What is {n}+{n}?"} for n in range(3)]),
            shop.change("data: {path: sft.jsonl}", "data: {path: prompts.jsonl}"),
        ),
    ),
    Case(
        "a reward of a peer's signature",
        ("judge.py", "`completions`", "signature: trl", "recipe.yaml:38"),
        lambda shop: shop.write("judge.py", "def brevity(completions, **kwargs):\n    return []\n"),
    ),
    Case(
        "a weight without an objective",
        ("recipe.yaml:39", "'politeness'", "numeric, brevity"),
        changed("brevity: 0.5}", "politeness: 0.5}"),
    ),
    Case(
        "two rewards of one name",
        ("recipe.yaml:36", "two rewards are called 'numeric'", "as:"),
        changed("- numeric\n", "- numeric\n      - numeric\n"),
    ),
]

DATA = [
    Case(
        "a missing file",
        ("nothing.jsonl", "no such file", "recipe.yaml:20"),
        changed("    data: sft.jsonl\n    batch", "    data: nothing.jsonl\n    batch"),
    ),
    Case("bad JSON", ("sft.jsonl:3", "JSON"), rows("sft.jsonl", '{"messages": [')),
    Case("an empty completion", ("sft.jsonl:3", "empty"), rows("sft.jsonl", chat(("user", "Hi"), ("assistant", "")))),
    Case("no assistant turn", ("sft.jsonl:3", "assistant"), rows("sft.jsonl", chat(("user", "Hi")))),
    Case("an unknown role", ("sft.jsonl:3", "robot"), rows("sft.jsonl", chat(("user", "Hi"), ("robot", "Ho")))),
    Case("a row that is a list", ("sft.jsonl:3",), rows("sft.jsonl", "[1, 2]")),
    Case(
        "chosen equals rejected",
        ("pairs.jsonl:3", "chosen", "rejected"),
        rows("pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    ),
    Case(
        "columns that fit no layout",
        ("pairs.jsonl", "no layout", "question", "columns:"),
        lambda shop: shop.write("pairs.jsonl", [{"question": "a", "good": "b"}]),
    ),
    Case("columns: that name no column", ("pairs.jsonl", "best"), more=("stages.dpo.data.columns={chosen: best}",)),
    Case("an empty file", ("pairs.jsonl", "no rows"), lambda shop: shop.write("pairs.jsonl", "")),
    Case("an unknown format", ("pairs.jsonl", "trll"), more=("stages.dpo.data.format=trll",)),
    Case("longer than max_length", ("sft.jsonl:1", "max_length", "too_long"), more=("stages.sft.data.max_length=5",)),
    Case(
        "a prompt longer than max_length",
        ("sft.jsonl:1", "max_length", "too_long"),
        more=("stages.grpo.data.max_length=5",),
    ),
    Case("a limit of nothing", ("`stages.grpo.data.limit`", "greater than 0"), more=("stages.grpo.data.limit=0",)),
    Case(
        "a file of an unknown type",
        ("notes.docx", ".jsonl"),
        lambda shop: (shop.write("notes.docx", "x"), shop.change("    data: pairs.jsonl", "    data: ./notes.docx")),
    ),
]

MODEL = [
    Case(
        "completions longer than the engine",
        ("recipe.yaml:40", "32", "max_model_len", "40"),
        more=("stages.grpo.rollout.max_model_len=40",),
    ),
    Case(
        "completions longer than the model",
        ("max_tokens: 400", "max_position_embeddings", "256"),
        more=("stages.grpo.rollout.max_tokens=400",),
    ),
    Case("no such model folder", ("no such folder", "recipe.yaml:4"), lambda shop: use_model(shop, "./models/none")),
    Case(
        "a model folder without config.json",
        ("config.json", "empty-model"),
        lambda shop: ((shop.folder / "empty-model").mkdir(), use_model(shop, "./empty-model")),
    ),
    Case(
        "path and config", ("recipe.yaml:4", "`path`", "`config`"), changed("  tokenizer:", "  path: a/b\n  tokenizer:")
    ),
    Case(
        "an adapter among a model's files",
        ("recipe.yaml:4", "holds an adapter beside the model", "model.adapter"),
        lambda shop: (model_with_adapter(shop), use_model(shop, "./merged")),
    ),
    Case("a template that does not compile", ("template",), more=("model.chat_template={% for",)),
    Case(
        "a reference that is not there",
        ("no such folder", "reference"),
        more=("stages.dpo.reference={path: ./nowhere}",),
    ),
]

CASES = [*RECIPE, *OVERRIDES, *LOSSES, *PLUGINS, *DATA, *MODEL]


def model_with_adapter(shop: Workshop) -> None:
    (shop.folder / "merged").mkdir()
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        shop.write(f"merged/{name}", "{}")


def use_model(shop: Workshop, path: str) -> None:
    text = shop.recipe.read_text()
    head, tail = text.index("model:"), text.index("stages:")
    shop.write("recipe.yaml", f"{text[:head]}model: {{path: {path}}}\n{text[tail:]}")


def test_there_are_at_least_thirty_kinds_of_mistakes() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_gives_one_message_with_place_and_remedy(
    case: Case, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    case.spoil(workshop)
    recipe = "other.yaml" if case.name == "no such recipe" else "recipe.yaml"
    code = main(["check", recipe, *case.more])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert err.startswith("error: ") and err.count("error: ") == 1, err
    assert "Traceback" not in err + out and "pydantic" not in err, err
    for words in case.says:
        assert words in err, f"{words!r} is not in:\n{err}"
    assert not (workshop.folder / "runs").exists()


def test_an_existing_run_folder_is_refused_by_run_and_named_by_check(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    (workshop.folder / "runs" / "small").mkdir(parents=True)
    workshop.write("runs/small/run.json", "{}")
    assert main(["check", "recipe.yaml"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert main(["run", "recipe.yaml"]) == 2
    err = capsys.readouterr().err
    assert "runs/small" in err and "--resume" in err and "name=" in err


def test_check_refuses_a_place_in_which_no_run_can_be(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    file = workshop.write("taken", "a file")
    for output in (file, f"{file}/below/it", "/proc/1/nothing"):
        assert main(["check", "recipe.yaml", f"output={output}"]) == 2
        said = capsys.readouterr().err
        assert "the run's" in said and "choose another place" in said and "not foreseen" not in said


def test_many_mistakes_are_told_at_once(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.change("{name: dpo, beta: 0.2}", "{name: dpo, bta: 0.2}")
    workshop.change("- numeric\n", "- numerc\n")
    rows("sft.jsonl", '{"messages": [')(workshop)
    assert main(["check", "recipe.yaml", "placement.trainer.gpus=1000"]) == 2
    err = capsys.readouterr().err
    for words in ("`bta`", "numerc", "sft.jsonl:3", "1000 GPUs"):
        assert words in err


def test_the_command_itself_ends_with_status_2_and_no_traceback(workshop: Workshop) -> None:
    workshop.change("seed: 3", "sed: 3")
    done = subprocess.run(
        [sys.executable, "-m", "align.cli.main", "check", "recipe.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe.yaml:2: unknown key `sed`") and "Traceback" not in done.stderr
