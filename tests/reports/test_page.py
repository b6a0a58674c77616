"""The page of scored records: what is in the file, and what a headless browser makes of it."""

import itertools
import json
import math
import random
import re

import pytest

from jaxrm.reports import page as page_module
from jaxrm.reports.document import read_template
from jaxrm.reports.page import write_page
from jaxrm.reports.report import ExampleResponse, Report, ReportExample, SourceRewards, write_report

END = "<|end|>"
HOSTILE = [
    "</script><script>document.documentElement.dataset.hostile = 1</script>",
    '<img src=x onerror="document.documentElement.dataset.hostile=1">',
    "<!--<script>",
    "{{style}} {{records}} ${1+1} \\u003c &lt; \u2028",
    "https://example.org/track.png",
]
HOSTILE_PROMPT = f"{HOSTILE[1]}\n{HOSTILE[0]}"


def scored(side, words, rewards, *, ended=True, correction=None, tags=True):
    """One response of a record; a token is a word with the space before it, an id stands for one token text."""
    tokens = [*words, "<|end|>"] if ended else list(words)
    assert len(rewards) == len(tokens), (tokens, rewards)
    tagged = [reward > 0 for reward in rewards]
    return {
        "side": side,
        "text": "".join(words),
        "tokens": tokens,
        "token_ids": [token_id(token) for token in tokens],
        "tags": tagged if tags else None,
        "rewards": list(rewards),
        "sum": sum(rewards),
        "mean": sum(rewards) / max(1, len(rewards)),
        "diverges_at": tagged.index(False) if tags and False in tagged else None,
        "ended": ended,
        "correction": None
        if correction is None
        else {
            "text": "".join(correction),
            "tokens": [*correction, "<|end|>"],
            "token_ids": [token_id(token) for token in [*correction, "<|end|>"]],
            "ended": True,
        },
    }


def token_id(token: str) -> int:
    return 2 if token == "<|end|>" else 3 + int.from_bytes(token.encode()[:3], "big") % 50_000


def record(source, *responses, prompt="Say it.", kind="soft", ranked_right="by sum"):
    if ranked_right == "by sum":
        sums = {response["side"]: response["sum"] for response in responses}
        ranked_right = sums["chosen"] > sums["rejected"] if len(sums) == 2 else None
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "source": source,
        "prompt": turns,
        "kind": kind,
        "ranked_right": ranked_right,
        "responses": list(responses),
    }


def simple_pair(source, chosen_sum, rejected_sum, **changes):
    return record(
        source,
        scored("chosen", ["good"], [chosen_sum, 0.0], tags=False),
        scored("rejected", ["bad"], [rejected_sum, 0.0], tags=False),
        **changes,
    )


def wrong_pair():
    """The rejected side pays more; tokens 2 and 3 of the chosen side are charged; one word is corrected."""
    return record(
        "wrong.jsonl:1",
        scored("chosen", ["the", " old", " cat"], [0.5, -0.25, -1.0, 0.125], correction=["the", " young", " cat"]),
        scored("rejected", ["a", " dog"], [1.0, 1.0, 1.0], correction=["a", " dog"]),
        prompt="Which animal?",
    )


def sample(count=0):
    """Every kind of record the page has to hold, then `count` plain pairs that are ranked right."""
    family = "\U0001f469\u200d\U0001f467"
    return [
        simple_pair("right.jsonl:1", 2.0, 1.0, prompt="first prompt"),
        wrong_pair(),
        record("tie.jsonl:1", *simple_pair("", 1.0, 1.0)["responses"], ranked_right=None),
        simple_pair("wrong.jsonl:2", -5.0, 1.0),
        record(
            "scalar.jsonl:1",
            scored("chosen", ["yes"], [0.0, 0.75], tags=False),
            scored("rejected", ["no"], [0.0, -0.5], tags=False),
            kind="scalar",
        ),
        record("single.jsonl:1", scored("response", ["one", "\n", "\ttwo"], [1.0, 1.0, 1.0], ended=False)),
        record(
            "odd.jsonl:1",
            scored("chosen", ["", "\U0001f642", family, " \u0639\u0631\u0628\u064a", "\u202e", "\x07"], [0.1] * 7),
            scored("rejected", [], [], ended=False, correction=["something"]),
            prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "long " * 400}],
        ),
        record(
            "hostile.jsonl:1", scored("response", HOSTILE, [0.1] * 6, correction=HOSTILE[::-1]), prompt=HOSTILE_PROMPT
        ),
        *(simple_pair(f"plain.jsonl:{i}", 2.0, -1.0) for i in range(count)),
    ]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, sample(), title=f"Title {HOSTILE[1]}", about=[("Scale", "0.31"), (HOSTILE[0], HOSTILE[1])])
    return path


