"""The entry point of ``dpfa``: its sub-commands, and what a user sees when something is wrong.

A sub-command is one module with one function, registered below. Those modules are imported here, so at
their top they may import no more than typer, ``core`` and the standard library; what they call they import
when they run. That keeps ``dpfa --help`` quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from dp_flash_attention.cli.account import account
from dp_flash_attention.cli.certificate import certificate
from dp_flash_attention.cli.train import train
from dp_flash_attention.cli.verify import verify
from dp_flash_attention.core.errors import DPFlashAttentionError

USAGE_ERROR = 2
INTERNAL_ERROR = 70
INTERRUPTED = 130

app = typer.Typer(
    name="dpfa",
    help="Train transformers with differential privacy, and account for what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train)
app.command("account")(account)
app.add_typer(certificate, name="certificate")
app.command("verify")(verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpfa {version('dp-flash-attention')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="On an error, show where in the program it arose.")
    ] = False,
) -> None:
    """Takes the options that stand before a sub-command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``dpfa`` and ends the process.

    Exit codes: 0 done; 1 a check of ``dpfa verify`` or ``dpfa certificate`` fails; 2 the input, the disk or the directory
    does not allow it; 70 a bug of ours; 130 interrupted. Every failure is one line on standard error.

    Args:
        arguments: What follows ``dpfa`` on the command line; taken from ``sys.argv`` if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in given:
        sys.exit(_exit_code(app(given, prog_name="dpfa", standalone_mode=False)))
    try:
        code = _exit_code(app(given, prog_name="dpfa", standalone_mode=False))
    except typer.Abort:
        code = _fail("stopped before anything was done", INTERRUPTED)
    except BrokenPipeError:
        code = _silence_closed_pipe()
    except DPFlashAttentionError as error:
        code = _fail(str(error), USAGE_ERROR)
    except OSError as error:
        code = _fail(_describe(error), USAGE_ERROR)
    except Exception as error:
        code = _fail_unforeseen(error)
    sys.exit(code)


def _exit_code(result: object) -> int:
    # Outside its standalone mode typer returns the code of an Exit, or what the sub-command returned.
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    typer.echo(f"dpfa: error: {' '.join(message.split())}", err=True)
    return code


def _fail_unforeseen(error: Exception) -> int:
    # typer's own complaints about the command line; it does not export their common base class.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        complaint = str(format_message()).rstrip(".")
        stop = "" if complaint.endswith("?") else "."
        return _fail(f"{complaint}{stop} Run `dpfa --help` to see what there is.", USAGE_ERROR)
    found = f"{type(error).__name__}: {error}".rstrip(".")
    return _fail(
        f"a bug in dpfa: {found}. Run `dpfa --traceback ...` and report what it shows.", INTERNAL_ERROR
    )


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    where = f" {error.filename!r}" if error.filename is not None else ""
    return f"cannot use{where}: {reason}. Free some space or choose a path that can be used."


def _silence_closed_pipe() -> int:
    # The reader of our output went away (`dpfa ... | head`). Without this Python complains at shut-down.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
