"""The style sheet: quiet, light and dark, with colours that the colour-blind can tell apart."""

from __future__ import annotations

__all__ = ["STYLE"]

# The hues are Okabe and Ito's (2008), with a lightness that reads on each background.
_LIGHT = {
    "page": "#faf9f7",
    "card": "#ffffff",
    "ink": "#1d2125",
    "soft": "#5a6169",
    "edge": "#e4e2dd",
    "grid": "#ebe9e4",
    "accent": "#0b5c94",
    "c0": "#0072b2",
    "c1": "#c65400",
    "c2": "#00835f",
    "c3": "#a8528a",
    "c4": "#8a6d00",
    "c5": "#2f8fc4",
    "random": "#8b9097",
    "none": "#23282d",
    "torch": "#7a4fc0",
    "s0": "#c9d3dc",
    "s1": "#2f7fb8",
    "s2": "#e08a1e",
    "s3": "#b8a2cf",
    "s4": "#17876a",
    "s5": "#dcdad5",
}
_DARK = {
    "page": "#14171a",
    "card": "#1b1f23",
    "ink": "#e7e9eb",
    "soft": "#9aa3ab",
    "edge": "#2b3137",
    "grid": "#272c32",
    "accent": "#6bb7e8",
    "c0": "#58b0ea",
    "c1": "#f08a45",
    "c2": "#2fc79c",
    "c3": "#dc8fc2",
    "c4": "#e2c044",
    "c5": "#93d2f5",
    "random": "#8f969d",
    "none": "#f2f3f4",
    "torch": "#b497ee",
    "s0": "#56636f",
    "s1": "#4a9ad6",
    "s2": "#e8a04a",
    "s3": "#a48fc0",
    "s4": "#35b08c",
    "s5": "#444a50",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _series() -> str:
    """A class for each colour of a method, with one for lines, marks and texts."""
    names = {f"c{i}": f"c{i}" for i in range(6)}
    names |= {"c-random": "random", "c-none": "none", "c-torch": "torch", "untold": "random", "plain": "soft"}
    lines = []
    for name, colour in names.items():
        lines.append(f".mark.{name}{{fill:var(--{colour})}}")
        lines.append(f".line.{name},.whisker.{name},.interval.{name}{{stroke:var(--{colour})}}")
        lines.append(f"text.{name}-text{{fill:var(--{colour})}}")
    lines += [f".bar.s{i}{{fill:var(--s{i})}}.mark.s{i}{{fill:var(--s{i})}}" for i in range(6)]
    return "\n".join(lines)


STYLE = f"""
:root{{color-scheme:light dark;{_variables(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}}
main{{max-width:960px;margin:0 auto;padding:40px 20px 64px}}
h1{{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px}}
h2{{font-size:19px;line-height:1.3;margin:0 0 4px}}
p{{margin:0 0 12px}}
.soft,figcaption,.legend,summary{{color:var(--soft)}}
.soft{{font-size:14px}}
section{{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:22px 20px;
margin:22px 0}}
section>p.later{{margin-top:26px}}
section>p{{font-size:14.5px;color:var(--soft);max-width:74ch}}
.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:24px 0}}
.fact{{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 18px}}
.fact b{{display:block;font-size:27px;line-height:1.2;letter-spacing:-.02em;color:var(--accent)}}
.fact span{{display:block;font-size:13.5px;line-height:1.45;color:var(--soft);overflow-wrap:anywhere}}
ul.said{{margin:0;padding-left:1.15em;font-size:15px}}
ul.said li{{margin:5px 0;overflow-wrap:anywhere}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0;padding:0;font-size:13.5px}}
.legend li{{display:flex;align-items:center;gap:6px}}
.swatch{{width:14px;height:14px;flex:none}}
svg{{display:block;max-width:100%;height:auto}}
svg.narrow{{display:none}}
svg text{{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink)}}
svg text.tick,svg text.axis{{fill:var(--soft)}}
svg text.number{{font-weight:700}}
.grid{{stroke:var(--grid);stroke-width:1}}
.unit{{stroke:var(--soft);stroke-width:1.5}}
.mark{{stroke:var(--card);stroke-width:1}}
.bar{{stroke:var(--card);stroke-width:.6}}
.line,.front{{fill:none;stroke-width:2;stroke-linejoin:round}}
.front{{stroke:var(--accent);stroke-width:1.5;opacity:.75}}
.ring{{fill:none;stroke:var(--accent);stroke-width:1.5}}
.whisker{{stroke-width:1;opacity:.4}}
.interval{{stroke-width:2.5;opacity:.75}}
.dash1{{stroke-dasharray:7 4}}
.dash2{{stroke-dasharray:2 4}}
{_series()}
ol.front-list{{margin:10px 0 0;padding-left:1.6em;font-size:14px}}
ol.front-list li::marker{{font-weight:700;color:var(--accent)}}
details{{margin-top:12px;font-size:13.5px}}
summary{{cursor:pointer}}
.scroll{{overflow-x:auto;-webkit-overflow-scrolling:touch;margin-top:10px}}
table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;white-space:nowrap}}
th,td{{padding:5px 11px 5px 0;text-align:right;border-bottom:1px solid var(--edge)}}
th{{font-weight:600;color:var(--soft);vertical-align:bottom}}
th:first-child,td:first-child{{text-align:left}}
.gallery{{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:16px 14px;
margin-top:14px}}
.gallery figure{{margin:0}}
.gallery img{{display:block;width:100%;height:auto;border-radius:6px}}
figcaption{{font-size:13px;line-height:1.4;margin-top:5px}}
figcaption b{{display:block;color:var(--ink);font-weight:600}}
dl{{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:6px 18px;margin:8px 0 0;
font-size:14px}}
dt{{color:var(--soft)}}
dd{{margin:0;overflow-wrap:anywhere}}
code{{font-size:.92em;overflow-wrap:anywhere}}
@media (max-width:760px){{
main{{padding:24px 12px 48px}}
h1{{font-size:24px}}
section{{padding:16px 12px}}
svg.wide{{display:none}}
svg.narrow{{display:block;margin:0 auto}}
.facts{{grid-template-columns:1fr 1fr;gap:10px}}
.fact{{padding:12px}}
.fact b{{font-size:21px}}
.gallery{{grid-template-columns:1fr 1fr}}
}}
@media print{{section,.fact{{break-inside:avoid}}}}
"""