def embedded(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="records">(.*?)</script>', text, re.DOTALL)[1])


# --- the file


def test_the_file_refers_to_nothing_outside_itself(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, [wrong_pair()], title="t", about=[])
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"https?:|\b(src|href|srcset|action)\s*=|url\(|@import|\bimport\b|fetch\(|XMLHttp|//[a-z]+\.", text
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_text_of_records_leaves_no_markup_in_the_file(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", text)) == len(re.findall(r"</script>", text)) == 2
    assert "<img" not in text and "<!--" not in text
    assert text.isascii() or not re.search(r"\u2028|\U0001f642", text)
    responses = [response for each in embedded(page)["records"] for response in each["responses"]]
    assert [response["tokens"] for response in responses] == [
        response["tokens"] for each in sample() for response in each["responses"]
    ]


def test_the_diff_of_a_correction_rebuilds_it_from_its_source(tmp_path):
    rng = random.Random(0)
    for case in range(20):
        words, better = ([rng.choice("abcde") for _ in range(rng.randint(0, 12))] for _ in range(2))
        response = scored("response", words, [1.0] * (len(words) + 1), correction=better)
        write_page(tmp_path / "page.html", [record("x", response)], title="t", about=[])
        diff = embedded(tmp_path / "page.html")["records"][0]["responses"][0]["correction"]["diff"]
        source, rebuilt = list(words), []
        for sign, n in diff:
            if sign == "+":
                rebuilt += better[len(rebuilt) : len(rebuilt) + n]
                continue
            rebuilt += source[:n] if sign == "=" else []
            del source[:n]
        assert (source, rebuilt) == ([], better), case
        assert all(a[0] != b[0] and a[0] + b[0] != "+-" for a, b in itertools.pairwise(diff)), diff


def test_an_end_token_is_the_token_that_the_text_leaves_out(tmp_path):
    with_end, without = (
        scored("response", ["a", "b"], [1.0] * 3),
        scored("response", ["a", "b"], [1.0] * 2, ended=False),
    )
    bare = {**without, "ended": True}  # ended, but its end token was not kept
    unwritten = {**with_end, "tokens": ["a", "b", ""]}
    cases = [record("x", each) for each in (with_end, without, bare, unwritten)]
    write_page(tmp_path / "page.html", cases, title="t", about=[])
    ends = [each["responses"][0]["end"] for each in embedded(tmp_path / "page.html")["records"]]
    assert ends == [2, None, None, 2]


def test_a_reward_that_is_no_number_leaves_the_old_page_alone(page):
    before = page.read_bytes()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            write_page(page, [record("x", scored("response", ["a"], [bad, 0.0]))], title="t", about=[])
    assert page.read_bytes() == before
    assert [each.name for each in page.parent.iterdir()] == [page.name]


def test_missing_folders_are_made_and_records_are_left_alone(tmp_path):
    records, same = sample(), sample()
    write_page(str(tmp_path / "a" / "b.html"), iter(records), title="t", about=[])
    assert (tmp_path / "a" / "b.html").is_file()
    assert records == same


def test_ink_is_readable_on_every_colour_in_both_themes():
    css = read_template("page.css")
    colors = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", css))
    assert {"plus", "minus", "wash", "card", "paper", "quiet"} <= set(colors)

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    on = [("ink", below) for below in ("plus", "minus", "wash", "card", "paper")]
    on += [(ink, below) for ink in ("quiet", "plus-ink", "minus-ink") for below in ("wash", "card", "paper")]
    for ink, below in [*on, ("new-ink", "new")]:
        for theme in (0, 1):
            pair = sorted(luminance(colors[name].split(", ")[theme]) for name in (ink, below))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, below, theme)


# --- in the browser


def test_the_page_draws_itself_without_an_error(browser, page):
    drawn = browser.draw(page)
    assert drawn.problems == []
    assert len(drawn["article"]) == len(sample())
    assert drawn["#title"][0].text.startswith("Title <img")
    assert "Scale0.31" in drawn["#about"][0].text
    assert drawn["#count"][0].text == "8 records"
    # a tie counts half: (3 + ½) of 6
    assert "58.3 % of 6 pairs ranked right: 3 right, 2 wrong, 1 tie counted half" in drawn["#outcome"][0].text


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("page_filters.js", "drawTop();\n", "drawTop(;\n"),
        ("page_records.js", "const verdicts", "noSuchFunction();\nconst verdicts"),
        ("page.html", "{{records}}", "{"),
        ("page.html", "</main>", "</main><script>1</script>"),
        ("page.html", "</main>", "</main><img src='x.png'>"),
    ],
)
def test_a_broken_page_is_seen_to_be_broken(browser, tmp_path, monkeypatch, part, old, new):
    whole = read_template
    assert old in whole(part)
    monkeypatch.setattr(
        page_module, "read_template", lambda name: whole(name).replace(old, new) if name == part else whole(name)
    )
    write_page(tmp_path / "page.html", sample(), title="t", about=[])
    assert browser.draw(tmp_path / "page.html").problems


