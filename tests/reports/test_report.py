"""The report: what is in the file. How it looks takes a browser, which these tests do not start."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import types

import numpy as np
import pytest

from jaxrm.reports import document
from jaxrm.reports.charts import POINTS, axis, draw_chart, number_text
from jaxrm.reports.report import (
    Curves,
    ExampleResponse,
    Report,
    ReportExample,
    Series,
    SourceRewards,
    Table,
    write_report,
)

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "' onclick='alert(1)",
    '" autofocus onfocus="alert(1)',
    "<!--<script>",
    "{{style}} {{records}} \\u003c &lt; \u2028",
]
VOID = {"meta", "input", "br"}


class Reader(html.parser.HTMLParser):
    """Elements in document order as ``tag``, ``attributes``, ``text`` and ``open`` (tags around it)."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open, "not every tag is closed"

    def handle_starttag(self, tag, attrs):
        element = types.SimpleNamespace(tag=tag, attributes=dict(attrs), text="", around=tuple(self.open))
        self.elements.append(element)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def __getitem__(self, tag):
        return [each for each in self.elements if each.tag == tag]

    def below(self, tag, attribute, value):
        return [
            each
            for each in self[tag]
            if any(value in (outer.attributes.get(attribute) or "").split() for outer in each.around)
        ]


def written(path, **changes):
    write_report(path, Report(**{"title": "t", **changes}))
    return path.read_text(encoding="utf-8")


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="records">(.*?)</script>', text, re.DOTALL)[1])


def chart(*ys, x=None, **changes):
    series = tuple(Series(f"s{n}", tuple(x or range(len(y))), tuple(y)) for n, y in enumerate(ys))
    return Curves(**{"title": "Reward", "x_label": "step", "y_label": "nats", "series": series, **changes})


def full(text=HOSTILE[0]):
    """One of everything, with `text` wherever text may stand."""
    return {
        "title": text,
        "about": [(text, text)],
        "tables": [Table(text, (text, text), ((text, text), (text, 0.5)), note=text)],
        "curves": [Curves(text, text, text, (Series(text, (0, 1), (2.0, 3.0)),), note=text)],
        "examples": [
            ReportExample(text, (ExampleResponse(text, text, (text, text), (0.5, -1.0), ((text, text),)),)),
        ],
    }


# --- the file


def test_the_file_refers_to_nothing_outside_itself(tmp_path):
    text = written(tmp_path / "report.html", **full("plain"))
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing loads
    assert not re.search(
        r"https?:|\b(src|href|srcset|action)\s*=|url\(|@import|\bimport\b|fetch\(|XMLHttp|//[a-z]+\.", text
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r'<[^>]*\sstyle="', text)  # which the policy would not apply


def test_text_of_any_kind_stays_text(tmp_path):
    tags = [[each.tag for each in Reader(written(tmp_path / "r.html", **full("plain"))).elements]]
    for text in HOSTILE:
        page = Reader(written(tmp_path / "r.html", **full(text)))
        tags.append([each.tag for each in page.elements])
        assert {name for each in page.elements for name in each.attributes if name.startswith("on")} == set()
        shown = [page["title"], page["h1"], page["dt"], page["dd"], page["h3"], page["figcaption"]]
        assert all(text in each[0].text for each in shown), text
        assert all(text in each.text for each in page["th"][:2] + page.below("th", "scope", "row"))
        example = embedded(written(tmp_path / "r.html", **full(text)))["examples"][0]
        assert (example["prompt"], example["responses"][0]["tokens"]) == (text, [text, text])
    assert all(each == tags[0] for each in tags)


def test_tables_come_before_curves_and_these_before_examples(tmp_path):
    page = Reader(written(tmp_path / "r.html", **full("plain")))
    ids = [each.attributes["id"] for each in page["section"] if "id" in each.attributes]
    assert ids == ["tables", "curves", "examples"]
    for left_out, rest in {"tables": ["curves", "examples"], "curves": ["tables", "examples"]}.items():
        page = Reader(written(tmp_path / "r.html", **{**full("plain"), left_out: []}))
        assert [each.attributes["id"] for each in page["section"] if "id" in each.attributes] == rest
    assert not Reader(written(tmp_path / "r.html"))["section"]


