"""Write the tables of settings into docs/methods/*.md, from the dataclasses of the methods.

    python benchmarks/write_settings.py            rewrite what stands between the marks
    python benchmarks/write_settings.py --check    change nothing; exit code 1 and the names of stale pages

A page belongs to a file of ``otcxr.methods``, with dashes for underscores, and holds the marks ``<!-- settings -->``
and ``<!-- /settings -->`` once each. The meaning of a setting is its entry under "Attributes" in the docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring

from otcxr.files import write_atomic
from otcxr.methods import METHODS, Method

__all__ = ["page_name", "pages", "stale", "table", "updated"]

DOCS = Path(__file__).parent.parent / "docs" / "methods"
BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"


def page_name(row: Method) -> str:
    """Name of the page of a row's class, without folder and ending."""
    return row.build.__module__.rpartition(".")[2].replace("_", "-")


def pages() -> dict[str, list[str]]:
    """The rows of METHODS that each page covers, the main one first."""
    covered: dict[str, list[str]] = {}
    for name, row in METHODS.items():
        covered.setdefault(page_name(row), []).append(name)
    return covered


def table(rows: list[str]) -> str:
    """The settings of one class: its defaults, what further rows of it change, and their defaults of views."""
    main, *controls = rows
    settings = METHODS[main].settings
    about = {p.arg_name: p.description or "" for p in parse_docstring(inspect.cleandoc(settings.__doc__ or "")).params}
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(settings):
        if not about.get(field.name):
            raise ValueError(f"{type(settings).__name__}.{field.name} has no entry under Attributes in the docstring")
        meaning = " ".join(about[field.name].split()).replace("``", "`").replace("|", "\\|")
        lines.append(f"| `method.{field.name}` | {_value(getattr(settings, field.name))} | {meaning} |")
    if controls:
        lines += ["", f"Rows with other defaults than `{main}`:", "", "| method | differs in |", "|---|---|"]
        for name in controls:
            own = METHODS[name].settings
            changed = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(settings, f.name)]
            differs = ", ".join(f"`method.{field}` {_value(getattr(own, field))}" for field in changed)
            lines.append(f"| `{name}` | {differs} |")
    lines += ["", *(_views(name, rows) for name in rows if name == main or METHODS[name].views != METHODS[main].views)]
    return "\n".join(lines) + "\n"


def _views(name: str, rows: list[str]) -> str:
    who = f"Views of `{name}`" if len(rows) == 1 else f"Views of `{name}` (and of the rows that do not say otherwise)"
    changed = METHODS[name].views
    if not changed:
        return f"{who}: the [defaults](../views.md)."
    said = ", ".join(f"`views.{field}` {_value(value)}" for field, value in changed.items())
    return f"{who}: {said}; otherwise the [defaults](../views.md)."


def _value(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(part) for part in value)}]`"
    return f"`{value}`"


def updated(text: str, rows: list[str]) -> str:
    """The text of a page with the table of today.

    Raises: ValueError: the marks are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"the lines '{BEGIN.strip()}' and '{END}' must stand there once each, in this order")
    return f"{before}{begin}{table(rows)}{end}{after}"


def stale(folder: Path = DOCS) -> dict[str, str]:
    """Pages that are missing, lack marks, or say something else than the code, and why."""
    found = {}
    for name, rows in pages().items():
        page = folder / f"{name}.md"
        if not page.is_file():
            found[name] = "there is no such page"
            continue
        try:
            if updated(page.read_text(), rows) != page.read_text():
                found[name] = "the table is not that of the code"
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is stale")
    if not parser.parse_args().check:
        for name, rows in pages().items():
            page = DOCS / f"{name}.md"
            text = page.read_text()
            try:
                new = updated(text, rows)
            except ValueError as error:
                raise ValueError(f"{page.name}: {error}") from error
            if new != text:
                write_atomic(page, new)
                print(f"written: {page.name}")
        return 0
    found = stale()
    for name, reason in found.items():
        print(f"docs/methods/{name}.md: {reason}; run 'python benchmarks/write_settings.py'", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