@pytest.mark.slow
def test_light_and_dark_follow_the_system_and_the_address(browser, page):
    probe = "document.documentElement.dataset.paper = getComputedStyle(document.documentElement).backgroundColor"
    light, dark = "rgb(247, 246, 243)", "rgb(17, 19, 22)"
    for address, paper in (("", light), ("dark", dark), ("theme=dark", dark), ("theme=light", light)):
        drawn = browser.drive(page, probe, address)
        assert drawn.problems == []
        assert drawn["html"][0].attributes["data-paper"] == paper, address
    driven = page.with_suffix(".driven.html")
    drawn = browser.draw(driven, options=("--blink-settings=preferredColorScheme=0",))
    assert drawn["html"][0].attributes["data-paper"] == dark
    drawn = browser.draw(driven, "light", options=("--blink-settings=preferredColorScheme=0",))
    assert drawn["html"][0].attributes["data-paper"] == light


def test_hostile_text_stays_text(browser, page):
    drawn = browser.draw(page, "q=hostile.jsonl")
    assert drawn.problems == []
    assert "data-hostile" not in drawn["html"][0].attributes
    assert not drawn["img"] and len(drawn["script"]) == 2
    (article,) = drawn["article"]
    tokens = [each.text for each in drawn.below(article, ".t")]
    assert tokens == [*HOSTILE, END]
    assert drawn.below(article, ".turn")[0].text == "user" + HOSTILE_PROMPT


def test_a_token_is_coloured_by_its_reward_and_marked_by_its_tag(browser, page):
    drawn = browser.draw(page, "q=wrong.jsonl:1&side=chosen")
    tokens = [each for each in drawn[".t"] if "sample" not in each.classes]
    assert [each.text for each in tokens] == ["the", " old", " cat", END]
    assert [each.classes & {"plus", "minus"} for each in tokens] == [{"plus"}, {"minus"}, {"minus"}, {"plus"}]
    assert ["missed" in each.classes for each in tokens] == [False, True, True, False]
    strength = [float(each.attributes["style"].partition("--k:")[2].strip(" ;")) for each in tokens]
    assert sorted(strength) == [strength[3], strength[1], strength[0], strength[2]]
    mark = next(each for each in drawn[".divergence"] if "sample" not in each.classes)
    order = [each for each in drawn.elements if each in tokens or each is mark]
    assert order.index(mark) == 1  # before the second token
    label = drawn[".label"][0].text
    assert "sum\u22120.63" in label and "4 tokens" in label and "diverges at token 2" in label


def test_the_correction_shows_what_is_put_in_and_taken_out(browser, page):
    drawn = browser.draw(page, "q=wrong.jsonl:1")
    assert ([each.text for each in drawn["del"]][1:], [each.text for each in drawn["ins"]][1:]) == (
        [" old"],
        [" young"],
    )
    corrections = [each.text for each in drawn[".correction"]]
    assert corrections[0] == "The reward model would writethe old young cat"
    assert corrections[1] == "The reward model would leave it as it is."
    rewritten = browser.draw(page, "q=odd.jsonl")[".correction"]
    assert [each.text for each in rewritten] == ["The reward model would write this insteadsomething"]


