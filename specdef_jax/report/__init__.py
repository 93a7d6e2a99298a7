"""One self-contained offline HTML file from results.json."""

from typing import Any


def render(results: dict[str, Any]) -> str:
    return "<html></html>"
