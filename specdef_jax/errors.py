"""Every error this package raises for bad input, under one base class.

A message names what is wrong, which value, which path, and what to do instead.
"""


class SpecDefError(Exception):
    """Base of every error that specdef_jax raises for bad input."""


class SpecError(SpecDefError, ValueError):
    """A field of a SpecDef (alpha, k, basis, side, directions, tol, budget) has no meaning."""


class BudgetError(SpecDefError, ValueError):
    """The alpha asked for costs more accuracy, or range, than the storage dtype has."""


class SelectionError(SpecDefError, ValueError):
    """A selector matched nothing, or matched leaves that cannot be deformed."""


class LeafError(SpecDefError, ValueError):
    """A selected leaf cannot be deformed: its dtype, shape or values do not allow it."""


class StructureError(SpecDefError, ValueError):
    """Two trees that must have the same structure, shapes or dtypes do not."""


class LayeredUnsupported(SpecDefError, NotImplementedError):
    """A primitive was applied to a deformed weight in a way that has no layered form.

    Attributes:
      primitive: name of the JAX primitive.
      path: where the deformed leaf stands in the parameters.
      remedy: what to do instead.
    """

    def __init__(self, primitive: str, path: str, remedy: str) -> None:
        self.primitive, self.path, self.remedy = primitive, path, remedy
        super().__init__(
            f"layered: primitive '{primitive}' on the deformed weight '{path}' has no layered form. {remedy}"
        )


class ProblemError(SpecDefError, ValueError):
    """A loss, a target or an argument of a measurement cannot be used as asked."""


class ConfigError(SpecDefError, ValueError):
    """A model's config asks for an architecture that is not implemented, or lacks a field."""


class FileError(SpecDefError, OSError):
    """A file or directory is missing, corrupt, or cannot be written."""


class MissingExtra(SpecDefError, ImportError):
    """An optional dependency is not installed; the message says how to install it."""
