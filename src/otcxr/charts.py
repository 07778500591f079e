"""Charts as inline SVG with a transparent ground and mid-grey text, readable in light and dark and on paper.

Colours are Okabe and Ito's, told apart by all kinds of colour vision; curves that others are compared with are dashed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["efficiency_chart", "line_chart", "reliability_chart"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("o", "^", "D", "v")  # a colour comes again with another mark
_INK, _LINE = "#808080", "#a0a0a0"


@contextmanager
def _svg(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; afterwards the list holds the SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # names of findings and methods may hold any sign: no mathematics in a text
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "otcxr", "text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_LINE)
        out: list[str] = []
        yield axes, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    out.append(text[text.index("<svg") :])


def line_chart(
    series: Sequence[tuple[str, Sequence[int], Sequence[float | None]]],
    dashed: Collection[str] = (),
    bands: Mapping[str, Sequence[tuple[float | None, float | None]]] | None = None,
) -> str:
    """Draw curves over training steps.

    Args:
        series: Label, steps and values of each curve; values that are absent or not finite are left out.
        dashed: Labels of curves that others are compared with.
        bands: Lower and upper bounds at the same steps, by label.
    """
    with _svg(4.2, 2.5) as (axes, out):
        for (label, steps, values), colour in zip(series, _COLOURS, strict=False):
            points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
            if points:
                style = "--" if label in dashed else "-"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.5)
            bounds = zip(steps, (bands or {}).get(label, ()), strict=False)
            known = [(s, low, high) for s, (low, high) in bounds if low is not None and high is not None]
            if known:
                at, lows, highs = zip(*known, strict=True)
                axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("step", color=_INK, fontsize=9)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return out[0]


def efficiency_chart(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], measure: str, dashed: Collection[str] = ()
) -> str:
    """Draw a measure over the share of labels that was spent, with intervals.

    Args:
        curves: By name, (share, estimate {value, low, high}) each; what is not estimable is left out.
        measure: What the vertical axis says.
        dashed: Names of curves that others are compared with.
    """
    many = len(curves) > 6  # then only what others are compared with, and the first, show their intervals
    with _svg(*((7.4, 4.4) if many else (4.6, 2.9))) as (axes, out):
        shares = sorted({share for points in curves.values() for share, _ in points})
        for place, (name, points) in enumerate(curves.items()):
            known = [(share, e) for share, e in points if e["value"] is not None]
            if not known:
                continue
            colour = _COLOURS[place % len(_COLOURS)]
            # side by side, so that intervals do not hide each other
            step = 1.015 if many else 1.06
            x = [share * step ** (place - (len(curves) - 1) / 2) for share, _ in known]
            y = [e["value"] for _, e in known]
            reach = [[max(v - e["low"], 0) for v, (_, e) in zip(y, known, strict=True)],
                     [max(e["high"] - v, 0) for v, (_, e) in zip(y, known, strict=True)]]  # fmt: skip
            shown = not many or place == 0 or name in dashed
            style = "s--" if name in dashed else f"{_MARKS[place // len(_COLOURS) % len(_MARKS)]}-"
            axes.errorbar(x, y, yerr=reach if shown else None, fmt=style, color=colour, label=name, markersize=4,
                          linewidth=2.2 if place == 0 else 1.4, capsize=2.5, elinewidth=1.1)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
        axes.minorticks_off()
        axes.set_xlabel("labels", color=_INK, fontsize=9)
        axes.set_ylabel(measure, color=_INK, fontsize=9)
        if many:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
        elif len(curves) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return out[0]


def reliability_chart(bins: Sequence[Mapping[str, Any]]) -> str:
    """Draw the share of positive images over the probability they were given; the dashed line is perfect.

    Args:
        bins: {images, probability, observed} each.
    """
    with _svg(2.5, 2.4) as (axes, out):
        top = min(1.0, 1.1 * max([*(b["probability"] for b in bins), *(b["observed"] for b in bins), 0.05]))
        axes.plot([0, top], [0, top], "--", color=_COLOURS[3], linewidth=1.2)
        x, y = ([b[name] for b in bins] for name in ("probability", "observed"))
        axes.plot(x, y, "o-", color=_COLOURS[0], markersize=3.5, linewidth=1.4)
        axes.set(xlim=(0, top), ylim=(0, top))
        axes.set_xlabel("said", color=_INK, fontsize=8)
        axes.set_ylabel("was", color=_INK, fontsize=8)
    return out[0]