def test_a_scalar_record_has_one_score_and_no_tags(browser, page):
    drawn = browser.drive(page, 'document.querySelector(".tokens > .t").focus()', "q=scalar.jsonl")
    assert drawn.problems == []
    (article,) = drawn["article"]
    assert [each.text for each in drawn.below(article, ".sum")] == ["score+0.75", "score\u22120.50"]
    assert not any(drawn.below(article, name) for name in (".missed", ".divergence", ".correction"))
    tip = drawn["#tip"][0].text
    assert '"yes"' in tip and "tag" not in tip and "null" not in tip


def test_odd_tokens_are_shown_as_what_they_are(browser, page):
    drawn = browser.draw(page, "q=odd.jsonl")
    (article,) = drawn["article"]
    assert [each.text for each in drawn.below(article, ".code")] == ["U+202E", "U+0007"]
    assert len(drawn.below(article, ".part")) == 1
    assert drawn.below(article, ".joined")
    assert [each.text for each in drawn.below(article, ".note")] == ["No tokens: the response is empty."]
    assert "folded" in drawn.below(article, ".prompt")[0].classes
    single = browser.draw(page, "q=single.jsonl")
    assert [each.text for each in single.below(single["article"][0], ".mark")] == ["↵", "⇥"]
    assert "stops here without an end token" in single[".tokens"][0].text


WRONG_FIRST = "wrong:2 wrong:1 tie:1 odd:1 right:1 scalar:1 single:1 hostile:1"  # of pairs, the nearest to wrong first
BY_ADDRESS = {
    "": WRONG_FIRST,
    "show=wrong": "wrong:2 wrong:1",
    "show=right&order=file": "right:1 scalar:1 odd:1",
    "show=tie": "tie:1",
    "show=single&order=file": "single:1 hostile:1",
    "order=file": "right:1 wrong:1 tie:1 wrong:2 scalar:1 single:1 odd:1 hostile:1",
    "order=margin&show=right": "scalar:1 right:1 odd:1",
    "order=long&show=wrong": "wrong:1 wrong:2",
    "side=rejected&order=file": "right:1 wrong:1 tie:1 wrong:2 scalar:1 odd:1",
    "q=FIRST+prompt": "right:1",
    "q=young": "wrong:1",
    "q=young&show=right": "",
    "show=nonsense&order=nonsense&other=1": WRONG_FIRST,
}


def in_full(sources):
    return [each.replace(":", ".jsonl:") for each in sources.split()]


@pytest.mark.parametrize("address", ["", "q=young", "order=margin&show=right", "q=young&show=right"])
def test_a_page_opens_as_its_address_says(browser, page, address):
    drawn = browser.draw(page, address)
    assert drawn.problems == []
    assert drawn.sources == in_full(BY_ADDRESS[address])
    assert ("hidden" in drawn["#none"][0].attributes) == bool(drawn.sources)


def test_filters_and_order_follow_the_address(browser, page):
    script = """
        const sources = () => [...document.querySelectorAll("article")].map((article) => article.dataset.source);
        const seen = {};
        for (const address of ADDRESSES) {
          history.replaceState(null, "", "#" + address);
          dispatchEvent(new Event("hashchange"));
          seen[address] = sources();
        }
        root.dataset.seen = JSON.stringify(seen);
    """
    drawn = browser.drive(page, script.replace("ADDRESSES", json.dumps(list(BY_ADDRESS))))
    assert drawn.problems == []
    seen = json.loads(drawn["html"][0].attributes["data-seen"])
    assert seen == {address: in_full(sources) for address, sources in BY_ADDRESS.items()}


def test_controls_filter_the_page_and_write_the_address(browser, page):
    drawn = browser.drive(
        page,
        """
        document.querySelector("#show input[value=wrong]").click();
        document.querySelector("#side input[value=rejected]").click();
        $("order").value = "file"; $("order").dispatchEvent(new Event("change"));
        $("theme").click(); $("theme").click();
        $("q").value = "wrong.jsonl"; $("q").dispatchEvent(new Event("input"));
        setTimeout(() => { root.dataset.address = location.hash; }, 600);
        """,
    )
    assert drawn.problems == []
    assert drawn.sources == ["wrong.jsonl:1", "wrong.jsonl:2"]
    assert {each.text for each in drawn["h3"]} == {"Rejected"}
    assert drawn["#count"][0].text == "2 of 8 records"
    address = drawn["html"][0].attributes["data-address"]
    assert address == "#show=wrong&side=rejected&order=file&q=wrong.jsonl&theme=dark"
    assert drawn["html"][0].attributes["data-theme"] == "dark"


