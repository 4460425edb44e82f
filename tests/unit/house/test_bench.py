"""The benches: what they count and how they average, and that each runs from its command line at a toy size."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.data.microbatches import plan_microbatches
from align.data.packing import collate
from tests.bench import (
    common,
    dpo_against_trl,
    gpu,
    gpu_sides,
    grpo_update_against_trl,
    head_memory,
    linear_cost,
    memory_plan,
    orchestration,
    peer,
    reward_overhead,
    shared_prefixes,
    simulator,
    weak_scaling,
    work,
)

pytestmark = pytest.mark.slow  # each runs a bench through, at a toy size

TINY = ["--toy", "--repeats", "1", "--threads", "1"]


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_the_bench_model_has_17_million_parameters(tmp_path: Path) -> None:
    assert work.BENCH.parameters == pytest.approx(16.9e6, rel=0.01)
    assert gpu_sides.MODELS["1.5b"].parameters == pytest.approx(1.54e9, rel=0.01)
    assert gpu_sides.MODELS["7b"].parameters == pytest.approx(7.6e9, rel=0.01)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.write_model(work.TOY, tmp_path))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert matrices == work.TOY.parameters


def test_counted_operations_are_those_of_a_plain_update(tmp_path: Path) -> None:
    """Against torch's own counter: a plain LoRA model, one sequence, every position scored, attention written out."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = work.write_model(work.TOY, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    peft = get_peft_model(model, LoraConfig(r=work.RANK, target_modules="all-linear"))
    ids = torch.randint(0, work.TOY.vocabulary, (1, 64))

    def count(run: object) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            run()  # type: ignore[operator]
        found = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
        attention = sum(flop for op, flop in found.items() if "bmm" in op)
        return {"attention": attention, "dense": sum(found.values()) - attention}

    def reference() -> None:
        with torch.no_grad(), peft.disable_adapter():
            peft(ids)

    dense = {"policy": count(lambda: peft(ids).logits.sum().backward()), "reference": count(reference)}
    nothing = work.Layout(tokens=64, pairs=0, scored=64)
    assert work.update_flop(work.TOY, nothing, reference=False) == pytest.approx(dense["policy"]["dense"], rel=0.01)
    both = dense["policy"]["dense"] + dense["reference"]["dense"]
    assert work.update_flop(work.TOY, nothing) == pytest.approx(both, rel=0.01)
    # written out, attention computes all 64 x 64 pairs, of which 64 x 65 / 2 are causal
    square = replace(nothing, pairs=64 * 64)
    attention = work.update_flop(work.TOY, square) - work.update_flop(work.TOY, nothing)
    assert attention == dense["policy"]["attention"] + dense["reference"]["attention"]


def test_layouts_count_what_is_packed_and_what_is_padded() -> None:
    short, long = (work.random_trees(1, p, c, vocabulary=512)[0] for p, c in ((4, 2), (6, 3)))
    trees = [short, replace(long, id=1)]
    packed = work.packed_layout(trees, 100, keep_together=True)
    batches = [collate(group) for group in plan_microbatches(trees, 100, keep_together=True)]
    assert packed.tokens == sum(b.token_ids.numel() for b in batches) == 8 + 12
    assert packed.scored == sum(b.labels.numel() for b in batches) == 4 + 6
    # a trunk of 4: 10 pairs; a branch of 2 after it: 3 of its own and 2 x 4; of 6 and 3: 21, and 6 + 18
    assert packed.pairs == 10 + 2 * (3 + 8) + 21 + 2 * (6 + 18)
    padded = work.padded_layout([trees], compact_head=False)
    assert (padded.tokens, padded.pairs, padded.scored) == (4 * 9, 4 * 45, 4 * 8)
    assert work.padded_layout([trees], compact_head=True).scored == packed.scored


def test_a_group_that_is_split_counts_its_prompt_again() -> None:
    tree = work.random_trees(1, 10, 5, vocabulary=512, branches=4, rollout=True)
    assert work.packed_layout(tree, 30, keep_together=False).tokens == 30
    assert work.packed_layout(tree, 20, keep_together=False).tokens == 40


def test_batches_divide_an_update_and_are_not_larger() -> None:
    assert peer.usable([1, 2, 8], 48) == [1, 2, 8]
    assert peer.usable([1, 2, 8], 12) == [1, 2]
    assert peer.usable([2, 8], 1) == [1]


