"""Runs one command and turns every failure into a sentence and an exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import typer
from typer.exceptions import TyperException

import faceteer
from faceteer.cli import exit_statuses
from faceteer.cli.commands import app

# Set by the script of `faceteer --show-completion`.
_COMPLETE = "_FACETEER_COMPLETE"


def run(arguments: Sequence[str]) -> int:
    """The exit status of ``faceteer ARGUMENTS``."""
    command = typer.main.get_command(app)
    if _COMPLETE in os.environ:
        # Asked by the shell's completion script; this answers and exits.
        command.main([], prog_name="faceteer")
    try:
        # Not command.main(), which has words and statuses of its own for an interrupt and a closed pipe.
        with _insisting_on_interrupts(), command.make_context("faceteer", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except TyperException as error:
        words = " ".join(error.format_message().split())
        if not words:  # no command at all: the help was printed in its place
            return exit_statuses.BAD_INPUT
        return _failed(f"{words[:1].lower()}{words[1:].rstrip('.')}; see faceteer --help", exit_statuses.BAD_INPUT)
    except faceteer.FaceteerError as error:
        return _failed(_sentence(error), _status(error))
    except BrokenPipeError:
        return exit_statuses.OK
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{(error.strerror or str(error)).lower()}", exit_statuses.BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _failed("interrupted", exit_statuses.INTERRUPTED)
    except Exception as error:  # a defect of ours must not look like the user's, nor fill their terminal
        return _failed(f"unexpected {type(error).__name__}: {error}; please report it", exit_statuses.FAILED)
    return exit_statuses.OK


@contextlib.contextmanager
def _insisting_on_interrupts() -> Iterator[None]:
    """Sends an interrupt again after two seconds, as a person would, until it has ended the command.

    Python raises KeyboardInterrupt wherever it happens to be, and loses it where that is a finaliser or a callback of
    gRPC's: the picture would go on being drawn.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def interrupted(_signal: int, _frame: object) -> None:
        timers.append(threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].daemon = True
        timers[-1].start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)


def _sentence(error: faceteer.FaceteerError) -> str:
    words = " ".join(str(error).split())
    if error.request_id and isinstance(error, faceteer.InternalError) and error.request_id not in words:
        words += f" (request {error.request_id} in the server's log)"
    return words


def _status(error: faceteer.FaceteerError) -> int:
    if isinstance(error, faceteer.InvalidArgumentError):
        return exit_statuses.BAD_INPUT
    if isinstance(error, faceteer.NotFoundError):
        return exit_statuses.NOT_FOUND
    if isinstance(error, faceteer.UnavailableError):
        return exit_statuses.UNREACHABLE
    return exit_statuses.FAILED


def _failed(sentence: str, status: int) -> int:
    print(f"faceteer: {sentence}", file=sys.stderr)
    return status
