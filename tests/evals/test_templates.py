"""Templates of task files: what lm-eval renders is rendered, and no template runs away, whatever it is made of."""

from __future__ import annotations

import resource
import time
from typing import Any

import jinja2
import lm_eval.utils
import pytest

from evals.errors import TaskError
from evals.templates import Sandbox

PLAIN = [
    "Question: {{ question }}\nAnswer:",
    "{{ question.strip().replace('?', '!') ~ ' ' ~ n }}",
    "{% for c in choices %}{{ loop.index }}/{{ loop.length }}. {{ c }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for c in choices if c != 'b' %}{{ c }}{% else %}none{% endfor %}{{ choices | length }}",
    "{{ choices | map('upper') | join(' and ') }} {{ ['A', 'B'][n % 2] }} {{ 2 ** 10 + n * 3 - 1 }}",
    "{{ '%s of %5.1f%%' % (question, 12.5) }} {{ '{:>8}|{}'.format(n, choices) }} {{ '%d' | format(n) }}",
    "{{ question | regex_replace('[aeiou]', '') | center(40) | trim | indent }} {{ choices }}{{ d.items() | list }}",
    "{% macro turn(x, last=false) %}<{{ x }}{{ '.' if last }}>{% endmacro %}{{ turn(n) }}{{ turn('z', last=true) }}",
    "{% set ns = namespace(all=0) %}{% for c in range(5) %}{% set ns.all = ns.all + c %}{% endfor %}{{ ns.all }}",
    "{% set x = [] %}{% for c in choices %}{% set _ = x.append(c) %}{% endfor %}{{ x == choices, 'a' in x }}",
    "{% for k in tree recursive %}{{ k.name }}({{ loop(k.children) }}){% endfor %}",
    "{{ absent | default('x') }}{{ absent is defined }}{{ d.get('k', 2147483648) }}{{ n is even, 0.126 | round(2) }}",
    "{{ choices | sum(attribute='0', start='') if false }}{{ choices | sort(reverse=true) | first }}{{ d | tojson }}",
]
DOC: dict[str, Any] = {
    "question": "Where is the harbour?",
    "choices": ["a", "b", "c"],
    "n": 3,
    "d": {"k": 1, "m": [1, 2]},
    "tree": [{"name": "x", "children": [{"name": "y", "children": []}]}, {"name": "z", "children": []}],
}
DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = NEXT %}{% endfor %}"
HOSTILE = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [1] * 10**9 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 10 ** (10 ** 6) % 7 }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ ''['ljust'](10**9) }}",
    "{{ 'a' | map('center', 10**9) | list }}",
    "{{ range(100000) | map('center', 1000000) | list }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ '{0:>999999999}'.format_map({'0': 1}) }}",
    "{{ ('%s' * 100000) % ((question * 1000,) * 100000) }}",
    "{{ ('{0}' * 100000).format(question * 1000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "{{ range(100000) | map('string') | join('a' * 1000000) }}",
    "{{ ('a' * 1000000).join(range(100000) | map('string')) }}",
    "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "{{ ('a\n' * 100000) | indent(1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "{{ ('a' * 100000) | wordwrap(1, true, 'b' * 100000) }}",
    "{{ [[1]] | tojson(indent=1000000000) }}",
    "{{ [1] | batch(1000000000, 0) | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1.5 | round(1000000000, 'floor') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ ('a' * 1000000) | regex_replace('a', 'b' * 1000000) }}",
    "{{ lipsum(n=1000000) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ question }}" + "x" * 1000 + "{% endfor %}",
    "{% macro m() %}{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(40) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{% for x in [[1]] recursive %}{{ loop([1, 1]) }}{{ loop([1, 1]) }}{% endfor %}",
    "{% for x in [[1]] recursive %}{{ loop(range(100000)) }}{% endfor %}",
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x ~ ns.x") + "{{ ns.x }}",
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x + ns.x"),
    DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]") + "{{ ns.x }}",
    DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]") + "{{ ns.x ~ '' }}",
    DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]") + "{{ ns }}",
    DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]") + "{{ ns.x == [] }}",
    DOUBLING.replace("START", "{}").replace("NEXT", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x.values() }}",
    DOUBLING.replace("START", "9").replace("NEXT", "ns.x * ns.x"),
    "{% set x = [1] %}{% for i in range(99) %}{% set _ = x.extend(x) %}{% endfor %}",
    "{% set x = [] %}{% set _ = x.append(x) %}{{ x }}",
    "{% set x = [] %}{% for i in range(99999) %}{% set _ = x.append('a' * 1000000 ~ i) %}{% endfor %}",
    "{% set a = 'a' * 1000000 %}{% set b = 'a' * 999999 ~ 'b' %}"
    "{% for i in range(100000) %}{% if a == b %}x{% endif %}{% endfor %}",
    "{{ [[1] * 1000] * 1000000 }}",
    "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "{{ 1" + " + 1" * 20_000 + " }}",
]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    original = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    original.filters["regex_replace"] = lm_eval.utils.regex_replace
    return Sandbox(original)


@pytest.mark.parametrize("template", PLAIN)
def test_what_lm_eval_renders_is_rendered(sandbox: Sandbox, template: str) -> None:
    theirs = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    theirs.filters["regex_replace"] = lm_eval.utils.regex_replace
    expected = theirs.from_string(template).render(**DOC)
    for _ in range(2):
        assert sandbox.from_string(template).render(**DOC) == expected


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_no_template_runs_away(sandbox: Sandbox, template: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((TaskError, jinja2.TemplateError, OverflowError, RecursionError)):
        sandbox.from_string(template).render(**DOC)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_a_long_text_is_no_hostile_one(sandbox: Sandbox) -> None:
    text = "A sentence of six words here. " * 33_000  # a million characters
    made = sandbox.from_string("{{ text.strip().replace('six', '6') }}\n{{ text | trim | length }}").render(text=text)
    assert made.endswith("\n989999")
