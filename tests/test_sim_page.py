import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from fedcodec.sim import page
from fedcodec.sim.page import Figure, Section, Table, write_page
from fedcodec.sim.provenance import provenance

HOSTILE = """</title><script>alert("it's")</script> & <b>"""
UNBROKEN = "sha256:" + 64 * "0f"
WIDTHS = {"phone": (390, 844), "desk": (1280, 800)}


class Parsed(HTMLParser):
    """Collects the elements with their attributes, and the text that stands in each kind of element."""

    void = ("meta",)

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [" ".join(text.split()) for text in self.texts.get(tag, [])]


def curves(title="Accuracy by round", note="", labels=tuple("abcdefgh")):
    with rc_context(page.STYLE):
        drawing = Drawing()
        axes = drawing.add_subplot()
        for index, label in enumerate(labels):
            axes.plot(np.arange(1, 21), np.log1p(np.arange(20)) - index, marker="o", label=label)
        axes.set_xlabel("round")
        axes.set_ylabel("test accuracy, %")
        drawing.legend(loc="outside lower center", ncols=4)
    return Figure(title, drawing, note)


FIGURES = ("accuracy, %", "loss", "delay, ms", "transmission ratio")


@pytest.fixture(scope="module")
def full():
    """The arguments of a page as long and as wide as a study's."""
    names = ("none", "prune", "quantize", "prune + quantize + distil")
    compared = Table(
        "The models after 20 rounds",
        ("model", *((name, who) for name in FIGURES for who in ("ours", "paper"))),
        [(name, *4 * ("88.00 ± 0.21", "93.84")) for name in 2 * names],
        20 * "A long note. ",
    )  # fmt: skip
    cells = Table(
        "All cells",
        ("pruned", *(f"MNIST ResNet12 {index}" for index in range(6))),
        [(f"{10 * row} %", *6 * ("155.75",)) for row in range(10)],
    )
    codec = "topk(0.01, scope=update) | int8(block=1024) | zstd(level=3)"
    words = Table("Codecs", (UNBROKEN, "outcome"), [(codec, "reached it"), (UNBROKEN, UNBROKEN)])
    with rc_context(page.STYLE):
        wide = Drawing(figsize=(12, 3))
        wide.add_subplot().barh(names, [1, 2, 3, 4])
    sections = [
        Section("Accuracy", [40 * "A paragraph. "], [compared, curves(), curves("By bytes")]),
        Section("Sizes " + UNBROKEN, parts=[cells, words, Figure("Bars", wide)]),
    ]
    facts = {"digest": UNBROKEN, "seeds": [0, 1], "settings": {"rate": 0.1}, **provenance()}
    return f"A study {UNBROKEN}", ["It went well."], sections, facts


