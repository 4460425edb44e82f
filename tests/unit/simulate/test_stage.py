"""Simulated stages, in virtual time: closed forms, bounds on age, failures, and published gains of sampling ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.simulate.lengths import LogNormal
from align.simulate.stage import simulate
from align.simulate.workload import EngineModel, Workload

# 16 groups of 8 completions of 200 tokens on 4 engines: each has 32 sequences, and steps of 10 ms however many
G, L, T = 2.0, 0.5, 1.5
CONSTANT = Workload(
    groups=16,
    group_size=8,
    engines=4,
    engine=EngineModel(slots=128, fixed_s=0.01, per_sequence_s=0.0),
    lengths=LogNormal(200, 0.0, limit=1000, group_size=8),
    reward_s=L,
    train_s=T,
)
SKEWED = replace(CONSTANT, lengths=LogNormal(200, 1.0, limit=2000, group_size=8))


def engine(**changes: float) -> EngineModel:
    return replace(CONSTANT.engine, **changes)


def test_a_synchronous_step_takes_generation_reward_training_publish_and_the_loop_one_after_another() -> None:
    work = replace(CONSTANT, publish_s=0.25, loop_s=0.125, engine=engine(per_sequence_s=1e-3, prompt_s=0.1))
    generation = 4 * 0.1 + 200 * (0.01 + 32 * 1e-3)
    assert simulate(work, 0).step_s == pytest.approx(generation + L + T + 0.25 + 0.125, rel=1e-9)


def test_sequences_beyond_the_slots_wait_for_one_to_end() -> None:
    work = replace(CONSTANT, engine=engine(slots=16))
    assert simulate(work, 0).step_s == pytest.approx(2 * G + L + T, rel=1e-9)


@pytest.mark.parametrize(("reward_s", "train_s"), [(L, T), (0.0, 3.0), (4.0, 1.0), (0.5, 0.1)])
def test_at_staleness_1_a_step_takes_training_or_half_of_everything_whichever_is_longer(
    reward_s: float, train_s: float
) -> None:
    work = replace(CONSTANT, reward_s=reward_s, train_s=train_s)
    expected = max(train_s, (G + reward_s + train_s) / 2)
    assert simulate(work, 1).step_s == pytest.approx(expected, rel=1e-6)


def test_where_engines_are_full_no_staleness_is_faster_than_they_are() -> None:
    # 32 sequences in 32 slots: a turn's work for each engine is G, and training takes less
    work = replace(CONSTANT, engine=engine(slots=32))
    found = [simulate(work, staleness, turns=20) for staleness in (1, 2, 4)]
    assert min(one.step_s for one in found) >= G * (1 - 1e-9)
    assert found[1].engines_busy == pytest.approx(1.0, abs=1e-6)


def test_the_same_workload_gives_the_same_outcome() -> None:
    work = replace(SKEWED, between_failures_s=100.0, restart_s=10.0)
    first, again = simulate(work, 2, turns=10), simulate(work, 2, turns=10)
    assert first == again and first.totals["rollout/restarts"] > 0
    assert first != simulate(replace(work, seed=1), 2, turns=10)


@pytest.mark.parametrize("overdue", ["wait", "drop"])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_group_is_older_than_the_staleness(staleness: int, overdue: str) -> None:
    work = replace(SKEWED, overdue=overdue, engine=engine(slots=16), between_failures_s=200.0, restart_s=5.0)
    found = simulate(work, staleness, turns=30)
    assert sum(found.ages.values()) == pytest.approx(1.0)
    assert min(found.ages) >= 0 and max(found.ages) <= staleness
    assert found.totals["rollout/restarts"] > 0


def test_groups_that_are_late_are_dropped_only_where_the_recipe_says_so() -> None:
    late = replace(SKEWED, train_s=0.1)
    assert simulate(late, 1).totals["groups/dropped"] == 0
    assert simulate(replace(late, overdue="drop"), 1).totals["groups/dropped"] > 0


def test_failures_cost_the_time_in_which_engines_are_missing_and_what_is_sampled_again() -> None:
    # two engines that are always full: throughput falls as capacity does, and by the work that failures undo
    full = replace(CONSTANT, engines=2, engine=engine(slots=16), train_s=0.1)
    failing = replace(full, between_failures_s=60.0, restart_s=15.0)
    sound, broken = simulate(full, 1, turns=200), simulate(failing, 1, turns=200)
    seconds = broken.step_s * broken.steps
    lost = broken.totals["time/engine_lost"] / (2 * seconds)
    assert broken.totals["rollout/restarts"] > 20 and broken.totals["rollout/reissued"] > 0
    assert 0.5 * lost < 1 - sound.step_s / broken.step_s < 2.5 * lost


def test_whole_weights_that_wait_for_running_groups_cost_what_sampling_ahead_gains() -> None:
    adapters = simulate(SKEWED, 1)
    drained = simulate(replace(SKEWED, publishing="drain"), 1)
    in_flight = simulate(replace(SKEWED, publishing="in_flight"), 1)
    assert drained.step_s > 1.1 * adapters.step_s
    assert in_flight.step_s == pytest.approx(adapters.step_s, rel=0.02)


def test_an_engine_of_whole_batches_answers_and_loads_when_its_batch_ends() -> None:
    whole = replace(SKEWED, engine=engine(slots=16, whole_batches=True))
    continuous = replace(SKEWED, engine=engine(slots=16))
    assert simulate(whole, 0).step_s > 1.2 * simulate(continuous, 0).step_s
    assert max(simulate(whole, 1).ages) <= 1


def test_groups_without_signal_are_replaced_up_to_the_factor() -> None:
    work = replace(CONSTANT, silent=0.5)
    assert simulate(work, 0).totals["groups/refilled"] == 0
    refilled = simulate(replace(work, refill=1.0), 0, turns=20)
    assert 0.6 * 16 * 20 < refilled.totals["groups/refilled"] <= 16 * 20
    assert refilled.step_s > 1.5 * simulate(work, 0, turns=20).step_s


def test_long_tails_reproduce_the_published_gain_of_asynchronous_training() -> None:
    """AReaL (2505.24298) reports 2.3x to 2.8x over synchronous systems that use all devices in turn, for reasoning with
    long outputs, three quarters of the devices sampling. Assumed here: 16 devices; engines of 64 slots, 50 tokens/s
    alone and 1,600 at most; 48 prompts x 16; log-normal lengths of mean 8,000, sigma 1, cut at 32,000; training on a
    quarter of the devices as long as the others take for a turn at their peak, 320 s, as a balanced split has it, and
    on all of them a quarter of that; publish 5 s, reward 2 s; changing between the two costs nothing."""
    work = Workload(
        groups=48,
        group_size=16,
        engines=12,
        engine=EngineModel.of(50.0, 1600.0, 64, prompt_s=0.05),
        lengths=LogNormal(8000, 1.0, limit=32_000, group_size=16),
        reward_s=2.0,
        train_s=320.0,
        publish_s=5.0,
    )
    in_turn = simulate(replace(work, engines=16, train_s=80.0), 0, turns=8)
    ahead = simulate(work, 4, turns=8)
    assert 2.0 < in_turn.step_s / ahead.step_s < 3.2
    apart = simulate(work, 0, turns=8)
    assert apart.step_s > in_turn.step_s, "what is divided and not overlapped is idle by turns"
    assert apart.step_s / simulate(work, 1, turns=8).step_s <= 2.05
