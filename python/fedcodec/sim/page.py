"""One self-contained HTML page for what a study found: no file beside it, no script, no network."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import matplotlib.figure
from cycler import cycler
from matplotlib import rc_context

# Okabe and Ito's, which colour-blind readers tell apart, but grey for the yellow that white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#767676")
# Four, so that a colour and its neighbours differ in print without colour as well.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))

#: For `matplotlib.rc_context`: what is drawn with it can be read on a phone and told apart.
STYLE: dict[Any, Any] = {
    # As wide as a phone: its text is not made smaller there.
    "figure.figsize": (5.0, 3.6),
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=2 * DASHES),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "lines.linewidth": 1.6,
}
# CSS pixels for a point of a drawing. Where the smallest is too wide for the window, the drawing scrolls.
SMALLEST, LARGEST = 0.9, 1.5
POINTS = 72  # an inch

# The date among them would make every page another.
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

FIGURES = re.compile(r"[-+(−±<>≤≥≈~]*\s*\.?\d")
MISSING = ("", "-", "–", "—")


@dataclass(frozen=True)
class Table:
    """A table whose cells are text; columns of figures are aligned on the right.

    Attributes
    ----------
    headings : sequence of str or (str, str)
        A pair is a group and a column of it: neighbours of one group stand under one heading, as in
        ``("setting", ("accuracy %", "ours"), ("accuracy %", "paper"))``.
    rows : sequence of sequences of str
        The first cell names the row, and stays in sight where the table is wider than the window.

    Raises
    ------
    ValueError
        If there are no headings, or a row has more or fewer cells than headings.
    """

    title: str
    headings: Sequence[str | tuple[str, str]]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.headings:
            raise ValueError(f"the table {self.title!r} has no headings")
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(
                    f"the table {self.title!r} has {len(self.headings)} headings but a row of "
                    f"{len(row)} cells: {list(row)}"
                )


@dataclass(frozen=True)
class Figure:
    """A drawing, best made within ``rc_context(STYLE)``; the title is set above it, not in it."""

    title: str
    figure: matplotlib.figure.Figure
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of text, and tables and figures below them."""

    title: str
    paragraphs: Sequence[str] = ()
    parts: Sequence[Table | Figure] = ()

    def __post_init__(self) -> None:
        _check_paragraphs(f"the section {self.title!r}", self.paragraphs)


def _check_paragraphs(place: str, paragraphs: Sequence[str]) -> None:
    if isinstance(paragraphs, str):
        raise TypeError(f"{place} needs a sequence of paragraphs, and got one text")


