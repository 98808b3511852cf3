"""The command line: `visprune VERB`, and `visprune-VERB` for each verb.

A verb is one file in `commands/` and one line in `VERBS`. Those files import heavy packages inside their
functions, and only the verb that was asked for is imported at all, so `--help` comes at once. What goes
wrong on purpose is printed as two lines, what and what to do, and ends with exit code 2.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import typer

from visprune.errors import VispruneError
from visprune.version import __version__

__all__ = ["VERBS", "main", "run_command"]

VERBS = {
    "export": "visprune.commands.export:export",
    "fit": "visprune.commands.fit:fit",
    "quantize": "visprune.commands.quantize:quantize",
    "build": "visprune.commands.build:build",
    "run": "visprune.commands.run:run",
    "chat": "visprune.commands.chat:chat",
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

_CTRL_C = 130  # what Typer makes of it, where that is not an Abort
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_HINTS = {
    errno.ENOSPC: "Free some space, and run it again.",
    errno.EDQUOT: "Free some space, and run it again.",
    errno.EACCES: "Choose a place that you may read and write.",
    errno.EPERM: "Choose a place that you may read and write.",
    errno.EROFS: "Choose a place that you may read and write.",
}


def main() -> NoReturn:
    """`visprune`."""
    sys.exit(run_command(None, sys.argv[1:]))


def export_main() -> NoReturn:
    """`visprune-export`."""
    sys.exit(run_command("export", sys.argv[1:]))


def fit_main() -> NoReturn:
    """`visprune-fit`."""
    sys.exit(run_command("fit", sys.argv[1:]))


def quantize_main() -> NoReturn:
    """`visprune-quantize`."""
    sys.exit(run_command("quantize", sys.argv[1:]))


def build_main() -> NoReturn:
    """`visprune-build`."""
    sys.exit(run_command("build", sys.argv[1:]))


def run_main() -> NoReturn:
    """`visprune-run`."""
    sys.exit(run_command("run", sys.argv[1:]))


def chat_main() -> NoReturn:
    """`visprune-chat`."""
    sys.exit(run_command("chat", sys.argv[1:]))


def bench_main() -> NoReturn:
    """`visprune-bench`."""
    sys.exit(run_command("bench", sys.argv[1:]))


def eval_main() -> NoReturn:
    """`visprune-eval`."""
    sys.exit(run_command("eval", sys.argv[1:]))


def plan_main() -> NoReturn:
    """`visprune-plan`."""
    sys.exit(run_command("plan", sys.argv[1:]))


def methods_main() -> NoReturn:
    """`visprune-methods`."""
    sys.exit(run_command("methods", sys.argv[1:]))


def inspect_main() -> NoReturn:
    """`visprune-inspect`."""
    sys.exit(run_command("inspect", sys.argv[1:]))


def doctor_main() -> NoReturn:
    """`visprune-doctor`."""
    sys.exit(run_command("doctor", sys.argv[1:]))


def run_command(verb: str | None, arguments: Sequence[str]) -> int:
    """Run a command line to its end.

    Args:
        verb: The verb of a `visprune-VERB`, or None where the arguments name it.
        arguments: Without the program's name.

    Returns:
        The exit code: 0; 2 for what the user can put right; 130 for Ctrl-C, and likewise 128 and its number
        for another signal that ends a program; 141 where the reader of the output went away.
    """
    # What libraries are going to change is not for those who run a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of the answer should not end the answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    program = f"visprune-{verb}" if verb else "visprune"
    try:
        command = typer.main.get_command(_alias(verb) if verb else _umbrella(arguments))
        with _stoppable():
            result = command.main(list(arguments), prog_name=program, standalone_mode=False)
        print(end="", flush=True)  # unlike `sys.stdout.flush`, where that was closed too
    except VispruneError as error:
        return _fail(error.what, error.hint)
    except _ClickException as error:
        return _fail(_usage(error), f"See: {_path(error, program)} --help")
    except (KeyboardInterrupt, typer.Abort):
        return _stop(signal.SIGINT)
    except _StoppedBy as stopped:
        return _stop(stopped.signal)
    except (
        BrokenPipeError,
        SystemExit,
    ):  # Typer turns the former into the latter, and raises it for nothing else
        # Python flushes once more at exit, and must not find the broken pipe then.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        # What a package in C makes of a signal that came while it was imported.
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
    """A signal came that ends a program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have a signal raise, as Ctrl-C does: a program that just ends leaves half of its work behind."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _StoppedBy(number)

    # A signal that is ignored stays so, as under nohup; and only the main thread may ask for any.
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
    """What click says of a mistyped command line, as one sentence."""
    text = " ".join(str(error.format_message()).split())
    return text if text.endswith((".", "?", ")")) else f"{text}."


def _path(error: Any, program: str) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context else program


def _settings() -> dict[str, Any]:
    # Typer's own tracebacks print local variables, which may be gigabytes of weights.
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
