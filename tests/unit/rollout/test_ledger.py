"""Routing, and the requests of lost engines: each is finished exactly once whatever is lost when."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trees import Medium
from rollout.base import Request
from rollout.ledger import Ledger, Routed


def request(ticket: int, tokens: list[int] | range = range(4), max_tokens: int = 10) -> Request:
    item = PromptItem(ticket, np.array(tokens, dtype=np.int64), seed=ticket)
    return Request(ticket, item, 2, Sampling(max_tokens=max_tokens))


def requests(*tickets: int) -> list[Request]:
    return [request(ticket, range(ticket * 100, ticket * 100 + 20)) for ticket in tickets]


def serving(engines: int) -> Ledger:
    ledger = Ledger(engines)
    for engine in range(engines):
        assert ledger.serve(engine) == {}
    return ledger


def tickets(routed: Routed) -> dict[int, list[int]]:
    return {engine: [r.ticket for r in sent] for engine, sent in sorted(routed.items())}


def test_idle_engines_take_requests_in_turn_so_that_the_list_alone_decides() -> None:
    ledger = serving(3)
    assert tickets(ledger.admit(requests(*range(7)))) == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}


def test_busy_engines_take_requests_by_what_they_have_left_to_compute() -> None:
    ledger = serving(2)
    ledger.admit([request(0, max_tokens=100), request(1, max_tokens=10)])
    assert tickets(ledger.admit(requests(2, 3, 4))) == {1: [2, 3, 4]}
    ledger.finish(0, 0, 0)
    assert tickets(ledger.admit(requests(5))) == {0: [5]}


def test_a_prompt_goes_where_the_same_beginning_was_computed_unless_that_engine_has_more_to_do() -> None:
    ledger = serving(2)
    long = range(300)
    ledger.admit([request(0, [7]), request(1, long)])
    ledger.finish(0, 0, 0)
    ledger.finish(1, 1, 0)
    ledger.admit([request(2, [7]), request(3, [8])])  # one each
    assert tickets(ledger.admit([request(4, [*range(256), 9])])) == {1: [4]}, "256 tokens are known there"
    assert tickets(ledger.admit([request(5, [*range(256), 9])])) == {0: [5]}, "but it has more than these to compute"
    ledger.forget_prefixes()
    for ticket, engine in ((2, 0), (3, 1), (4, 1), (5, 0)):
        assert ledger.finish(ticket, engine, 0) is not None
    ledger.admit([request(6, [7])])
    assert tickets(ledger.admit([request(7, long)])) == {1: [7]}


def test_requests_of_a_lost_engine_go_to_the_others_and_its_late_answers_count_for_nothing() -> None:
    ledger = serving(2)
    ledger.admit(requests(0, 1, 2, 3))
    assert [r.ticket for r in ledger.lose(1)] == [1, 3]
    assert tickets(ledger.admit(requests(1, 3))) == {0: [1, 3]}
    assert ledger.finish(1, 1, 0) is None, "from the process that was given up"
    assert ledger.finish(1, 0, 0) is not None
    assert ledger.finish(1, 0, 0) is None, "a second time"
    ledger.serve(1)
    assert tickets(ledger.admit(requests(4))) == {1: [4]}
    assert ledger.finish(4, 1, 0) is None, "the incarnation before"
    assert ledger.finish(4, 1, 1) is not None


def test_what_no_engine_can_take_waits_for_the_first_that_serves() -> None:
    ledger = serving(1)
    ledger.admit(requests(0, 1))
    assert ledger.admit(ledger.lose(0)) == {}
    assert ledger.admit(requests(2)) == {}
    assert tickets(ledger.serve(0)) == {0: [0, 1, 2]}
    assert ledger.unfinished == 3


def test_how_often_engines_were_lost_with_a_request_is_counted() -> None:
    ledger = serving(1)
    [only] = requests(0)
    for losses in range(1, 4):
        ledger.admit([only])
        assert ledger.lose(0) == [only]
        assert ledger.losses(only) == losses
        ledger.serve(0)
    ledger.admit([only])
    ledger.finish(0, 0, 3)
    assert ledger.losses(only) == 0


def test_requests_that_are_given_up_are_named_by_engine_and_never_finish() -> None:
    ledger = serving(2)
    ledger.admit(requests(0, 1, 2))
    assert ledger.forget([0, 1, 2, 99]) == {0: [0, 2], 1: [1]}
    assert ledger.finish(0, 0, 0) is None
    assert ledger.unfinished == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_request_finishes_once_whatever_engines_are_lost_and_however_late_they_answer(
    data: st.DataObject,
) -> None:
    engines = data.draw(st.integers(1, 3))
    ledger, finished, admitted = serving(engines), Counter[int](), 0
    sent: list[tuple[int, int, int]] = []  # (ticket, engine, incarnation) of every copy ever sent
    down: set[int] = set()

    def send(routed: Routed) -> None:
        for engine, several in routed.items():
            assert engine not in down
            sent.extend((r.ticket, engine, ledger.incarnations[engine]) for r in several)

    def answer(copy: tuple[int, int, int]) -> None:
        finished[copy[0]] += ledger.finish(*copy) is not None

    for _ in range(data.draw(st.integers(0, 30))):
        match data.draw(st.sampled_from(["admit", "answer", "lose", "serve"])):
            case "admit":
                count = data.draw(st.integers(1, 4))
                send(ledger.admit(requests(*range(admitted, admitted + count))))
                admitted += count
            case "answer" if sent:
                answer(data.draw(st.sampled_from(sent)))
            case "lose" if len(down) < engines:
                engine = data.draw(st.sampled_from(sorted(set(range(engines)) - down)))
                down.add(engine)
                send(ledger.admit(ledger.lose(engine)))
            case "serve" if down:
                engine = data.draw(st.sampled_from(sorted(down)))
                down.remove(engine)
                send(ledger.serve(engine))
    for engine in sorted(down):
        down.remove(engine)
        send(ledger.serve(engine))
    for copy in list(sent):
        answer(copy)
    assert finished == Counter(range(admitted))
    assert ledger.unfinished == 0


def test_the_same_text_after_another_picture_is_no_known_beginning() -> None:
    def shown(ticket: int, key: str) -> Request:
        plain = request(ticket, range(300))
        return replace(plain, prompt=replace(plain.prompt, media=(Medium("image", key, "/store", 2, 250, 1),)))

    ledger = serving(2)
    ledger.admit([request(0, [7]), shown(1, "a")])
    ledger.finish(0, 0, 0)
    ledger.finish(1, 1, 0)
    ledger.admit([request(2, [7]), request(3, [8])])  # one each
    assert tickets(ledger.admit([shown(4, "b")])) == {0: [4]}, "neither knows it, and the first comes first"
    ledger.finish(4, 0, 0)
    assert tickets(ledger.admit([shown(5, "a")])) == {1: [5]}