def write_page(
    path: Path,
    title: str,
    introduction: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, Any],
) -> None:
    """Write the page; it is there in full or as it was before, and the same for the same arguments.

    Parameters
    ----------
    path : Path
        Its folder is made if need be.
    introduction : sequence of str
        Paragraphs: what was done and what came out.
    facts : mapping
        Settings, seeds, versions, machine, date: what somebody needs to do it again. A value may be a list or a mapping
        itself.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> table = Table("Bytes", ("codec", "ours", "paper"), [("raw", "400", "400"), ("int8", "108", "-")])
    >>> path = Path(tempfile.mkdtemp()) / "study.html"
    >>> write_page(path, "A study", ["It works."], [Section("Sizes", parts=[table])], {"seeds": [0, 1]})
    >>> path.read_text()[:15]
    '<!doctype html>'
    """
    _check_paragraphs("the introduction", introduction)
    page = TEMPLATE.render(title=title, introduction=introduction, sections=sections, facts=facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as unfinished:
        draft = Path(unfinished, path.name)
        draft.write_text(page, encoding="utf-8", newline="\n")
        os.replace(draft, path)


def _drawing(figure: Figure, prefix: str) -> str:
    """Return the figure as an element of the page; the prefix keeps its ids apart from other figures'."""
    text = StringIO()
    # Ticks are made, with the style of the moment, when the figure is drawn.
    with rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": "fedcodec"}):
        figure.figure.savefig(text, format="svg", facecolor="white", metadata=NO_METADATA)
    svg = ElementTree.fromstring(text.getvalue())
    for element in svg.iter():
        # HTML knows these elements without their namespaces.
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                value = prefix + value
            elif name == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
    width = float(svg.attrib.pop("width").removesuffix("pt"))
    del svg.attrib["height"]
    svg.set("role", "img")
    svg.set("aria-label", figure.title)
    svg.set("style", f"min-width: {SMALLEST * width:.0f}px")
    return ElementTree.tostring(svg, encoding="unicode")


def _largest(figure: Figure) -> int:
    return round(LARGEST * POINTS * figure.figure.get_figwidth())


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _groups(table: Table) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the columns, heading and class, by their groups; one that has none is by itself, under ""."""
    result: list[tuple[str, list[tuple[str, str]]]] = []
    for index, heading in enumerate(table.headings):
        group, name = ("", heading) if isinstance(heading, str) else heading
        kind = "number" if index and _all_figures([row[index] for row in table.rows]) else ""
        if group and result and result[-1][0] == group:
            result[-1][1].append((name, kind))
        else:
            result.append((group, [(name, f"{kind} first" if index else "")]))
    return result


def _all_figures(cells: Sequence[str]) -> bool:
    shown = [cell for cell in cells if cell not in MISSING]
    return bool(shown) and all(map(FIGURES.match, shown))


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name} {inner}", deep) for inner, deep in _flat(value))
        else:
            yield name, value


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "none" if value is None else str(value)


ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.globals.update(
    drawing=_drawing, largest=_largest, groups_of=_groups, flat=_flat, text_of=_text
)
TEMPLATE = ENVIRONMENT.from_string("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --text: #1c1e21; --quiet: #5a6068; --line: #d5d9de; --strong: #8a919a; --link: #0b57a4;
  --shade: rgb(0 0 0 / 18%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --text: #e4e6e8; --quiet: #a3abb3; --line: #343a40; --strong: #6c747c; --link: #8ab8f0;
    --shade: rgb(0 0 0 / 75%);
  }
}
* { box-sizing: border-box; }
html { text-size-adjust: 100%; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2 { line-height: 1.2; text-wrap: balance; }
h1 { margin: 0.5rem 0 1rem; font-size: clamp(1.5rem, 1.2rem + 1.6vw, 2.1rem); }
h2 {
  margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line);
  font-size: clamp(1.25rem, 1.1rem + 0.8vw, 1.5rem);
}
p { margin: 0 0 0.85rem; max-width: 42rem; }
a { color: var(--link); }
nav ul { margin: 1.25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.35rem 1.25rem; list-style: none; }
nav a { display: inline-block; padding: 0.2rem 0; }

figure { margin: 1.5rem 0 2rem; }
figcaption { margin-bottom: 0.5rem; max-width: 42rem; font-weight: 600; line-height: 1.35; }
.note { margin-top: 0.5rem; color: var(--quiet); font-size: 0.875rem; line-height: 1.45; }
.figure { display: inline-block; width: 100%; margin: 1rem 0; vertical-align: top; }
@media (min-width: 48rem) { .figure { padding-right: 1.5rem; } }
.figure .scroll { border-radius: 4px; background: #fff; }
.scroll { max-width: 100%; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }

.table .scroll {
  width: fit-content;
  background: linear-gradient(to left, var(--page) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100% no-repeat scroll;
}
table { border-collapse: separate; border-spacing: 0; font-size: 0.9375rem; line-height: 1.35; }
th, td { padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
thead th { vertical-align: bottom; font-weight: 600; overflow-wrap: normal; }
thead tr:last-child th, thead th[rowspan] { border-bottom: 2px solid var(--strong); }
thead th.group { text-align: center; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.grouped .first { border-left: 1px solid var(--line); }
tbody th { font-weight: 500; }
tr > :first-child:not(.later) {
  position: sticky; left: 0; padding-left: 0; min-width: 4rem; max-width: 18rem;
  background: var(--page); overflow-wrap: break-word;
}

dl { margin: 0; }
dl > div { padding: 0.45rem 0; border-bottom: 1px solid var(--line); }
dl dl > div { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; padding: 0.15rem 0; border: 0; }
dt { color: var(--quiet); font-size: 0.9375rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
@media (min-width: 40rem) { dl > div, dl dl > div { display: grid; grid-template-columns: 12rem 1fr; gap: 1rem; } }
@media (max-width: 40rem) {
  table { font-size: 0.8125rem; }
  th, td { padding: 0.4rem 0.5rem; }
  tr > :first-child:not(.later) { max-width: 7.5rem; }
}
@media print {
  :root { --page: #fff; --text: #000; --quiet: #444; --line: #bbb; --strong: #666; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; background: none !important; }
  table { font-size: 8pt; }
  th, td { padding: 0.15rem 0.3rem; }
  .figure, tr { break-inside: avoid; }
  h2, figcaption { break-after: avoid; }
  #facts { break-before: page; }
  svg { min-width: 0 !important; }
}
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% for paragraph in introduction %}
<p>{{ paragraph }}</p>
{% endfor %}
<nav aria-label="Sections"><ul>
{% for section in sections %}
<li><a href="#section-{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}
<li><a href="#facts">How it was run</a></li>
</ul></nav>
</header>
{% for section in sections %}
{% set number = loop.index %}
<section id="section-{{ number }}">
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for part in section.parts %}
{% if part.figure is defined %}
<figure class="figure" style="max-width: {{ largest(part) }}px">
{% else %}
<figure class="table">
{% endif %}
<figcaption>{{ part.title }}</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="{{ part.title }}">
{% if part.figure is defined %}
{{ drawing(part, "drawing-%d-%d-" % (number, loop.index)) | safe }}
{% else %}
{% set groups = groups_of(part) %}
{% set grouped = groups | map("first") | select | list %}
<table{{ ' class="grouped"' | safe if grouped }}>
<thead>
<tr>
{% for group, columns in groups %}
{% if group %}
<th class="group first" scope="colgroup" colspan="{{ columns | length }}">{{ group }}</th>
{% else %}
<th class="{{ columns[0][1] }}" scope="col"{{ ' rowspan="2"' | safe if grouped }}>{{ columns[0][0] }}</th>
{% endif %}
{% endfor %}
</tr>
{% if grouped %}
<tr>
{% for group, columns in groups if group %}
{% for name, kind in columns %}
<th class="{{ kind }} later" scope="col">{{ name }}</th>
{% endfor %}
{% endfor %}
</tr>
{% endif %}
</thead>
<tbody>
{% set kinds = (groups | map("last") | sum(start=[]) | map("last") | list)[1:] %}
{% for row in part.rows %}
<tr>
<th scope="row">{{ row[0] }}</th>
{% for kind in kinds %}
<td class="{{ kind }}">{{ row[loop.index] }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</div>
{% if part.note %}
<p class="note">{{ part.note }}</p>
{% endif %}
</figure>
{% endfor %}
</section>
{% endfor %}
<section id="facts">
<h2>How it was run</h2>
<dl>
{% for name, value in facts.items() %}
<div><dt>{{ name }}</dt><dd>
{% if value is mapping %}
<dl>
{% for name, value in flat(value) %}
<div><dt>{{ name }}</dt><dd>{{ text_of(value) }}</dd></div>
{% endfor %}
</dl>
{% else %}
{{ text_of(value) }}
{% endif %}
</dd></div>
{% endfor %}
</dl>
</section>
</main>
</body>
</html>
""")
