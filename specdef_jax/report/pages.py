"""One self-contained offline HTML file from a template of this room."""

from __future__ import annotations

from typing import Any

from specdef_jax.report import svg


def rendered(template: str, **values: Any) -> str:
    """Return a page that needs no network and runs no script.

    Args:
      template: name of a file of this room.
      values: what it speaks of; `markup` of figures goes in as it is, all else is escaped.

    Raises:
      MissingExtra: jinja2, of the extra `cli`, is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise svg.missing("jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("specdef_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colours=svg.COLOURS, **values)


def markup(text: str) -> Any:
    """Mark text that is safe HTML: made by matplotlib from numbers and escaped labels."""
    from markupsafe import Markup

    return Markup(text)
