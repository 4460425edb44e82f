"""Reading a recipe: values as written, paths where they belong, every problem at once, and back to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import RecipeError, Unsupported
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.peers import translate

MINIMAL = """\
name: tiny
model: {path: owner/name}
stages:
  - {id: sft, kind: sft, data: data.jsonl}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str, cwd: Path | None = None):  # type: ignore[no-untyped-def]
    return load_recipe(write(folder, text), overrides, cwd=cwd or folder)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, written: str) -> None:
    recipe = load(tmp_path, MINIMAL.replace("data: data", f"optim: {{lr: {written}}}, data: data"))
    assert recipe.stages[0].optim.lr == 1e-4


@pytest.mark.parametrize("name", ["no", "on", "yes", "off", "y"])
def test_words_that_yaml_1_1_takes_for_booleans_are_words(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, MINIMAL.replace("tiny", name)).name == name


def test_octal_sexagesimal_and_dates_are_not_guessed(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "path: owner/name", "path: owner/name, template_args: {a: 010, b: 1:30, c: 2024-01-01, d: 0x10}"
    )
    args = load(tmp_path, text).model.template_args
    assert args == {"a": 10, "b": "1:30", "c": "2024-01-01", "d": 16}


def test_off_and_no_are_false_where_a_boolean_is_expected(tmp_path: Path) -> None:
    text = MINIMAL.replace("data: data.jsonl", "data: data.jsonl, eval: {data: data.jsonl, at_start: yes}")
    recipe = load(tmp_path, text + "report: {tensorboard: off}\n")
    assert recipe.report.tensorboard is False and recipe.stages[0].eval.at_start is True


def test_anchors_and_merge_keys_work_and_an_explicit_key_wins(tmp_path: Path) -> None:
    text = (
        "name: tiny\nmodel: {path: owner/name}\nstages:\n"
        "  - &first {id: a, kind: sft, data: data.jsonl, epochs: 2}\n"
        "  - {<<: *first, id: b, from: a}\n"
    )
    first, second = load(tmp_path, text).stages
    assert (first.id, second.id, second.epochs, second.from_) == ("a", "b", 2, "a")


def test_yaml_tags_make_no_python_objects(tmp_path: Path) -> None:
    assert "tag" in refusal(tmp_path, MINIMAL.replace("tiny", "!!python/object/apply:os.getcwd []"))
    assert "tag" in refusal(tmp_path, MINIMAL.replace("tiny", "!!int abc"))
    assert "the tag `!secret` is not used" in refusal(tmp_path, MINIMAL.replace("tiny", "!secret x"))


def test_paths_of_a_recipe_start_at_its_folder_and_paths_of_an_override_where_one_is(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    text = MINIMAL + "  - {id: more, kind: sft, from: sft, data: [../a.jsonl, {path: 'gen.py:rows'}, owner/set]}\n"
    recipe = load(here, text, "stages.sft.data=x.jsonl", cwd=there)
    assert recipe.stages[0].data[0].path == str(there / "x.jsonl")
    assert [s.path for s in recipe.stages[1].data] == [str(tmp_path / "a.jsonl"), f"{here}/gen.py:rows", "owner/set"]


@pytest.mark.parametrize("key", ["output", "model.path", "stages.sft.data"])
def test_a_variable_of_the_shell_in_a_path_is_refused_and_a_folder_of_that_name_is_not(
    tmp_path: Path, key: str
) -> None:
    """It would name a folder that is really called $HOME."""
    said = refusal(tmp_path, MINIMAL, f"{key}=${{HOME}}/things")
    assert "has ${HOME} in it, and a recipe knows no variables of the shell" in said
    (tmp_path / "$HOME").mkdir()
    (tmp_path / "$HOME" / "things").write_text("")
    load(tmp_path, MINIMAL, f"{key}={tmp_path}/$HOME/things")


@pytest.mark.parametrize(
    "address, remedy",
    [
        ("https://example.org/rows.jsonl", "download it"),
        ("s3://bucket/rows.jsonl", "download it"),
        ("hf://datasets/owner/rows/train.jsonl", "write the hub id, owner/rows"),
        ("https://huggingface.co/datasets/owner/rows", "write the hub id, owner/rows"),
    ],
)
def test_an_address_is_no_path(tmp_path: Path, address: str, remedy: str) -> None:
    """It was looked for as a file below the recipe's folder."""
    for key in ("stages.sft.data", "model.path"):
        said = refusal(tmp_path, MINIMAL, f"{key}={address}")
        assert f"`{key}` is an address, and none is fetched" in said and remedy in said


def test_a_stage_that_cannot_stand_where_it_does_is_told_with_its_line(tmp_path: Path) -> None:
    second = "  - {id: more, kind: sft, data: data.jsonl}\n"
    assert refusal(tmp_path, MINIMAL + second.replace("kind", "from: nowhere, kind")).startswith("recipe.yaml:5: ")
    assert refusal(tmp_path, MINIMAL + second.replace("more", "sft")).startswith("recipe.yaml:5: two stages")


def test_a_model_is_a_folder_where_there_is_one_and_a_hub_id_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).model.path == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert load(tmp_path, MINIMAL).model.path == str(tmp_path / "owner" / "name")
    assert load(tmp_path, MINIMAL.replace("owner/name", "./missing")).model.path == str(tmp_path / "missing")


