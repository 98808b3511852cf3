"""The page: complete without a network, its figures with their numbers, well laid out in a real browser."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from visprune.bench.report.page import page
from visprune.bench.report.page.points import front
from visprune.bench.report.page.row_styles import RowStyles
from visprune.bench.report.page.svg import Scale, spread_out


def jpeg() -> str:
    file = io.BytesIO()
    Image.new("RGB", (320, 320), (90, 120, 150)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def html(large_report) -> str:
    return page(large_report, {row.name: [jpeg()] for row in large_report.rows})


class Tree(HTMLParser):
    """Sees that elements are closed in order, and which attributes they have."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_asks_for_nothing_outside_itself(html):
    tags = Tree(html).seen
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "form"}
    links = [value for _, found in tags for key, value in found.items() if key in ("src", "href")]
    assert links
    assert all(value.startswith("data:") for value in links)
    assert not re.search(r"url\(|@import|https?://", html)


def test_every_figure_says_what_it_shows_and_has_its_numbers_as_a_table(html):
    tags = Tree(html).seen
    for width in ("wide", "narrow"):
        drawn = [found for tag, found in tags if tag == "svg" and found.get("class") == width]
        assert len(drawn) == 5
        assert all(found["role"] == "img" and len(found["aria-label"]) > 10 for found in drawn)
    assert [tag for tag, _ in tags].count("details") == 5


def test_baselines_have_a_colour_of_their_own_and_a_line_in_the_legend(html, large_report):
    styles = RowStyles.of(large_report)
    colours = {row.method: styles.colour(row) for row in large_report.rows}
    assert (colours["random"], colours["resize"]) == ("c-random", "c-resize")
    assert len(set(colours.values())) == len(colours) == 6
    for colour in set(colours.values()):
        assert f".{colour} {{" in html or f".{colour}," in html
    assert html.count("</svg>resize</li>") == 3


def test_every_row_and_every_sentence_is_on_the_page(html, large_report):
    for row in large_report.rows:
        assert row.name in html
    assert "Two rows are noted." in html
    assert "0.11 of the visual work cannot be reached" in html
    assert "What &lt;is&gt; it &amp; why?" in html  # the prompt is no markup


def test_no_text_is_taken_for_markup(large_report):
    text = "<i>\"one\" & 'two'</i>"
    rows = tuple(replace(row, name=f"{row.name} {text}", model=text) for row in large_report.rows)
    made = replace(
        large_report,
        rows=rows,
        notes=(text,),
        machine=replace(large_report.machine, processor=text, gpu=text, energy_counter=text),
        work=replace(large_report.work, images=(f"{text}.png",), prompt=text, system=text),
    )
    html = page(made, {row.name: [jpeg()] for row in rows})
    assert not [tag for tag, _ in Tree(html).seen if tag == "i"]
    assert html.count("&lt;i&gt;") > 2 * len(rows)


def test_a_report_without_accuracy_or_rows_to_compare_has_fewer_figures(row, report):
    html = page(report(row("only")), {})
    Tree(html)
    assert "Pareto" not in html
    assert "Where the time goes" in html
    assert "What is kept" not in html


def test_the_front_holds_the_rows_that_none_beats_in_both(row):
    rows = [
        row("slow and good", 20, noise=0, right=480),
        row("slow and bad", 20, noise=0, right=300),
        row("quick and bad", 5, noise=0, right=310),
        row("between", 10, noise=0, right=400),
        row("beaten", 11, noise=0, right=390),
    ]
    assert [one.name for one in front(rows)] == ["quick and bad", "between", "slow and good"]


@pytest.mark.parametrize("values", [(0.31, 0.9), (3, 97), (0.001, 0.0021), (5, 5), (0, 123456)])
def test_a_scale_holds_its_values_and_its_ticks_are_evenly_written(values):
    scale = Scale.of(values, 40, 400, zero=False)
    assert scale.low <= min(values)
    assert scale.high >= max(values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        assert float(text) == pytest.approx(value, abs=scale.step / 100)


def test_labels_are_spread_out_in_order_and_within_bounds():
    places = spread_out([50, 51, 52, 10, 99], 15, 0, 100)
    ordered = sorted(places)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(ordered))
    assert max(places) <= 100
    assert min(places) >= 0
    assert places[3] < places[0] < places[1] < places[2] < places[4]


# Texts of one drawing that are on the screen and lie on each other; half a pixel is rounding.
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const seen = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([_, b]) => b.width > 0);
  return seen.flatMap(([one, a], i) => seen.slice(i + 1).filter(([_, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2.5).map(([other]) => one + " / " + other));
})"""
OUTSIDE = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([_, b]) => b.width > 0 && (b.left < box.left - 1 || b.right > box.right + 1 ||
                                        b.top < box.top - 1 || b.bottom > box.bottom + 1)).map(([t]) => t);
})"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll("svg text")].map(t => [t, t.closest("svg")])
  .filter(([t]) => t.getBoundingClientRect().width > 0)
  .map(([t, svg]) => parseFloat(getComputedStyle(t).fontSize) * svg.clientWidth
    / svg.viewBox.baseVal.width))"""
CONTRAST = """() => {
  const light = c => c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.querySelector("section")).backgroundColor);
  const of = c => (Math.max(light(c), ground) + 0.05) / (Math.min(light(c), ground) + 0.05);
  const texts = [...document.querySelectorAll("section *")].filter(e => e.tagName != "title");
  return Math.min(...texts.map(e => of(e instanceof SVGTextElement ? getComputedStyle(e).fill
    : getComputedStyle(e).color)));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 800, 390, 360])
def test_a_browser_shows_it_without_errors_overflow_or_overlaps(html, chromium, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    told = []
    shown = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown.on("console", lambda message: told.append(message.text))
    shown.on("pageerror", lambda error: told.append(str(error)))
    shown.on("request", lambda request: told.append(request.url) if "http" in request.url[:5] else None)
    shown.goto(file.as_uri())
    assert told == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.evaluate(OVERLAPS) == []
    assert shown.evaluate(OUTSIDE) == []
    assert shown.evaluate(SMALLEST) >= 9.5
    assert shown.evaluate(CONTRAST) >= 4.5
    assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    shown.close()


def test_long_names_do_not_break_it(large_report, chromium, tmp_path):
    long = replace(
        large_report,
        rows=tuple(replace(row, name=f"a/rather/long/path/of/{row.name}") for row in large_report.rows),
    )
    file = tmp_path / "report.html"
    file.write_text(page(long, {}), encoding="utf-8")
    for width in (1200, 360):
        shown = chromium.new_page(viewport={"width": width, "height": 900})
        shown.goto(file.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.evaluate(OVERLAPS) == []
        assert shown.evaluate(OUTSIDE) == []
        shown.close()
