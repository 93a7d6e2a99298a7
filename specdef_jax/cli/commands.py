"""The subcommands by name. A new one is a function in a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from specdef_jax.cli.attack import attack
from specdef_jax.cli.certify import certify
from specdef_jax.cli.checkpoint import verify
from specdef_jax.cli.deform import deform
from specdef_jax.cli.inspect import inspect
from specdef_jax.cli.race import run as race

COMMANDS = {
    "certify": certify,
    "deform": deform,
    "inspect": inspect,
    "verify": verify,
    "attack": attack,
    "race": race,
}
DESCRIPTION = "Deform open-weight models without changing what they compute, and certify what that does."


def run(argv: Sequence[str] | None) -> int:
    """Parse the arguments, run the command they name, return its exit code."""
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="specdef", description=DESCRIPTION, args=argv)