def test_a_template_may_be_a_file_a_name_or_the_template_itself(tmp_path: Path) -> None:
    def template(value: str) -> str | None:
        found: str | None = load(tmp_path, MINIMAL, f"model.chat_template='{value}'").model.chat_template
        return found

    assert template("chat.jinja") == str(tmp_path / "chat.jinja")
    assert template("chatml") == "chatml"
    assert template("{{ messages }}") == "{{ messages }}"


def test_runs_go_to_the_working_directory_unless_the_recipe_says_where(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    assert load(here, MINIMAL, cwd=there).run_folder == there / "runs" / "tiny"
    assert load(here, MINIMAL + "output: results\n", cwd=there).run_folder == here / "results" / "tiny"


def test_a_dumped_recipe_is_read_back_as_the_same_recipe_from_anywhere(tmp_path: Path) -> None:
    text = """\
name: whole
seed: 7
model: {path: owner/name, chat_template: "{% if x: %} # 1e5 {% endif %}", template_args: {a: "1e5", b: "no", c: "010"}}
stages:
  - {id: s, kind: sft, data: [{path: a.jsonl, weight: 2}, {path: b.csv, weight: 1, columns: {prompt: q}}],
     optim: {lr: 1e-5}}
  - {id: p, kind: preference, from: s@best, loss: [{name: dpo, beta: 0.2}, {name: sft, weight: 0.5}], data: c.jsonl,
     reference: {path: ./ref}, save: {every: 5%, best: {metric: eval/loss, mode: min}}, eval: {data: c.jsonl}}
  - {id: o, kind: online, from: p, data: d.jsonl, rewards: ["r.py:f", {use: pkg.mod:g, as: h, timeout_s: 3}],
     rollout: {stop: ["\\n", "é"]}, objectives: {weights: {f: 1}}}
"""
    recipe = load(tmp_path, text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load(elsewhere, dump_recipe(recipe)) == recipe


def test_all_problems_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = refusal(tmp_path, "name: tiny\nseeed: 3\nmodel: {pat: a}\nstages:\n  - {id: s, kind: stf, data: x}\n")
    places = [said.index(words) for words in ("recipe.yaml:2", "recipe.yaml:3", "recipe.yaml:5")]
    assert places == sorted(places)


def test_a_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL + "name: other\n")
    assert "recipe.yaml:5" in said and "first at line 1" in said


def test_unions_show_what_is_expected_and_none_of_their_branches(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL.replace("data: data", "reference: bse, adapter: {targets: 3}, data: data"))
    assert "expected start or base or cached or a map with keys path, revision, adapter, got 'bse'" in said
    assert "did you mean `base`?" in said and "expected text or a list of text, got 3" in said
    assert "literal[" not in said and "tuple[" not in said and said.count("stages.sft.reference") == 1


def test_a_mistake_in_a_reference_map_is_told_about_the_map(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL.replace("data: data", "reference: {path: a, revison: b}, data: data"))
    assert "unknown key `revison`" in said and "did you mean `revision`?" in said and "expected start" not in said


def test_a_key_of_another_place_is_answered_with_its_place(tmp_path: Path) -> None:
    assert "`rank` is `adapter.rank`" in refusal(tmp_path, MINIMAL.replace("data: data", "rank: 8, data: data"))
    said = refusal(tmp_path, MINIMAL.replace("data: data", "staleness: 0, data: data"))
    assert "belongs to a stage of kind online" in said
    assert "stands at the top" in refusal(tmp_path, MINIMAL.replace("data: data", "placement: {}, data: data"))


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("num_generations", "`num_generations` is `batch.group_size`"),
        ("per_device_train_batch_size", "global"),
        ("lora_rank", "`lora_rank` is `adapter.rank`"),
        ("train_type", "`train_type` is `adapter.kind`"),
        ("cutoff_len", "`cutoff_len` is `data.max_length`"),
        ("pref_beta", "`pref_beta` is `loss.beta`"),
        ("n_samples_per_prompt", "`n_samples_per_prompt` is `batch.group_size`"),
        ("actor_rollout_ref.rollout.n", "is `batch.group_size`"),
        ("algorithm.adv_estimator", "objectives"),
        ("actor_rollout_ref.actor.ppo_epochs", "is `updates_per_batch`"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "`batch.groups` divided by `minibatches`"),
        ("algorithm.rollout_correction.rollout_is", "`loss.correction.level`"),
        ("algorithm.rollout_correction.bypass_mode", "`loss.correction: off`"),
        ("enable_vllm_is_correction", "`loss.correction`"),
        ("vllm_is_truncated_threshold", "`loss.correction.floor` and `cap`"),
        ("rollout_importance_sampling_mode", "{level: sequence, mode: mask}"),
        ("max_epochs", "`updates_per_batch` of an online stage"),
        ("base_model", "`base_model` is `model.path`"),
        ("datasets", "`data` of a stage"),
        ("micro_batch_size", "global"),
        ("plugins", "`loss: {name: file.py}`"),
        ("val_set_size", "`eval: {data: ...}`"),
        ("overwrite_output_dir", "`align run --resume`"),
        ("data.prompt_key", "`data: {path: ..., columns: {ours: theirs}}`"),
        ("max_async_level", "`max_async_level` is `staleness`"),
        ("weight", "`objectives: {weights: {name: 2.0}}`"),
    ],
)
def test_words_of_peers_are_answered_with_ours(word: str, answer: str) -> None:
    assert answer in (translate(word) or "")


