"""Errors as a command tells them: one line on stderr, no traceback, and an exit code."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["check_exists", "told_in_one_line"]

FAILURE = 1
INTERRUPTED = 130


def told_in_one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command: what the user can do something about ends it with exit code 1 and one line.

    Anything else is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("Interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output has gone, as in `dynconv inspect model | head`; stdout is flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILURE) from None
        except (OSError, ValueError, TypeError, ImportError) as error:
            print(f"Error: {_line(error)}", file=sys.stderr)
            raise typer.Exit(FAILURE) from None

    return wrapped


def check_exists(name_or_path: str, *enough: str) -> None:
    """A mistyped path must not be looked up on the Hub, whose answer would speak of tokens and repositories.

    As `dynconv_hf.checkpoint_files.check_is_there`, which would take seconds to import. A directory must also hold a
    config, of whatever it is, or one of the files that are `enough`.
    """
    if os.path.isdir(name_or_path):
        if not any(name.endswith(("config.json", *enough)) for name in os.listdir(name_or_path)):
            raise FileNotFoundError(errno.ENOENT, "no config.json in this directory", name_or_path)
        return
    if os.path.isfile(name_or_path):
        raise NotADirectoryError(errno.ENOTDIR, "a file, not the directory of a checkpoint", name_or_path)
    is_path = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1 or "\\" in name_or_path
    if is_path:
        raise FileNotFoundError(errno.ENOENT, "no such directory", name_or_path)
    _quiet_hub()


def _quiet_hub() -> None:
    """One line is for the last attempt, which the error tells of, and not for each before it."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {os.fspath(error.filename)}"
    # The library speaks of its arguments, a command of its options.
    return " ".join(message.replace("overwrite=True", "--overwrite").split())
