"""What the commands share: flags parsed, user errors told in one line with exit code 2."""

from __future__ import annotations

import logging as std_logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

USAGE_ERROR = 2


class CommandError(ValueError):
    """A mistake in how a command was called."""


def fail(message: object) -> None:
    """Prints `error: message` and exits with code 2."""
    print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


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
    """Runs a command: `main` takes no arguments and reads its flags. ValueError and OSError are the user's; others are ours."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: everything is a flag, as in --name=value")
        if not logging.vlog_is_on(1):
            logging.set_verbosity(logging.WARNING)  # Orbax tells its life at each load and save
        try:
            main()
        except (ValueError, OSError) as e:
            if logging.vlog_is_on(1):  # --verbosity=1: where it came from
                raise
            fail(e)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    # absl lets JAX tell which backends a machine does not have, and how its processes meet.
    for name in ("jax._src.xla_bridge", "jax._src.distributed"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    app.run(guarded, flags_parser=parse)