def test_windows_are_sorted_by_length_and_keep_every_row() -> None:
    trees = [replace(work.random_trees(1, n, 2, vocabulary=512)[0], id=n) for n in (9, 3, 7, 5)]
    assert [[t.id for t in window] for window in peer.windows_of(trees, 2)] == [[3, 5], [7, 9]]


def test_sides_run_in_turn_and_ratios_are_taken_round_by_round() -> None:
    calls: list[str] = []
    sides = {"ours": lambda: calls.append("ours"), "TRL": lambda: calls.append("TRL")}

    def peak() -> float:
        calls.append("peak")
        return 1.0

    common.alternate(sides, 3, peak=peak, tell=lambda line: None)
    assert calls == ["peak", "ours", "TRL", "peak", "TRL", "ours", "peak", "ours", "TRL", "peak"]
    rounds = common.Rounds({"ours": [1.0, 2.0, 4.0], "TRL": [3.0, 4.0, 4.0]}, [5.0, 9.0, 7.0])
    assert rounds.ratio("ours", "TRL") == {"median": 2.0, "min": 1.0, "max": 3.0}
    side = common.Side("ours", "", rounds.seconds["ours"], work=28.0, units={"pairs": 10})
    assert side.figures(rounds.peak)["share_of_peak"] == 2.0  # 28 in 2 s, of 7 per s
    assert side.figures(rounds.peak)["rates"] == {"pairs/s": 5.0}


def test_a_comparison_of_different_work_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    common.check_same_work((0.6931, 2.0), (0.6932, 2.001), "float32", "here")
    with pytest.raises(SystemExit, match="refused: here"):
        common.check_same_work((0.70, 2.0), (0.69, 2.0), "float32", "here")
    with pytest.raises(SystemExit, match="gradient norm"):
        common.check_same_work((0.69, 2.0), (0.69, 2.1), "float32", "here")
    with pytest.raises(SystemExit, match="refused"):
        common.check_same_work((float("nan"), 2.0), (0.69, 2.0), "float32", "here")


def test_the_deviation_is_of_the_value_farthest_from_the_mean() -> None:
    assert linear_cost.largest_deviation([1.0, 1.0, 1.3]) == pytest.approx(0.2 / 1.1)


def test_a_process_that_dies_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(RuntimeError, match="ended with code"):
        common.apart(os._exit, 3)


def test_a_side_in_a_process_of_its_own_answers_and_hands_over_its_errors() -> None:
    side = common.place_for(toy=False)(Counter, "aab")
    assert side.call("total") == 3
    with pytest.raises(RuntimeError, match="AttributeError: 'Counter' object has no attribute 'mode'"):
        side.call("mode")
    side.close()


def test_a_comparison_is_recorded_with_date_hardware_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rounds = common.Rounds({"ours": [1.0, 2.0], "TRL": [3.0, 5.0]}, [1e9, 2e9, 3e9])
    sides = [common.Side(name, "", seconds, 1e9, {"pairs": 2}) for name, seconds in rounds.seconds.items()]
    common.report("one-bench", sides, rounds, goal=2.0, about={}, tried={}, started=0.0, record=True)
    (path,) = tmp_path.iterdir()
    entry = json.loads(path.read_text())
    assert path.name == f"{entry['date']}-one-bench.json"
    assert entry["hardware"]["cpu"] and entry["versions"]["torch"] and entry["proved"]
    assert entry["figures"]["torch_threads"] == torch.get_num_threads()
    assert entry["figures"]["ratio"] == {"median": 2.75, "min": 2.5, "max": 3.0}
    assert entry["figures"]["sides"]["ours"]["share_of_peak"] == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------------------------------- command lines


def test_dpo_is_compared_on_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    figures = dpo_against_trl.main([*TINY, "--shape", "long", "--rows", "4", "--select-rows", "4", "--batches", "2"])
    printed = capsys.readouterr().out
    assert "same work, float32" in printed and "TRL's head compacts to scored positions only on CUDA" in printed
    assert set(figures["sides"]) == {"ours", "TRL"} and figures["ratio"]["median"] > 0
    assert "written" not in printed


def test_dpo_runs_in_bfloat16_with_every_way_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "bfloat16", "--shape", "long", "--rows", "2", "--select-rows", "1", "--batches", "1"]
    figures = dpo_against_trl.main([*TINY, *options, "--max-tokens", "512"])
    tried = figures["seconds_of_settings_on_the_first_rows"]
    assert sum(name.startswith("TRL, ") for name in tried) == len(peer.modes_for("bfloat16")) == 3


