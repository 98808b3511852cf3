"""The report as one HTML file, which needs no network, no script and no font but the reader's own.

`document` collects the content and renders `templates/` with it. `figures` puts each figure together: its
legend, its drawing as inline SVG (`bars` and `points`, on a canvas of `svg`), once for wide screens and once
for narrow ones, and its numbers as a table (`tables`).
"""

from __future__ import annotations

from visprune.bench.report.page.document import page

__all__ = ["page"]