@pytest.fixture(scope="module")
def written(full, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "study.html"
    write_page(path, *full)
    return path


def test_tables_and_facts_are_what_was_given(tmp_path):
    table = Table(
        "Models",
        ("model", *((name, who) for name in FIGURES[:2] for who in ("ours", "paper"))),
        [("none", "88.0 ± 0.2", "93.8", "0.4", "-"), ("prune", "−1", "", "about 2", "3")],
        "ours of 5 seeds",
    )
    facts = {
        "seeds": [0, 1],
        "folder": None,
        "versions": {"torch": "2", "fedcodec": {"active": "neon"}},
    }
    write_page(
        tmp_path / "a.html", "Study", ["One.", "Two."], [Section("S", ["Three."], [table])], facts
    )
    parsed = Parsed(tmp_path / "a.html")
    assert parsed.text("title") == parsed.text("h1") == ["Study"]
    assert parsed.text("p") == ["One.", "Two.", "Three.", "ours of 5 seeds"]
    assert parsed.text("h2")[0] == "S"
    heads = ["model", "accuracy, %", "loss", *2 * ("ours", "paper"), "none", "prune"]
    assert parsed.text("th") == heads
    assert [each.get("colspan") for each in parsed.all("th")[:3]] == [None, "2", "2"]
    assert parsed.all("th")[0]["rowspan"] == "2"
    assert parsed.text("td") == ["88.0 ± 0.2", "93.8", "0.4", "-", "−1", "", "about 2", "3"]
    numbers = ["number" in each["class"].split() for each in parsed.all("td")]
    assert numbers == 2 * [True, True, False, True]
    assert parsed.text("dt") == ["seeds", "folder", "versions", "torch", "fedcodec active"]
    assert [text for text in parsed.text("dd") if text] == ["0, 1", "none", "2", "neon"]
    anchors = {each["href"] for each in parsed.all("a")}
    assert anchors == {"#" + each["id"] for each in parsed.all("section")}


def test_headings_without_groups_are_one_row(tmp_path):
    table = Table("T", ("codec", "bytes", "empty"), [("raw", "400", "")])
    write_page(tmp_path / "a.html", "Study", [], [Section("S", parts=[table])], {})
    parsed = Parsed(tmp_path / "a.html")
    assert len(parsed.all("tr")) == 2
    assert not any("rowspan" in each for each in parsed.all("th"))
    assert [each["class"].split() for each in parsed.all("td")] == [["number", "first"], ["first"]]


def test_all_text_is_escaped(tmp_path):
    table = Table(HOSTILE, (HOSTILE, (HOSTILE, HOSTILE)), [(HOSTILE, HOSTILE)], HOSTILE)
    figure = curves(HOSTILE, HOSTILE, labels=[HOSTILE])
    section = Section(HOSTILE, [HOSTILE], [table, figure])
    facts = {HOSTILE: HOSTILE, "list": [HOSTILE], "nested": {HOSTILE: {HOSTILE: HOSTILE}}}
    write_page(tmp_path / "a.html", HOSTILE, [HOSTILE], [section], facts)
    parsed = Parsed(tmp_path / "a.html")
    assert {"script", "b"}.isdisjoint(tag for tag, _ in parsed.elements)
    shown = " ".join(HOSTILE.split())
    for tag, times in {"title": 1, "h1": 1, "p": 4, "h2": 1, "figcaption": 2, "td": 1, "dt": 1}.items():  # fmt: skip
        assert parsed.text(tag).count(shown) == times, tag
    assert parsed.text("th") == 4 * [shown]
    assert parsed.text("dt").count(f"{shown} {shown}") == 1
    assert parsed.text("dd").count(shown) == 3
    assert parsed.all("svg")[0]["aria-label"] == HOSTILE


def test_the_page_needs_nothing_but_itself(written):
    parsed = Parsed(written)
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(tag for tag, _ in parsed.elements)  # fmt: skip
    for tag, attributes in parsed.elements:
        for name in ("src", "srcset", "href", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    text = written.read_text(encoding="utf-8")
    assert "@import" not in text
    assert "://" not in text
    policy = parsed.all("meta")[3]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'")
    assert [path.name for path in written.parent.iterdir()] == ["study.html"]


def test_figures_have_titles_and_ids_of_their_own(written):
    parsed = Parsed(written)
    assert [each["aria-label"] for each in parsed.all("svg")] == [
        "Accuracy by round",
        "By bytes",
        "Bars",
    ]
    assert {each["role"] for each in parsed.all("svg")} == {"img"}
    identifiers = [each["id"] for _, each in parsed.elements if "id" in each]
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r"url\(#([^)]+)\)", written.read_text(encoding="utf-8"))
    used += [each["href"][1:] for _, each in parsed.elements if "href" in each]
    assert len(used) > 100
    assert set(used) <= set(identifiers)


def test_the_same_input_gives_the_same_bytes(full, written, tmp_path):
    write_page(tmp_path / "again.html", *full)
    assert (tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_a_failure_leaves_the_earlier_page_as_it_was(full, monkeypatch, tmp_path):
    path = tmp_path / "study.html"
    path.write_text("earlier")
    write = Path.write_text

    def fail(self, *arguments, **options):
        write(self, "half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="no space left"):
            write_page(path, "Study", [], [], {})
    assert [each.name for each in tmp_path.iterdir()] == ["study.html"]
    assert path.read_text() == "earlier"


def test_a_row_that_does_not_fit_is_refused_with_its_table():
    with pytest.raises(ValueError, match=r"'Sizes' has 2 headings but a row of 1 cells: \['raw'\]"):
        Table("Sizes", ("codec", "bytes"), [("int8", "1"), ("raw",)])
    with pytest.raises(ValueError, match="'Sizes' has no headings"):
        Table("Sizes", (), [])


def test_one_text_is_not_taken_for_its_letters(tmp_path):
    with pytest.raises(TypeError, match="the section 'Sizes' needs a sequence of paragraphs"):
        Section("Sizes", "A text.")
    with pytest.raises(TypeError, match="the introduction needs a sequence of paragraphs"):
        write_page(tmp_path / "a.html", "Study", "A text.", [], {})
    assert list(tmp_path.iterdir()) == []


MEASURE = """
const measure = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const style = (element) => view.getComputedStyle(element);
  const colours = (text, ground) => [style(page.querySelector(text)).color,
                                     style(page.querySelector(ground)).backgroundColor];
  const boxes = all(".scroll");
  boxes.forEach((box) => box.scrollLeft = 1e6);
  return {
    window: view.innerWidth,
    room: page.documentElement.clientWidth,
    document: page.documentElement.scrollWidth,
    sizes: all("th, td, dt, dd, p, figcaption").map((cell) => parseFloat(style(cell).fontSize)),
    scrolled: boxes.filter((box) => box.scrollLeft > 0).length,
    firstColumn: all("tbody th").map((cell) =>
      cell.getBoundingClientRect().left - cell.closest(".scroll").getBoundingClientRect().left),
    firstWidth: Math.max(...all("tbody th").map((cell) => cell.offsetWidth)),
    drawings: all("svg").map((drawing) => {
      const {width, height} = drawing.getBoundingClientRect();
      return [width, height, drawing.viewBox.baseVal.width, drawing.viewBox.baseVal.height];
    }),
    colours: [colours("p", "body"), colours(".note", "body"), colours("dt", "body"),
              colours("a", "body"), colours("tbody th", "tbody th")],
    ground: style(page.querySelector(".figure .scroll")).backgroundColor,
    requests: view.performance.getEntriesByType("resource").length,
  };
};
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.title = JSON.stringify(Object.fromEntries(frames.map((f) => [f.id, measure(f)])));
};
"""


def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    return None


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, written, tmp_path_factory):
    """What a browser makes of the page, in frames: its windows are never as narrow as a phone's."""
    if not chromium():
        pytest.skip("the look of pages needs Chromium")
    folder = tmp_path_factory.mktemp("browser")
    source = html.escape(written.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe id="{name}" style="border: 0" width="{width}" height="{height}" srcdoc="{source}"></iframe>'
        for name, (width, height) in WIDTHS.items()
    )
    outer = folder / "frames.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><body>{frames}<script>{MEASURE}</script>',
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            chromium(), "--headless", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"--blink-settings=preferredColorScheme={['dark', 'light'].index(request.param)}",
            "--dump-dom", outer.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    title = re.search(r"<title>({.*?})</title>", done.stdout)
    assert title, done.stderr
    return request.param, json.loads(html.unescape(title[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_window(seen, width):
    measured = seen[1][width]
    assert measured["window"] == WIDTHS[width][0]
    assert measured["document"] <= measured["room"]
    assert measured["requests"] == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_text_can_be_read(seen, width):
    assert min(seen[1][width]["sizes"]) >= 12


def test_wide_tables_scroll_under_their_first_column(seen):
    measured = seen[1]["phone"]
    assert measured["scrolled"] >= 2
    assert measured["firstColumn"] == pytest.approx([0] * len(measured["firstColumn"]), abs=0.6)
    assert measured["firstWidth"] <= 390 / 2


@pytest.mark.parametrize("width", WIDTHS)
def test_drawings_scale_and_keep_their_shape(seen, width):
    for shown_width, shown_height, drawn_width, drawn_height in seen[1][width]["drawings"]:
        assert page.SMALLEST - 0.01 <= shown_width / drawn_width <= page.LARGEST + 0.01
        assert shown_height / drawn_height == pytest.approx(shown_width / drawn_width, rel=0.01)
    # At the width of STYLE the whole drawing is in sight on a phone.
    assert seen[1]["phone"]["drawings"][0][0] <= 390


def luminance(colour):
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("width", WIDTHS)
def test_text_stands_out_in_both_schemes(seen, width):
    scheme, measured = seen[0], seen[1][width]
    for text, ground in measured["colours"]:
        darker, lighter = sorted([luminance(text), luminance(ground)])
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)
        assert (luminance(ground) < 0.5) == (scheme == "dark")
    # Drawings are made for a light ground.
    assert luminance(measured["ground"]) > 0.9
