"""What benchmarks share: the name of the machine, and tables put between the marks of a page written by hand."""

from __future__ import annotations

from pathlib import Path

from otcxr.files import write_atomic

__all__ = ["embed", "machine"]


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


def machine() -> str:
    """The processor's name, "unknown" where the system does not tell."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