def test_the_keys_that_peers_words_are_answered_with_exist() -> None:
    from align.losses import load as load_loss
    from align.losses import names
    from align.recipe import grammar, peers
    from align.recipe.schema import Recipe

    options = {key for name in names() for key in grammar.keys_of(load_loss(name).Config)}
    tops = grammar.keys_of(Recipe)
    for word, ours in peers._MEANS.items():
        first, *rest = ours.partition(":")[0].split(".")
        owners = [tops] if first in tops else []
        owners += [keys for keys in map(grammar.keys_of, grammar.stage_models().values()) if first in keys]
        assert owners, f"{word} is answered with {ours}, which stands nowhere"
        if first == "loss" and rest:
            assert rest[0] in {*options, "variant", "name"}, f"{word}: no loss has the option {rest[0]}"
            continue
        assert any(exists(grammar, owner[first], rest) for owner in owners), f"{word}: there is no {ours}"


def exists(grammar, annotation, rest: list[str]) -> bool:  # type: ignore[no-untyped-def]
    for step in rest:
        annotation = grammar.choose(annotation, {})
        if not grammar.is_model(annotation):
            below = grammar.descend(annotation, 0, [])
            annotation = grammar.choose(below, {}) if below is not None else annotation
        if not grammar.is_model(annotation):
            return True  # a free map
        if step not in grammar.keys_of(annotation):
            return False
        annotation = grammar.keys_of(annotation)[step]
    return True


def test_what_is_planned_but_not_built_is_unsupported_with_a_way_round(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        load(tmp_path, MINIMAL.replace("data: data", "optim: {schedule: wsd}, data: data"))
    assert "not offered by this version" in str(caught.value) and "cosine" in str(caught.value)


def test_a_recipe_in_another_encoding_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="a folder"):
        load_recipe(tmp_path)


def test_the_package_gives_what_it_promises_and_loads_it_only_then() -> None:
    program = (
        "import sys, align.recipe.parts; early = 'align.recipe.load' in sys.modules; "
        "from align.recipe import Recipe, load_recipe; print(early, Recipe.__name__, load_recipe.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "Recipe", "load_recipe"]


@pytest.mark.parametrize("data", ["numbers{1}.jsonl", "part-{a,b}.json"])
def test_a_data_file_with_braces_in_its_name_is_found_beside_the_recipe(tmp_path: Path, data: str) -> None:
    recipe = load(tmp_path, MINIMAL.replace("data.jsonl", f"'{data}'"))
    assert recipe.stages[0].data[0].path == str(tmp_path / data)


def test_a_template_written_into_the_recipe_is_no_path_even_where_it_ends_like_one(tmp_path: Path) -> None:
    written = "{{ messages }}.jinja"
    recipe = load(tmp_path, MINIMAL, f"model.chat_template='{written}'")
    assert recipe.model.chat_template == written


@pytest.mark.parametrize(
    ("every", "taken"), [("1000000000", True), ("1000000001", False), ("100%", True), ("101%", False), ("0", False)]
)
def test_how_often_to_save_is_steps_or_a_share_of_the_stage(tmp_path: Path, every: str, taken: bool) -> None:
    override = f"stages.sft.save.every={every}"
    if taken:
        assert str(load(tmp_path, MINIMAL, override).stages[0].save.every) == every
        return
    with pytest.raises(RecipeError, match=r"percentage"):
        load(tmp_path, MINIMAL, override)
