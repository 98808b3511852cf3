"""The page: what was found first, then the figures, then how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from visprune.bench.report.figures import STAGES, milliseconds, stages, times, tokens
from visprune.bench.report.page.bars import STAGE_COLOURS, relative, stacked
from visprune.bench.report.page.facts import facts, method
from visprune.bench.report.page.points import front, frontier, layers, pruned_inside, tokens_and_time
from visprune.bench.report.page.style import STYLE
from visprune.bench.report.page.svg import NARROW, WIDE, Canvas
from visprune.bench.report.page.symbols import Looks, legend, swatch
from visprune.bench.report.page.tables import TIMES, Column, costs, html_table
from visprune.bench.report.report import BenchReport, Row
from visprune.bench.report.table import verdicts
from visprune.runtime.vision.sources import display_name

__all__ = ["page"]


def page(report: BenchReport, pictures: Mapping[str, Sequence[str]]) -> str:
    """The whole file.

    Args:
        report: What was found.
        pictures: For each row the overlays of the images, JPEG in base64.
    """
    looks = Looks.of(report)
    models = ", ".join(dict.fromkeys(row.model for row in report.rows))
    body = [
        f"<h1>Visual-token pruning of {escape(models)}</h1>",
        f'<p class="soft">{escape(_under_title(report))}</p>',
        facts(report),
        _section("What can be said", _said(report)),
        _frontier(report, looks),
        _relative(report, looks),
        _stages(report),
        _tokens_and_time(report, looks),
        _layers(report, looks),
        _gallery(report, pictures),
        _section("All figures", _tables(report)),
        _section("How it was measured", method(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(models)}: visual-token pruning</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _under_title(report: BenchReport) -> str:
    machine = report.machine
    where = machine.gpu or machine.processor
    return f"{len(report.rows)} rows on {where}, {report.work.threads} threads · {report.created[:10]}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _figure(draw: Callable[[float], Canvas]) -> str:
    """A drawing for each width, of which the style sheet shows one."""
    return draw(WIDE).svg("wide") + draw(NARROW).svg("narrow")


def _numbers(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    return f"<details><summary>The numbers</summary>{html_table(columns, rows)}</details>"


def _said(report: BenchReport) -> str:
    lines = verdicts(report)
    return (
        '<ul class="said">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
    )


def _frontier(report: BenchReport, looks: Looks) -> str:
    rows = [row for row in report.rows if row.accuracy]
    if not rows:
        return ""
    known = next(row.accuracy for row in rows if row.accuracy)
    best = "".join(
        f"<li>{escape(row.name)}: {milliseconds(row.first_token.median)} ms, {row.accuracy.share:.1%}</li>"
        for row in front(rows)
        if row.accuracy
    )
    return _section(
        "Accuracy by latency",
        "<p>Up and to the left is better. The numbered points are the Pareto front: no other row is both "
        f"faster and more often right. Bars are 95% intervals of accuracy ({escape(known.questions)}), and "
        f"10th to 90th percentiles of time.</p>{looks.legend(rows)}"
        + _figure(lambda width: frontier(rows, looks, width))
        + f'<ol class="front-list">{best}</ol>'
        + _numbers((TIMES["first"], TIMES["p10"], TIMES["p90"], TIMES["right"]), rows),
    )


def _relative(report: BenchReport, looks: Looks) -> str:
    rows = [row for row in report.rows if row.role != "pytorch" and report.unpruned(row) not in (None, row)]
    if not rows:
        return ""
    by = Column("by unpruned", lambda row: times(row.against(report.unpruned(row) or row)))
    return _section(
        "Faster than unpruned?",
        "<p>Time to the first token by that of the unpruned row of the same model and precision: below 1 "
        "is faster. Bars are 99% intervals over the rounds; where one holds 1, or the difference is below "
        "2%, no difference can be told, and the row is grey.</p>"
        + looks.legend(rows)
        + _figure(lambda width: relative(report, rows, looks, width))
        + _numbers((by,), rows),
    )


def _stages(report: BenchReport) -> str:
    rows = list(report.rows)
    columns = [_time_in(name) for name in STAGES]
    return _section(
        "Where the time goes",
        "<p>Medians of the stages up to the first token. Prune is the choice of tokens and the projector; "
        "the prefill is the LLM reading the prompt, all segments of it.</p>"
        + legend([(name, swatch(STAGE_COLOURS[name], 1)) for name in STAGES])
        + _figure(lambda width: stacked(rows, width))
        + _numbers(columns, rows),
    )


def _time_in(stage: str) -> Column:
    return Column(f"{stage}, ms", lambda row: milliseconds(stages(row)[stage]))


def _tokens_and_time(report: BenchReport, looks: Looks) -> str:
    rows = [row for row in report.rows if row.role != "pytorch"]
    if len({row.kept for row in rows}) < 2:
        return ""
    return _section(
        "Latency by kept tokens",
        "<p>Time to the first token by the visual tokens kept, each with its 10th to 90th percentile. Where "
        "a line is flat, what does not depend on pruning takes the time, such as the vision tower.</p>"
        + looks.legend(rows)
        + _figure(lambda width: tokens_and_time(rows, looks, width))
        + _numbers((TIMES["tokens"], TIMES["first"], TIMES["p10"], TIMES["p90"]), rows),
    )


def _layers(report: BenchReport, looks: Looks) -> str:
    rows = pruned_inside(report.rows)
    if not rows:
        return ""
    each = Column(
        "visual tokens that enter layers 0, 1, ...", lambda row: ", ".join(map(str, row.layer_tokens))
    )
    return _section(
        "Tokens by layer",
        "<p>Methods inside the LLM drop tokens on the way: visual tokens that enter each layer. All other "
        "rows have one number in all layers. The same scheme in another precision is left out.</p>"
        + _figure(lambda width: layers(rows, looks, width))
        + _numbers((each,), rows),
    )


def _gallery(report: BenchReport, pictures: Mapping[str, Sequence[str]]) -> str:
    shown: dict[tuple[str, tuple[int, ...]], Row] = {}
    for row in report.rows:
        if pictures.get(row.name):
            shown.setdefault((row.method, row.layer_tokens), row)
    parts = []
    for index, image in enumerate(report.work.images):
        figures = [
            f'<figure><img alt="{escape(f"Image {index + 1}, patches kept by {row.name}")}" '
            f'src="data:image/jpeg;base64,{pictures[row.name][index]}">'
            f"<figcaption><b>{escape(row.name)}</b>{escape(tokens(row))} tokens</figcaption></figure>"
            for row in shown.values()
        ]
        name = display_name(image).rsplit("/", 1)[-1]
        parts.append(f'<p class="soft">{escape(name)}</p><div class="gallery">{"".join(figures)}</div>')
    if not shown:
        return ""
    return _section(
        "What is kept",
        f"<p>Patches that reach the last layer of the LLM, the others dimmed; the prompt is "
        f"“{escape(report.work.prompt)}”. A row in another precision is shown where its numbers differ.</p>"
        + "".join(parts),
    )


def _tables(report: BenchReport) -> str:
    by = Column(
        "by unpruned",
        lambda row: (
            "-" if (full := report.unpruned(row)) is None or full is row else times(row.against(full))
        ),
    )
    accuracy = [TIMES["right"]] if any(row.accuracy for row in report.rows) else []
    names = ("tokens", "first", "p90", "spread")
    columns = [
        *(TIMES[name] for name in names),
        by,
        *(TIMES[n] for n in ("later", "prefill", "decode")),
        *accuracy,
    ]
    return (
        "<p>Milliseconds; medians over the rounds.</p>"
        + html_table(columns, report.rows)
        + '<p class="later">FLOPs are of the prefill with vision tower, projector and the logits of one '
        "position; a multiply-accumulate is 2. Realised is the share of the time to the first token that is "
        "gone, by the share of the FLOPs that is gone. Memory is the largest resident set of the row's own "
        "process; cache is keys and values after the prefill.</p>" + html_table(costs(report), report.rows)
    )
