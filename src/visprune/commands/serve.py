"""`visprune serve`: an OpenAI-compatible server and a page, over one or more bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visprune.commands.option_fields import with_options
from visprune.serve.options import ServeOptions

__all__ = ["serve"]


@with_options(ServeOptions)
def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Bundles that `visprune export` wrote.", show_default=False),
    ],
    *,
    options: ServeOptions,
) -> None:
    """Serve bundles: OpenAI's API at /v1, a page to ask about pictures at /, and documentation at /docs.

    Requests are answered in turn, token by token; more than --max-active wait, and more than --max-queue are
    refused. SIGTERM and Ctrl-C let running requests finish; a second signal ends the server at once.

    Example: visprune-serve llava-fopru
    """
    from visprune.optional import require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, extra="serve")
    from visprune.serve.server import serve as run

    run(bundles, options)
