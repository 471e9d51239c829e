"""What the commands share: flags parsed, user errors told in one line with exit code 2, outputs that outlive their readers."""

from __future__ import annotations

import contextlib
import errno
import logging as std_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from absl import app, flags, logging

from chroma_jax import messages, paths

USAGE_ERROR = 2
# A flag counts as that of the module which calls `path_flag`: --help lists the flags of the command.
flags.disclaim_key_flags()


class CommandError(ValueError):
    """A mistake in how a command was called."""


def fail(message: object) -> NoReturn:
    """Prints `error: message`, at most 200 characters in one line, and exits with code 2."""
    print(messages.shorten(f"error: {message}"), file=sys.stderr)
    sys.exit(USAGE_ERROR)


def told(error: BaseException) -> tuple[int, str]:
    """(exit code, what is printed) of an error that ends a command: one line if it is the user's, a traceback if it is ours."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    # With --verbosity=1 always where it came from.
    if isinstance(error, ValueError | OSError) and not logging.vlog_is_on(1):
        return USAGE_ERROR, messages.shorten(f"error: {error}")
    return 1, "".join(traceback.format_exception(error)).rstrip()


def path_flag(
    name: str,
    default: str | None,
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    *,
    remote: bool = False,
) -> None:
    """Defines a flag that takes a path (or a Hub id): a leading `~` is opened, which no shell does after `--name=`.

    `scheme://...` is refused; where `remote`, object stores that can be used (`paths.check_remote`) are not.
    """
    parser = _PathParser(remote)
    flags.DEFINE(parser, name, default, help, flag_values, flags.ArgumentSerializer())


def path_list_flag(
    name: str, default: Sequence[str] | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """`path_flag` for several paths, with commas between them."""
    serializer = flags.CsvListSerializer(",")
    flags.DEFINE(_PathListParser(), name, default, help, flag_values, serializer)


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def __init__(self, remote: bool):
        self._remote = remote

    def parse(self, argument: str) -> str:
        if self._remote:
            paths.check_remote(argument)
        elif paths.is_remote(argument):
            raise ValueError("a path of a file system is wanted here")
        return paths.expand(argument)

    def flag_type(self) -> str:
        return "path"


class _PathListParser(flags.ListParser):
    def parse(self, argument: str | Sequence[str]) -> list[str]:
        return [_PathParser(False).parse(path) for path in super().parse(argument)]

    def flag_type(self) -> str:
        return "comma separated list of paths"


class LastingOutput:
    """Standard output or error that work does not end with: `| head` closes it early, `PYTHONIOENCODING=ascii` has no letter for é.

    Characters that the encoding lacks are written as escapes. When nobody reads any more, what is written is dropped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: OSError | None = None  # why it could not be written to, the first time
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As the stream's own."""
        try:
            return self._stream.write(text)
        except OSError as e:
            self._lose(e)
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except OSError as e:
            self._lose(e)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        # Else what is still buffered fails again, at the latest when Python ends.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def keep_outputs() -> None:
    """Makes standard output and error last, those that were closed before the command began included."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # else the next file that is opened takes its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stdout, sys.stderr = LastingOutput(sys.stdout), LastingOutput(sys.stderr)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parsing; an unknown or bad flag is a one-line error, and asking for help no error at all."""
    if {"--help", "-h", "-help", "--h"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as e:
        fail(f"{e} (--help lists the flags)")
    except AttributeError as e:  # how ml_collections says so
        if "has no attribute 'get_config'" not in str(e):
            raise
        fail("--config: the file has no function get_config()")
    except SyntaxError as e:
        fail(f"--config: {e.filename} is no Python file: {e}")


def run(main: Callable[[], None]) -> None:
    """Runs a command: `main` takes no arguments and reads its flags.

    ValueError and OSError are the user's: one line, exit code 2; others are ours. A standard output that is closed early or cannot
    encode the text ends nothing: the work is done and the exit code is what it would be.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(
                f"unexpected argument {messages.shown(argv[1])}: everything is a flag, as in --name=value"
            )
        if not logging.vlog_is_on(1):
            logging.set_verbosity(logging.WARNING)  # Orbax tells its life at each load and save
        try:
            main()
            sys.stdout.flush()
        except (ValueError, OSError, KeyboardInterrupt) as e:
            code, text = told(e)
            print(text, file=sys.stderr)
            sys.exit(code)
        lost = sys.stdout.lost
        # A reader that has enough is no error; a full disk is, though what the command makes is made.
        if lost is not None and lost.errno != errno.EPIPE:
            fail(f"standard output could not be written: {lost.strerror}")

    keep_outputs()
    # absl lets JAX tell which backends a machine does not have, and how its processes meet.
    for name in ("jax._src.xla_bridge", "jax._src.distributed"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    app.run(guarded, flags_parser=parse)
