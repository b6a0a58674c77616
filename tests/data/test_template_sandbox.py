"""Templates are stopped before they take too long or fill the memory; within the bounds they write what they should."""

import pytest

from jaxrm.data.template_sandbox import render

VARIABLES = {
    "messages": [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "a"}],
    "tools": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
}
GROW = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ bos_token }}{% for m in messages %}{{ '[' ~ m.role ~ ']' + m.content | trim }}{% endfor %}",
            "<s>[user]hi[assistant]a",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }}{% else %}none{% endfor %}", "1"),
        ("{% for m in messages if m.role == 'tool' %}{{ m }}{% else %}none{% endfor %}", "none"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "a"),
        ("{% macro f(n) %}{{ n }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(3) }}", "3210"),
        ("{{ messages | map(attribute='role') | join(',') }}{{ 2 ** 10 }}", "user,assistant1024"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}'.format(1) }}{{ '%5s' | format('b') }}", "a-007  1    b"),
        ("{{ messages[0] | tojson }}{{ 'é' | tojson }}", '{"role": "user", "content": " hi "}"é"'),
        ("{% generation %}x{% endgeneration %}\n{{ tools is none }}", "xTrue"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{{ 'x' * 3 }}{{ [1] * 2 }}{{ 7 % 4 }}{{ undefined_name }}", "xxx[1, 1]3"),
    ],
)  # fmt: skip
def test_a_template_writes_what_it_says(template, text):
    assert render(template, VARIABLES) == text


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) if range(9999) | select('gt', 10 ** 4) | list %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{% set b = 'x' * 10 ** 6 %}{{ b.replace('x', b) }}",
        "{% set b = 'x' * 10 ** 6 %}{{ b | replace('x', b) }}",
        "{% set b = 'x' * 10 ** 6 %}{% for i in range(9999) %}{{ b }}{% endfor %}",
        "{% set b %}{% for i in range(9999) %}{{ 'x' * 10 ** 5 }}{% endfor %}{% endset %}",
        GROW.replace("EXPRESSION", "ns.x + ns.x"),
        GROW.replace("EXPRESSION", "ns.x ~ ns.x"),
        GROW.replace("EXPRESSION", "[ns.x, ns.x]"),
        GROW.replace("'ab'", "9").replace("EXPRESSION", "ns.x * ns.x"),
        "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
        "{{ '(' * 9 }}{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "x" * 600_000,
    ],
)
def test_a_template_without_end_is_stopped(template):
    with pytest.raises((ValueError, RecursionError, MemoryError)):
        render(template, VARIABLES)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ [1, 2] | random }}", "uses 'random'"),
        ("{{ lipsum() }}", "uses 'lipsum'"),
        ("{{ namespace }}", "writes a type, which is no text"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ],
)
def test_a_template_that_does_what_it_may_not_is_stopped(template, reason):
    with pytest.raises(Exception, match=reason):
        render(template, VARIABLES)


def test_a_long_dialogue_is_within_the_bounds():
    """As Qwen 3 asks for the number of messages once for each of them."""
    template = (
        "{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
        "{% if messages[index].content.startswith('<tool_response>') %}tool{% endif %}{% endfor %}"
        "{% for m in messages %}{{ m.role + m.content | trim }}{% endfor %}"
    )
    messages = [{"role": "user", "content": str(i)} for i in range(4000)]
    assert render(template, {"messages": messages}) == "".join(f"user{i}" for i in range(4000))


def test_bounds_are_for_each_rendering_anew():
    for _ in range(60):
        render("{% for i in range(9999) %}{% endfor %}", VARIABLES)
