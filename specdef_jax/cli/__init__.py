"""The command `specdef`: exit code 0 ok, 1 a certificate failed, 2 bad input, 130 interrupted.

It needs the extra `cli`; this file does not, so that it can say so.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import jax

from specdef_jax.errors import SpecDefError

log = logging.getLogger(__name__)

_EXTRA = {"tyro", "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; None takes the arguments of the process."""
    try:
        from specdef_jax.cli.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        return _fail(f"the command needs {error.name}; install it with: pip install 'specdef_jax[cli]'")
    if argv is None:
        _configure_process()
    try:
        with jax.enable_x64(True):  # so that a float64 tensor stays float64
            return run(argv)
    except SpecDefError as error:
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        code = _fail("interrupted; no half-written output was left behind", 130)
        if argv is None:
            # Files are whole at any moment. A thread inside XLA's compiler may still run, and taking the
            # interpreter down under it crashes now and then, so the process ends here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except SystemExit as stop:  # the parser's, after it has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0


def _configure_process() -> None:
    """Log warnings to stderr, and keep from it what libraries add to an error told in one line."""
    logging.basicConfig(level=logging.WARNING, format="specdef: %(levelname)s: %(message)s")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When a read fails, Orbax closes its event loop on the other reads, whose threads then complain here.
    sys.unraisablehook = lambda unraisable: log.debug("unraisable: %r", unraisable.exc_value)


def _fail(message: str, code: int = 2) -> int:
    print(f"specdef: {message}", file=sys.stderr)
    return code