def test_a_report_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "r.html"
    before = written(path, title="the first")
    uneven = Table("t", ("a", "b"), (("x", 1), ("y",)))
    with pytest.raises(AssertionError):
        written(path, tables=[uneven])
    assert path.read_text(encoding="utf-8") == before
    assert "the first" not in written(path, title="the second")
    assert [each.name for each in path.parent.iterdir()] == ["r.html"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the path")
def test_the_script_parses(tmp_path):
    script = tmp_path / "report.js"
    script.write_text(document.read_template("page_tokens.js") + document.read_template("report.js"), encoding="utf-8")
    subprocess.run(["node", "--check", str(script)], check=True, timeout=600)


def test_the_script_finds_the_elements_it_asks_for(tmp_path):
    page = Reader(written(tmp_path / "r.html", **full("plain")))
    script = document.read_template("page_tokens.js") + document.read_template("report.js")
    asked = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert {"q", "next", "shown", "tip", "theme"} <= asked
    assert asked <= {each.attributes.get("id") for each in page.elements}


# --- tables


def cells(tmp_path, *rows, columns=("name", "value")):
    return Reader(written(tmp_path / "r.html", tables=[Table("t", columns, rows)]))["td"]


def test_the_numbers_of_a_column_have_the_same_decimals(tmp_path):
    for values, texts in {
        (0.8125, 0.5, 0.0): ["0.812", "0.500", "0.000"],
        (63.41, 7.0, -1.25): ["63.4", "7.0", "−1.2"],
        (1234.5, 2.0): ["1,234", "2"],
        (3.14159, 2): ["3.14", "2"],
        (1200, 7, True): ["1,200", "7", "yes"],
        (np.float32(0.25), np.int64(3)): ["0.250", "3"],
        (0.5, 0.0002): ["0.500", "2.00e−4"],
        (2e-6, 1e-6): ["2.00e−6", "1.00e−6"],
        (math.inf, -math.inf, 0.5): ["∞", "−∞", "0.500"],
    }.items():
        assert [each.text for each in cells(tmp_path, *(("row", value) for value in values))] == texts


def test_what_is_missing_is_shown_as_missing(tmp_path):
    shown = cells(tmp_path, ("a", None), ("b", math.nan), ("c", 0.5), ("d", ""))
    assert [each.text for each in shown] == ["–", "–", "0.500", "–"]


def test_numbers_stand_right_and_text_left(tmp_path):
    row = ("a", 0.5, "61 % ± 4", "1:02", "of 3", "words " * 12, None)
    shown = cells(tmp_path, row, columns=tuple("abcdefg"))
    assert [each.attributes.get("class") for each in shown] == ["n", "n", "n", None, "wide", None]


# --- curves


def test_a_line_goes_through_its_points_on_round_axes():
    figure, data = draw_chart(chart([0.0, 5.0, 10.0], x=(0, 10, 40)), 0, {"s0": 0})
    assert (data["x"], data["y"]) == ([0, 40], [0, 10])
    # 1000 units each way, y downwards
    assert 'd="M0.0 1000.0h0L250.0 500.0L1000.0 0.0"' in figure
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    assert texts == ["0", "2", "4", "6", "8", "10", "0", "10", "20", "30", "40"]
    assert "<b>10.0</b>" in figure


def test_a_gap_breaks_the_line_and_a_lone_point_is_still_drawn():
    for gap in (math.nan, None, math.inf):
        figure, data = draw_chart(chart([0.0, 1.0, gap, 3.0, gap, 4.0, 4.0]), 0, {"s0": 0})
        path = re.search(r' d="([^"]*)"', figure)[1]
        assert re.sub(r"[\d. ]+", "", path) == "MhLMhMhL"
        assert data["series"][0]["y"] == [0.0, 1.0, None, 3.0, None, 4.0, 4.0]


def histogram():
    """Of 0 to 19 in four bins of five, the second one empty."""
    return Curves(
        "Lengths", "words", "%", (Series("sft", (2, 7, 12, 17), (50.0, 0.0, 25.0, 25.0), "mean <7"),), bin_width=5
    )


def test_a_histogram_outlines_the_bins_that_are_not_empty():
    figure, data = draw_chart(histogram(), 0, {"sft": 0})
    assert (data["x"], data["y"], data["bin"]) == ([-0.5, 19.5], [0, 50], 5)
    assert 'd="M0.0 1000.0V0.0H250.0V1000.0M500.0 1000.0V500.0H750.0V500.0H1000.0V1000.0"' in figure
    assert "<b>mean &lt;7</b>" in figure


def test_a_bin_is_read_by_its_first_and_last_number(browser, tmp_path):
    written(tmp_path / "r.html", curves=[histogram()])
    home = 'document.querySelector(".plot").dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }))'
    for script, value, places in (("", "mean <7", []), (home, "50.0", ["0–4"])):
        drawn = browser.drive(tmp_path / "r.html", script)
        assert drawn.problems == []
        assert [each.text for each in drawn["b"]] == [value]
        (cross,) = drawn[".cross"]
        assert [each.text for each in drawn.below(cross, "text")] == places


def test_charts_without_a_value_or_with_one_are_drawn(tmp_path):
    for ys in ([], [math.nan], [0.0], [-3.0], [5.0, 5.0], [1e300, -1e300], [1e-12, 2e-12]):
        text = written(tmp_path / "r.html", curves=[chart(ys), chart()])
        assert "nan" not in text[text.index("<main>") : text.index("</main>")]
        assert ("no values" in re.split("<figure", text)[1]) == (not any(np.isfinite(ys)))
        Reader(text)


def test_an_axis_holds_its_values_and_wastes_little():
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = rng.normal(size=3) * 10.0 ** rng.integers(-8, 8) + rng.normal() * 10.0 ** rng.integers(-3, 4)
        for whole in (True, False):
            made = axis(values.tolist(), whole=whole)
            assert made.low <= values.min() and values.max() <= made.high
            steps = np.diff(made.ticks)
            assert 2 <= len(made.ticks) <= 10
            np.testing.assert_allclose(steps, made.step, rtol=1e-6)
            assert f"{made.step:.3e}"[:5] in ("1.000", "2.000", "5.000")
    assert axis([0.9, 1.0]).low > 0.5  # a share that moves little is not pressed to the top
    assert axis([2.0, 10.0]).low == 0
    assert axis([-0.05, 14.0]).low == -0.05  # no whole step for a value just below 0


def test_a_series_keeps_its_colour_over_all_charts(tmp_path):
    first = Curves("a", "step", "", (Series("one", (0,), (1.0,)), Series("two", (0,), (1.0,))))
    second = Curves("b", "step", "", (Series("two", (0,), (1.0,)), Series("three", (0,), (1.0,))))
    page = Reader(written(tmp_path / "r.html", curves=[first, second]))
    drawn = [(each.attributes["class"]) for each in page["path"]]
    assert drawn == ["s0", "s1", "s1", "s2"]
    many = Curves("c", "step", "", tuple(Series(str(n), (0,), (1.0,)) for n in range(8)))
    classes = [each.attributes["class"] for each in Reader(written(tmp_path / "r.html", curves=[many]))["path"]]
    assert len(set(classes)) == 8 and classes[6] == "s0 dashed"


def test_points_are_drawn_by_ascending_x():
    _, data = draw_chart(chart([1.0, 2.0, 3.0], x=(5, 1, 3)), 0, {"s0": 0})
    assert (data["series"][0]["x"], data["series"][0]["y"]) == ([1, 3, 5], [2.0, 3.0, 1.0])


def test_a_long_series_is_thinned_but_keeps_its_peaks_and_gaps():
    ys = [math.sin(n / 50) for n in range(20_000)]
    ys[7_777], ys[13_131] = 40.0, -30.0
    ys[15_000:16_000] = [math.nan] * 1000
    _, data = draw_chart(chart(ys), 0, {"s0": 0})
    x, y = data["series"][0]["x"], data["series"][0]["y"]
    assert len(x) <= POINTS and x == sorted(x)
    assert (y[x.index(7_777)], y[x.index(13_131)]) == (40.0, -30.0)
    assert all(value is None for at, value in zip(x, y, strict=True) if 15_000 <= at < 16_000)
    assert any(15_000 <= at < 16_000 for at in x)


def test_numbers_are_written_short_and_with_a_true_minus():
    for (value, decimals), text in {
        (1234.5678, 1): "1,234.6",
        (-0.5, 2): "−0.50",
        (-0.001, 2): "0.00",
        (1.25e-7, None): "1.25e−7",
        (0.0, None): "0",
    }.items():
        assert number_text(value, decimals) == text


# --- colours


def luminance(color):
    linear = rgb(color)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rgb(color):
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(linear):
    """Ottosson's perceptual colour space, in which distances are about those that are seen."""
    cone = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
    mix = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])
    return mix @ np.cbrt(cone @ np.clip(linear, 0, 1))