def test_tokens_are_reached_by_keyboard_one_stop_a_response(browser, page):
    drawn = browser.drive(
        page,
        """
        const event = (key) => new KeyboardEvent("keydown", { key, bubbles: true });
        const press = (key) => document.activeElement.dispatchEvent(event(key));
        document.querySelector(".tokens > .t").focus();
        press("End"); press("ArrowRight"); press("ArrowLeft");
        """,
        "q=wrong.jsonl:1",
    )
    assert drawn.problems == []
    tip = drawn["#tip"][0]
    assert "hidden" not in tip.attributes
    for fact in (
        '" cat"',
        "reward \u22121.00",
        "tag \u2212",
        f"id {token_id(' cat')}",
        "token 3 of 4",
        "sum so far \u22120.75",
    ):
        assert fact in tip.text, fact
    chosen = drawn.below(drawn[".tokens"][0], ".t")
    assert [each.attributes["tabindex"] for each in chosen] == ["-1", "-1", "0", "-1"]


def test_a_folded_prompt_opens(browser, page):
    drawn = browser.drive(page, 'document.querySelector(".fold").click()', "q=odd.jsonl")
    assert "folded" not in drawn[".prompt"][0].classes
    assert drawn[".fold"][0].attributes["aria-expanded"] == "true"


@pytest.mark.slow
def test_a_long_page_draws_its_records_as_they_are_needed(browser, tmp_path):
    write_page(tmp_path / "page.html", sample(300), title="t", about=[])
    drawn = browser.draw(tmp_path / "page.html")
    assert drawn.problems == []
    assert drawn["#count"][0].text == "308 records"
    assert 10 <= len(drawn["article"]) < 100
    assert "hidden" not in drawn["#more"][0].attributes
    whole = browser.drive(tmp_path / "page.html", "for (let i = 0; i < 40; i++) $('more').click()")
    assert len(whole["article"]) == len(set(whole.sources)) == 308
    assert "hidden" in whole["#more"][0].attributes


def test_no_records_make_a_page_that_says_so(browser, tmp_path):
    write_page(tmp_path / "page.html", [], title="t", about=[])
    drawn = browser.draw(tmp_path / "page.html")
    assert drawn.problems == []
    assert drawn["#count"][0].text == "0 records"
    assert "hidden" not in drawn["#none"][0].attributes


# --- sums of rewards


def test_a_source_has_a_row_of_tokens_below_the_sum(browser, tmp_path):
    """On the page of scored records and in a report alike."""
    sources = {
        "words": {"weight": 1.0, "reward": 0.5, "rewards": [0.5, 0.0]},
        "rule": {"weight": -0.5, "reward": 2.0, "rewards": [0.0, 2.0]},
    }
    response = scored("response", ["a"], [0.5, -1.0], tags=False) | {"sources": sources}
    write_page(tmp_path / "page.html", [record("one", response)], title="t", about=[])
    each = tuple(SourceRewards(name, x["weight"], x["reward"], tuple(x["rewards"])) for name, x in sources.items())
    example = ReportExample("p", (ExampleResponse("ppo", "a", ("a", END), (0.5, -1.0), sources=each),))
    write_report(tmp_path / "report.html", Report(title="t", examples=[example]))
    for name in ("page.html", "report.html"):
        drawn = browser.draw(tmp_path / name)
        assert drawn.problems == []
        texts = [element.text for element in drawn[".source"]]
        assert texts == [
            f"wordsreward +0.50weight 1color to ±0.50a{END}",
            f"rulereward +2.00weight -0.5color to ±2.00a{END}",
        ]
        tokens = [token for token in drawn[".t"] if "sample" not in token.classes]
        signs = [("plus" in token.classes) - ("minus" in token.classes) for token in tokens]
        assert signs == [1, -1, 1, 0, 0, 1]
