"""A chat template has no more time, memory or depth than any conversation is worth."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from align.data import sandbox
from align.data.records import RowError
from align.data.template import ChatTemplate
from align.errors import DataError, ModelError
from tests.unit.data.build import prepared, turns, with_template

MESSAGES = turns("hi", "x" * 1000)
DOUBLES = "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = "
NESTS = (
    "{% set ns = namespace(s=['x'], t=['x']) %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[1].content }}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10000000000 * 'x' }}",
        "{% set x = [0] * 10**10 %}",
        "{{ 7 ** 99999999 }}",
        f"{DOUBLES} ns.s + ns.s %}}{{% endfor %}}{{{{ ns.s }}}}",
        f"{DOUBLES} ns.s ~ ns.s %}}{{% endfor %}}{{{{ ns.s }}}}",
        f"{DOUBLES} '%s%s' % (ns.s, ns.s) %}}{{% endfor %}}{{{{ ns.s }}}}",
        f"{DOUBLES} '{{}}{{}}'.format(ns.s, ns.s) %}}{{% endfor %}}{{{{ ns.s }}}}",
        f"{DOUBLES} ns.s.replace('x', 'xx') %}}{{% endfor %}}{{{{ ns.s }}}}",
        f"{DOUBLES} [ns.s, ns.s] | join %}}{{% endfor %}}{{{{ ns.s }}}}",
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
        NESTS + "{{ ns.s }}",
        NESTS + "{{ ns.s | tojson }}",
        NESTS + "{{ ns.s == ns.t }}",
        NESTS + "{{ '%s' % ns.s }}",
        NESTS + "{{ ns.s is eq(ns.t) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d' | format(9999999999, 1) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ [1] | batch(10000000000, ' ') | list }}",
        "{{ lipsum(n=1000000) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ range(99999) | join('x' * 999999) }}",
        "{{ ([[0] * 999999] * 9999) | sum(start=[]) | length }}",
    ],
)
def test_a_template_that_would_never_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 50_000)
    monkeypatch.setattr(sandbox, "LONGEST", 1 << 22)
    begun = time.process_time()
    with pytest.raises(RowError, match=r"the chat template (was stopped|refuses these messages: Range too big)"):
        ChatTemplate(source).render(MESSAGES)
    assert time.process_time() - begun < 5


def test_limits_are_far_above_what_conversations_need() -> None:
    source = (
        "{% for m in messages %}{% for n in messages[:20] %}{% if n.role == m.role %}{% endif %}{% endfor %}"
        "{{ '<' + m.role + '>' ~ (m.content | trim) + '\\n' }}{{ m | tojson }}{% endfor %}"
    )
    long, _ = ChatTemplate(source).render(turns(*["x" * 100] * 2000))
    assert len(long) > 450_000
    content = "y" * 2_000_000
    assert len(ChatTemplate(source).render(turns("a", content))[0]) > 2 * len(content)


@pytest.mark.parametrize(
    "source",
    [
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 10_000 + " }}",
        "x" * 2_000_000,
    ],
)
def test_a_template_that_is_too_deep_or_long_does_not_compile(source: str) -> None:
    with pytest.raises(ModelError, match="does not compile") as error:
        ChatTemplate(source, where="chat_template.jinja")
    assert len(str(error.value)) < 1000 and error.value.where == "chat_template.jinja"


def test_a_template_that_is_stopped_on_every_row_ends_the_check_and_not_each_row(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 20_000)
    chat = with_template(folder, "{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}")
    with pytest.raises(ModelError, match="stopped on row after row") as error:
        prepared(tmp_path, [{"messages": turns("a", "b")}] * 500, "conversation", chat, on_bad_row="skip")
    assert error.value.remedy


def test_a_row_that_costs_too_much_is_refused_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 20_000)
    squares = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.role + m.content }}{% endfor %}"
    rows = [{"messages": turns("a", "b")}, {"messages": turns(*["a"] * 400)}]
    with pytest.raises(DataError, match="was stopped: it takes more than 20000 steps") as error:
        prepared(tmp_path, rows, "conversation", with_template(folder, squares))
    assert str(error.value.where).endswith(":2")