def test_grpo_is_compared_on_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--groups", "2", "--group-size", "4", "--batches", "2", "--max-tokens", "64"]
    figures = grpo_update_against_trl.main([*TINY, *options])
    assert "same work, float32" in capsys.readouterr().out
    assert figures["sides"]["ours"]["tflop"] < figures["sides"]["TRL"]["tflop"]


def test_the_heads_memory_is_less_than_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    sizes = ["--tokens", "4096", "--vocabulary", "16384", "--hidden", "32", "--threads", "1"]
    cases = head_memory.main(sizes)["cases"]
    logits = 4096 * 16384 * 4 / 1e9
    assert cases["frozen head"]["gb"] < logits / 2 < cases["plain logits"]["gb"]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["figures"]["cases"] == cases


def test_the_memory_plan_is_measured_case_by_case(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "128", "--layers", "2", "--tokens", "512", "--vocabulary", "512"]
    (found,) = memory_plan.main(["--toy", *sizes, "--cases", "qlora"])["cases"].values()
    assert 0 < found["plan_gb"] < found["with_gaps_gb"] and 0 < found["allocated_gb"] < found["resident_gb"]
    assert "largest error" in capsys.readouterr().out


def test_the_cost_of_a_token_is_measured_at_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    figures = linear_cost.main([*TINY, "--sizes", "320,640"])
    assert figures["tokens"] == {"320": 320, "640": 640}
    assert all(found["median"] > 0 for found in figures["microseconds_per_token"].values())


def test_shared_beginnings_are_timed_beside_the_same_rows_apart() -> None:
    found = shared_prefixes.main(["--toy", "--repeats", "1"])["beginnings"]
    assert set(found) == {"10", "40", "200"}
    assert all(own["tokens"]["shared"] < own["tokens"]["apart"] for own in found.values())


def test_the_loops_cost_is_measured_for_every_staleness(capsys: pytest.CaptureFixture[str]) -> None:
    figures = orchestration.main(["--groups", "6", "--group-size", "2", "--steps", "3", "--dynamic"])
    assert set(figures) == {"staleness 0", "staleness 1"}
    assert all(found["turn"] > found["generate"] > 0 for found in figures.values())
    assert "ms per group" in capsys.readouterr().out


def test_the_pools_cost_is_measured_with_a_trivial_plugin_and_a_judge(capsys: pytest.CaptureFixture[str]) -> None:
    figures = reward_overhead.main(["--samples", "200", "--judged", "6", "--concurrency", "3", "--seconds", "0.2"])
    assert figures["trivial"]["samples_per_second"]["median"] > 0
    assert figures["judge"]["seconds"] >= figures["judge"]["at_least"] == pytest.approx(0.4)
    assert "samples/s of 200" in capsys.readouterr().out


def test_the_bytes_of_two_ranks_are_counted_as_theory_and_kernel_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert weak_scaling.ring_bytes([100, 20], 4) == 1.5 * 4 * (120 + 2)
    figures = weak_scaling.main(["--toy", "--repeats", "1", "--steps", "1", "--pairs", "2"])
    found = figures["bytes"]
    assert found["counted"]["all_reduce"] == found["theory"] == 4 * (figures["trained_elements"] + 28)  # 14 linears
    assert 1.0 < found["wire_over_counted"] < 1.05, "headers are more, and little more"
    assert set(figures["tokens_per_second"]) == {"1 rank", "2 ranks", "2 apart"}
    assert "theory of the all_reduce" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--failures"]])
def test_the_simulators_own_time_is_measured(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    figures = simulator.main(["--engines", "3", "--groups", "6", "--steps", "4", *words])
    assert figures["wall_s"] > 0 and figures["virtual_s"] > 0
    assert "24 groups on 3 engines" in capsys.readouterr().out


def test_the_gpu_bench_runs_through_at_a_toy_size(tmp_path: Path) -> None:
    folder = gpu_sides.write("toy", tmp_path, "cpu")
    for loss in ("dpo", "grpo", "sft"):
        case = gpu_sides.Case("toy", loss, 32, 64, 1, (64, 256), (2,), "cpu")
        ours, theirs = (kind(folder, "cpu").measure(case) for kind in (gpu_sides.Ours, gpu_sides.Theirs))
        common.check_same_work(ours["first"], theirs["first"], "bfloat16", loss)
        assert set(ours["tried"]) == {"max_tokens 64", "max_tokens 256"}
        assert ours["work"] < theirs["work"] or loss == "sft"  # rows of text share nothing


def test_without_a_gpu_the_gpu_bench_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--toy"):
        gpu.main([])
