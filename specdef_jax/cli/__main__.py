"""Run the command as python -m specdef_jax.cli."""

import sys

from specdef_jax.cli import main

sys.exit(main())