SIGHT = {  # Machado, Oliveira and Fernandes (2009), full strength
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("theme", [0, 1])
def test_lines_stand_out_and_apart_also_for_colour_blind_readers(theme):
    css = document.read_template("page.css") + document.read_template("report.css")
    named = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", css))
    colors = {name: pair.split(", ")[theme] for name, pair in named.items()}
    lines = [colors[f"s{n}"] for n in range(6)]
    for line in lines:
        ends = sorted((luminance(line), luminance(colors["card"])))
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 3, line
    for sight, matrix in SIGHT.items():
        seen = [oklab(np.asarray(matrix) @ rgb(line)) for line in lines]
        nearest = min(
            (np.linalg.norm(a - b), n, m) for (n, a), (m, b) in itertools.combinations(list(enumerate(seen)), 2)
        )
        assert nearest[0] >= 0.08, (sight, nearest)


# --- examples


def test_examples_reach_the_browser_whole(tmp_path):
    response = ExampleResponse("sft", "a b", ("a", " b", "<end>"), (0.123456, math.nan, -2.0), (("reward", "1"),))
    plain = ExampleResponse("ppo", "only text")
    text = written(tmp_path / "r.html", examples=[ReportExample("p", (response, plain), ("longest",))])
    assert embedded(text)["examples"] == [
        {
            "prompt": "p",
            "responses": [
                {
                    "name": "sft",
                    "text": "a b",
                    "tokens": ["a", " b", "<end>"],
                    "rewards": [0.1235, None, -2.0],
                    "facts": [["reward", "1"]],
                },
                {"name": "ppo", "text": "only text", "tokens": [], "rewards": [], "facts": []},
            ],
            "tags": ["longest"],
        }
    ]


def test_rewards_that_do_not_fit_the_tokens_are_refused(tmp_path):
    uneven = ExampleResponse("sft", "a b", ("a", " b"), (1.0,))
    with pytest.raises(AssertionError, match="sft"):
        written(tmp_path / "r.html", examples=[ReportExample("p", (uneven,))])


def test_each_source_of_a_sum_reaches_the_browser(tmp_path):
    sources = (SourceRewards("words", 1.0, 0.5, (0.25, 0.25)), SourceRewards("rule", -0.5, 2.0, (0.0, 2.0)))
    response = ExampleResponse("ppo", "a b", ("a", " b"), (0.25, -0.75), sources=sources)
    text = written(tmp_path / "r.html", examples=[ReportExample("p", (response,))])
    (example,) = embedded(text)["examples"]
    assert example["responses"][0]["sources"] == {
        "words": {"weight": 1.0, "reward": 0.5, "rewards": [0.25, 0.25]},
        "rule": {"weight": -0.5, "reward": 2.0, "rewards": [0.0, 2.0]},
    }
