"""Put generated tables between the marks of a page that is otherwise written by hand."""

from __future__ import annotations

from pathlib import Path

from otcxr.runs import write_atomic

__all__ = ["embed"]


def embed(page: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between ``<!-- begin: name -->`` and ``<!-- end: name -->``.

    Raises: ValueError: the page has no such marks.
    """
    text = page.read_text()
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{page.name} needs the lines '{begin.strip()}' and '{end}' around the table")
    before, rest = text.split(begin)
    write_atomic(page, before + begin + "\n".join(lines).strip() + "\n" + end + rest.split(end)[1])
