"""The command line: `visprune VERB`, and `visprune-VERB` for each verb.

A verb is one file in `commands/`, one line in `VERBS` and one in `pyproject.toml`. Those files import heavy
packages inside their functions, and only the verb that was asked for is imported, so `--help` is quick. An
error that the user can correct is printed as two lines, what is wrong and what to do, with exit code 2.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from visprune.errors import VispruneError
from visprune.optional import ignore_future_warnings
from visprune.version import __version__

__all__ = ["VERBS", "main", "run_command"]

VERBS = {
    "export": "visprune.commands.export:export",
    "fit": "visprune.commands.fit:fit",
    "quantize": "visprune.commands.quantize:quantize",
    "build": "visprune.commands.build:build",
    "run": "visprune.commands.run:run",
    "chat": "visprune.commands.chat:chat",
    "serve": "visprune.commands.serve:serve",
    "bench": "visprune.commands.bench:bench",
    "eval": "visprune.commands.evaluate:evaluate",
    "plan": "visprune.commands.plan:plan",
    "methods": "visprune.commands.methods:methods",
    "inspect": "visprune.commands.inspect:inspect",
    "doctor": "visprune.commands.doctor:doctor",
}

# Typer carries its own copy of click from some version on, so the base class of usage errors has no
# stable import path; BadParameter -> UsageError -> ClickException has been there in every version.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

_CTRL_C = 130  # Typer's result after Ctrl-C, if it does not raise Abort
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_HINTS = {
    errno.ENOSPC: "Free some space, and run it again.",
    errno.EDQUOT: "Free some space, and run it again.",
    errno.EACCES: "Choose a place that you may read and write.",
    errno.EPERM: "Choose a place that you may read and write.",
    errno.EROFS: "Choose a place that you may read and write.",
}


def main(verb: str | None = None) -> NoReturn:
    """Run `visprune`, or `visprune-VERB`, with the arguments of this process."""
    sys.exit(run_command(verb, sys.argv[1:]))


def __getattr__(name: str) -> Callable[[], NoReturn]:
    """Return the entry point of `visprune-VERB`, which `pyproject.toml` calls `VERB_main`."""
    verb, suffix, rest = name.partition("_main")
    if verb not in VERBS or not suffix or rest:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(main, verb)


def run_command(verb: str | None, arguments: Sequence[str]) -> int:
    """Run a command line.

    Args:
        verb: The verb of `visprune-VERB`; None: the arguments name it.
        arguments: The command line without the program's name.

    Returns:
        The exit code: 0 for success; 2 for an error that the user can correct; 130 for Ctrl-C, and 128 plus
        the signal's number for another signal; 141 if the reader of the output closed it.
    """
    ignore_future_warnings()
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not end an answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    program = f"visprune-{verb}" if verb else "visprune"
    try:
        command = typer.main.get_command(_alias(verb) if verb else _umbrella(arguments))
        with _stoppable():
            result = command.main(list(arguments), prog_name=program, standalone_mode=False)
        print(end="", flush=True)  # unlike `sys.stdout.flush`, this works when stdout was closed
    except VispruneError as error:
        return _fail(error.what, error.hint)
    except _ClickException as error:
        return _fail(_usage(error), f"See: {_path(error, program)} --help")
    except (KeyboardInterrupt, typer.Abort):
        return _stop(signal.SIGINT)
    except _StoppedBy as stopped:
        return _stop(stopped.signal)
    except (BrokenPipeError, SystemExit):
        # Typer turns the first into the second, which it raises for nothing else. Python flushes stdout once
        # more at exit, so the broken pipe is replaced.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        # A package in C turns a signal during its import into an ImportError.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, (KeyboardInterrupt, _StoppedBy)):
            return _stop(getattr(cause, "signal", signal.SIGINT))
        raise
    except MemoryError:
        return _fail("There is not enough memory.", "Take a smaller model, or close other programs.")
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror}{where}.", _HINTS.get(error.errno, "Check the path and the disk."))
    code = result if isinstance(result, int) else 0
    return _stop(signal.SIGINT) if code == _CTRL_C else code


class _StoppedBy(BaseException):
    """Raised when a signal comes that ends a program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make signals raise an exception, as Ctrl-C does, so that unfinished files are removed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _StoppedBy(number)

    # An ignored signal stays ignored, as under nohup. Only the main thread may set a handler.
    in_main = threading.current_thread() is threading.main_thread()
    ours = [s for s in _SIGNALS if in_main and signal.getsignal(s) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int) -> int:
    with suppress(OSError):
        print("Stopped.", file=sys.stderr)
    return 128 + number


def _fail(what: str, hint: str) -> int:
    with suppress(OSError):
        print(f"error: {what}\n  {hint}", file=sys.stderr)
    return 2


def _usage(error: Any) -> str:
    """Return click's message about a mistyped command line as one sentence."""
    text = " ".join(str(error.format_message()).split())
    return text if text.endswith((".", "?", ")")) else f"{text}."


def _path(error: Any, program: str) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context else program


def _settings() -> dict[str, Any]:
    # Typer's tracebacks print local variables, which may be gigabytes of weights.
    return {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}


def _load(verb: str) -> Callable[..., None]:
    module, _, name = VERBS[verb].partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    return function


def _alias(verb: str) -> typer.Typer:
    app = typer.Typer(**_settings())
    app.command(verb)(_load(verb))
    return app


def _umbrella(arguments: Sequence[str]) -> typer.Typer:
    app = typer.Typer(**_settings())
    app.callback(invoke_without_command=True)(_visprune)
    chosen = [arguments[0]] if arguments and arguments[0] in VERBS else list(VERBS)
    for verb in chosen:
        app.command(verb)(_load(verb))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"visprune {__version__}")
        raise typer.Exit


def _visprune(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Export LLaVA models with visual-token pruning to ONNX, and run them on small devices."""
    if context.invoked_subcommand is None:
        print(context.get_help())
