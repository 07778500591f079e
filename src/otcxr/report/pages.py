"""Templates to pages that load nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from otcxr.report.words import MEASURE_NAMES
from otcxr.version import __version__

__all__ = ["bounds", "render", "study_interval"]


def render(template: str, **facts: Any) -> str:
    """Fill a template of the package; everything that it is given is escaped unless it is markup already."""
    from jinja2 import Environment, FunctionLoader

    folder = resources.files("otcxr").joinpath("templates")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text()),
    )  # fmt: skip
    environment.filters |= {
        "interval": _interval,
        "study_interval": study_interval,
        "json": _json,
        "bounds": bounds,
        "p_value": lambda p: "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "measure": lambda name: MEASURE_NAMES.get(name, name),
    }
    return environment.get_template(template).render(
        version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **facts
    )


def _json(value: Any) -> Any:
    """JSON inside a page: no text of it can end the element that holds it."""
    from markupsafe import Markup

    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate as text; says so where there is none."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " †" if estimate.get("caution") else ""
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:{sign}.3f}{mark}"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"


def study_interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate of a study as text; marked as ``MARKS`` says."""
    return _interval(estimate, sign) + (" ‡" if estimate.get("seed_freedom") == 1 else "")


def bounds(estimate: Mapping[str, Any], sign: str = "") -> str:
    """The interval alone."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " †" if estimate.get("caution") else ""
    return f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"
