"""One HTML file of a report: it needs no network, no script and no font but those of the reader.

Figures are inline SVG, each drawn twice, for a wide and for a narrow screen, and each with its numbers as a
table. `svg` draws, one file a figure uses it, `document` puts the figures together.
"""

from __future__ import annotations

from visprune.bench.report.page.document import page

__all__ = ["page"]
