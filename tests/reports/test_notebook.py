"""Token rewards as HTML for a notebook."""

import re
from html.parser import HTMLParser

from jaxrm.reports.notebook import token_rewards_html

HOSTILE = '</span><script>alert("1")</script><img src=x onerror=alert(1)>&amp;'


def response(side="chosen", tokens=("wash", " it"), rewards=(1.0, -0.5), tags=(True, False), correction=None):
    return {
        "side": side,
        "text": "".join(tokens),
        "tokens": list(tokens),
        "token_ids": list(range(len(tokens))),
        "rewards": list(rewards),
        "tags": None if tags is None else list(tags),
        "sum": sum(rewards),
        "correction": correction,
    }


def record(*responses, prompt="how ?", kind="literal"):
    return {"kind": kind, "prompt": [{"role": "user", "content": prompt}], "responses": list(responses)}


class Elements(HTMLParser):
    """Start tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def tokens_of(page):
    return [(tag, attributes) for tag, attributes in Elements(page).tags if "title" in attributes]


def strength(attributes):
    return float(re.search(r"([\d.]+)\)", attributes["style"])[1])


def test_every_token_has_its_colour_and_number():
    found = tokens_of(token_rewards_html([record(response(rewards=(1.0, -0.5)))]))
    assert [(tag, attributes["title"]) for tag, attributes in found] == [("span", "+1.00"), ("u", "−0.50")]
    plus, minus = (attributes for _, attributes in found)
    assert "82, 150, 230" in plus["style"] and "240, 150, 60" in minus["style"]
    assert strength(plus) > strength(minus) > 0


def test_a_reward_of_zero_has_no_colour():
    ((_, attributes),) = tokens_of(token_rewards_html([record(response(tokens=("a",), rewards=(0.0,), tags=(True,)))]))
    assert (strength(attributes), attributes["title"]) == (0, "0")


def test_all_records_share_one_scale():
    weak, strong = record(response(rewards=(0.1, 0.1))), record(response(rewards=(2.0, 2.0)))
    first, *_, last = tokens_of(token_rewards_html([weak, strong]))
    assert strength(first[1]) < 0.2 * strength(last[1])


def test_text_adds_no_element():
    def page(text):
        correction = {"text": text, "token_ids": [9]}
        return token_rewards_html([record(response(text, (text, text), correction=correction), prompt=text, kind=text)])

    plain, hostile = Elements(page("x")), Elements(page(HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.text.count(HOSTILE) == 6


def test_line_ends_and_direction_overrides_are_visible():
    page = token_rewards_html([record(response(tokens=("a\n", "\u202eb")))])
    assert "a↵\n" in page and "<code>U+202E</code>b" in page


def test_the_correction_stands_below_unless_it_is_the_same():
    other = response(correction={"text": "rinse it", "token_ids": [7, 8]})
    same = response(correction={"text": "wash it", "token_ids": [0, 1]})
    text = Elements(token_rewards_html([record(other, same)])).text
    assert "would write: rinse it" in text and "would write: the same" in text


def test_a_scalar_reward_model_has_neither_tags_nor_corrections():
    page = token_rewards_html([record(response(tags=None), kind="scalar")])
    assert "underlined" not in page and "would write" not in page
    assert {tag for tag, _ in tokens_of(page)} == {"span"}


def test_nothing_to_show_is_no_error():
    assert token_rewards_html([])


def test_each_source_of_a_sum_has_a_row_of_tokens():
    """On a scale of its own, and escaped."""
    sources = {"wo<rds": {"weight": 1.0, "reward": 2.0, "rewards": [2.0, 0.0]}}
    drawn = token_rewards_html([record(response() | {"sources": sources})])
    assert "wo&lt;rds, weight 1, reward +2.00" in drawn
    found = tokens_of(drawn)
    assert len(found) == 4 and strength(found[0][1]) == strength(found[2][1]) == 0.75
    assert "\u22121.00" in drawn and "color to ±2" in drawn
