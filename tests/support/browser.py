"""A headless browser that says what became of a page."""

import html.parser
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = {"meta", "input", "br", "img", "link", "hr"}


@dataclass
class Element:
    """An element of a drawn page: its attributes, all text below it, and the elements around it."""

    tag: str
    attributes: dict[str, str]
    above: tuple["Element", ...]
    text: str = ""

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())


@dataclass
class Drawn:
    """What the browser made of a page, in document order."""

    elements: list[Element] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[Element]:
        """The elements of a tag, of a ``.class`` or the one with an ``#id``."""
        kind, rest = name[0], name[1:]
        if kind == "#":
            return [each for each in self.elements if each.attributes.get("id") == rest]
        if kind == ".":
            return [each for each in self.elements if rest in each.classes]
        return [each for each in self.elements if each.tag == name]

    def below(self, outer: Element, name: str) -> list[Element]:
        return [each for each in self[name] if any(one is outer for one in each.above)]

    @property
    def sources(self) -> list[str]:
        return [article.attributes["data-source"] for article in self["article"]]

    @property
    def problems(self) -> list[str]:
        """What went wrong: an error or a breach of the policy that the page recorded, a console error, no end."""
        state = self["html"][0].attributes
        found = [f"{name}: {state[name]}" for name in ("data-error", "data-blocked") if name in state]
        if state.get("data-state") != "drawn":
            found.append("the script did not reach its end")
        return found + self.console


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.drawn, self.open = Drawn(), []

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(self.open))
        self.drawn.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and self.open.pop().tag != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element.text += data


@dataclass(frozen=True)
class Browser:
    """Headless Chromium on a file, with a profile of its own."""

    program: str
    profile: Path

    def draw(self, page: Path, address: str = "", *, options: tuple[str, ...] = ()) -> Drawn:
        command = [
            self.program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--user-data-dir={self.profile}",
            "--enable-logging=stderr",
            "--window-size=1280,1000",
            *options,
            "--dump-dom",
            f"{page.resolve().as_uri()}#{address}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, check=False)
        assert result.stdout, f"{self.program} returned {result.returncode}: {result.stderr[-2000:]}"
        reader = _Reader()
        reader.feed(result.stdout)
        reader.drawn.console = re.findall(r"CONSOLE.*", result.stderr)
        return reader.drawn

    def drive(self, page: Path, script: str, address: str = "") -> Drawn:
        """Draws the page with `script` run after its own, which takes lifting its policy."""
        driven = page.with_suffix(".driven.html")
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
        driven.write_text(text.replace("</body>", f"<script>{{ {script} }}</script></body>"), encoding="utf-8")
        return self.draw(driven, address, options=("--virtual-time-budget=2000",))


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Browser:
    program = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is on the path, and CHROME names none")
    return Browser(program, tmp_path_factory.mktemp("profile"))
