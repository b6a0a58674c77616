"""Stacked bars: as long as their numbers say, with the limit in its place, and no text of the data taken for markup."""

import re

import pytest

from jaxrm.reports.bars import Bar, Bars, draw_bars


def widths(drawn):
    return [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)%"', drawn)]


def test_parts_are_as_long_as_their_numbers_and_stand_end_to_end():
    drawn = draw_bars(Bars("memory", "GiB", (Bar("a", {"x": 1.0, "y": 2.0}), Bar("b", {"x": 4.0})), limit=6.0))
    x, y, other = widths(drawn)
    assert y == pytest.approx(2 * x, abs=0.01) and other == pytest.approx(4 * x, abs=0.01)
    starts = [float(start) for start in re.findall(r'<rect [^>]*x="([\d.]+)%"', drawn)]
    assert starts == pytest.approx([0.0, x, 0.0], abs=0.01)
    (limit,) = re.findall(r'<line class="limit" x1="([\d.]+)%"', drawn)
    assert float(limit) == pytest.approx(6 * x, abs=0.01)


def test_a_name_keeps_its_color_in_all_bars():
    """Numbers are written out beside them."""
    drawn = draw_bars(Bars("memory", "GiB", (Bar("a", {"x": 20.53, "y": 1.0}), Bar("b", {"y": 4.0}))))
    assert re.findall(r'<rect class="(s\d)"', drawn) == ["s0", "s1", "s1"]
    assert ">21.5<" in drawn and ">4.0<" in drawn
    assert "limit" not in drawn


def test_text_is_escaped():
    drawn = draw_bars(Bars("<b>", "<em>", (Bar("<script>", {"<u>": 1.0}),), 2.0, "<s>", "<p>"))
    assert not re.search(r"<(b|em|script|u|s|p)>", drawn.replace('<p class="note" dir="auto">', ""))


def test_bars_of_nothing_are_drawn():
    assert "<svg" in draw_bars(Bars("nothing", "s", (Bar("a", {"x": 0.0}),)))
