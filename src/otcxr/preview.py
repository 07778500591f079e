"""A picture of what training will see: radiographs with the outlines of their views, and the views beside them.

Colours are Okabe and Ito's, safe for colour-blind readers; views are told apart by number and line style as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import read_pixels
from otcxr.data.geometry import ViewBatch
from otcxr.data.sources import open_collection
from otcxr.data.view_spec import DrawnView, GreyImage, ViewsConfig, draw_views, grey_image, view_generator
from otcxr.data.views import carry_out
from otcxr.data.views_device import device_views, request_views
from otcxr.errors import ConfigError, DataError
from otcxr.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Previewed", "caption", "draw_preview", "preview_views"]

_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#0072B2")
_NOT_VALID = (0.80, 0.47, 0.65)  # reddish purple, in no frame
_INK, _PAPER, _QUIET = "#1b2733", "#ffffff", "#5b6b7a"
# no mathematics in a caption: the name of a file may hold any sign
_CAPTION: dict[str, Any] = {"color": _INK, "fontsize": 7, "va": "top", "linespacing": 1.35, "parse_math": False}
_SIDE = 2.75  # inches of a view of views.size
_SHOWN = 640  # pixels of the longer side of a radiograph in the picture


class Previewed(NamedTuple):
    """One row of the picture: name, pixels, the drawn numbers and the views made of them."""

    name: str
    image: GreyImage
    drawn: tuple[DrawnView, ...]
    batch: ViewBatch


def preview_views(
    source: str, out: str | Path, config: ViewsConfig, *, images: int = 4, seed: int = 0,
    split: str = "train", title: str = "", progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Draw the views that training with this seed makes of a source's first radiographs in its first epoch.

    Args:
        source: READER:ARGUMENT.
        out: A file that ends in .png, or a folder for ``preview.png``.
        config: How views are drawn; ``executor`` says who makes them (the device is a CPU here).
        images: How many radiographs; those that cannot be read are passed over, and said.
        seed: Of the run.
        split: Split that is looked at, as ``data.split`` of a training; a source without splits is shown whole.
        title: What the picture says of itself; empty: source and seed.
        progress: Where to say what was passed over.
    Returns: The file.
    Raises: ConfigError: fewer than one image, a negative seed, or a file of another kind. DataError: nothing can be
        read. StorageError: the picture cannot be written.
    """
    if images < 1 or seed < 0:
        raise ConfigError(f"--images must be at least 1 and --seed at least 0, received {images} and {seed}")
    out = Path(out)
    if out.suffix.lower() not in ("", ".png") and not out.is_dir():
        raise ConfigError(f"--out must end in .png or name a folder, received {out}; write {out.with_suffix('.png')}")
    path = out if out.suffix.lower() == ".png" and not out.is_dir() else out / "preview.png"
    collection = open_collection(source)
    if collection.has_splits:
        collection = collection.split(split)
    rows: list[Previewed] = []
    for index, record in enumerate(collection.records):
        if len(rows) == images:
            break
        try:
            image = grey_image(read_pixels(record.image))
        except DataError as error:
            (progress or SilentProgress()).say(f"passed over {record.name}: {error}")
            continue
        shape: tuple[int, int] = image.pixels.shape
        drawn = draw_views(shape, image.valid, config, view_generator(seed, 0, index))
        on_device = config.executor == "device"
        batch = device_views(request_views(image, drawn)) if on_device else carry_out(image, drawn)
        rows.append(Previewed(record.name, image, drawn, batch))
    if not rows:
        raise DataError(f"{source} has no radiograph that can be read; list what is wrong: otcxr data inspect {source}")
    figure = draw_preview(rows, title or f"{source}, seed {seed}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
    return path


def draw_preview(rows: Sequence[Previewed], title: str) -> Figure:
    """One row a radiograph: itself with the outlines of its views, then every view with what was drawn for it.

    Pixels that are not valid are tinted.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sizes = [view.size for view in rows[0].drawn]
    widths = [max(sizes), *(max(size, 0.62 * max(sizes)) for size in sizes)]
    wide = _SIDE * sum(widths) / max(widths) + 0.3
    tall = (_SIDE + 0.62) * len(rows) + 0.75
    figure = Figure(figsize=(wide, tall), facecolor=_PAPER)
    grid = figure.add_gridspec(
        len(rows), len(widths), width_ratios=widths, left=0.1 / wide, right=1 - 0.1 / wide, top=1 - 0.62 / tall,
        bottom=0.62 / tall, wspace=0.06, hspace=0.62 / _SIDE,
    )  # fmt: skip
    figure.text(0.12 / wide, 1 - 0.27 / tall, "What training sees", color=_INK, fontsize=13, weight="bold", va="center")
    figure.text(2.15 / wide, 1 - 0.27 / tall, title, color=_QUIET, fontsize=9, va="center", parse_math=False)
    note = Patch(facecolor=_NOT_VALID, edgecolor="none", label="not valid: outside, padding or cut out")
    figure.legend(handles=[note], loc="upper right", bbox_to_anchor=(1 - 0.05 / wide, 1 - 0.1 / tall), frameon=False,
                  fontsize=8, labelcolor=_QUIET, handlelength=1.1, handleheight=1.1)  # fmt: skip
    for number, row in enumerate(rows):
        _draw_source(figure.add_subplot(grid[number, 0]), row)
        for v, drawn in enumerate(row.drawn):
            axes = figure.add_subplot(grid[number, 1 + v])
            view, valid = row.batch.views[v][0, 0].numpy(), row.batch.valid[v][0, 0].numpy()
            axes.imshow(_tinted(view, valid), interpolation="nearest", extent=(0, 1, 1, 0))
            _frame(axes, v)
            _number(axes, v, 0.02, 0.02)
            signs = round(_SIDE * widths[1 + v] / max(widths) / 0.056)  # that go beside each other at 7 points
            axes.text(0, 1.03, _wrapped(caption(drawn, row.image.pixels.shape), signs), **_CAPTION)
    return figure


def caption(drawn: DrawnView, shape: tuple[int, ...]) -> list[list[str]]:
    """What was drawn for a view: its place, its grey levels, and what not every view has.

    Args:
        drawn: The view.
        shape: (height, width) of its image: the geometry is in shares of both, an angle is one between pixels.
    """
    xx, xy, _, yx, yy, _ = drawn.affine
    determinant = xx * yy - xy * yx
    angle = math.degrees(math.atan2(-xy * shape[1], yy * shape[0])) if abs(xy) + abs(yy) > 0 else 0.0
    geometry = [f"{drawn.size} px", f"{abs(determinant):.0%} of the area", f"turned {angle:+.1f}°"]
    if determinant < 0:
        geometry.append("mirrored")
    grey = [f"gamma {drawn.gamma:.2f}", f"contrast {drawn.contrast:.2f}", f"brightness {drawn.brightness:+.2f}"]
    more = []
    if drawn.window != (0.0, 1.0):
        more.append(f"window {drawn.window[0]:.2f} to {drawn.window[1]:.2f}")
    if drawn.blur > 0:
        more.append(f"blur {drawn.blur:.1f} px")
    if drawn.noise >= 0.0005:
        more.append(f"noise {drawn.noise:.3f}")
    if drawn.cutout[2]:
        more.append("cut-out")
    return [
        [word.replace("-", "\N{MINUS SIGN}") if word != "cut-out" else word for word in p]
        for p in (geometry, grey, more)
    ]


def _wrapped(parts: Sequence[Sequence[str]], signs: int) -> str:
    """Each part on a line of its own, on more where it is longer than ``signs``."""
    lines: list[str] = []
    for part in parts:
        line = ""
        for word in part:
            longer = f"{line} · {word}" if line else word
            if len(longer) > signs and line:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(line for line in lines if line)


def _draw_source(axes: Axes, row: Previewed) -> None:
    from matplotlib.patches import Polygon

    height, width = row.image.pixels.shape
    shrink = min(1.0, _SHOWN / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    pixels = cv2.resize(row.image.pixels, size, interpolation=cv2.INTER_AREA) / np.float32(255)
    valid = np.ones(pixels.shape, dtype=np.bool_)
    if row.image.valid is not None:
        valid = cv2.resize(row.image.valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    axes.imshow(_tinted(pixels.astype(np.float32), valid), extent=(0, width, height, 0), interpolation="bilinear")
    corners = np.array([(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)]).T
    for v, drawn in enumerate(row.drawn):
        outline = (drawn.matrix() @ corners).T * (width, height)
        style = "-" if drawn.size == row.drawn[0].size else (0, (4, 1.6))
        for colour, thick in (("black", 2.8), (_COLOURS[v % len(_COLOURS)], 1.5)):  # seen on bright and on dark
            axes.add_patch(Polygon(outline, fill=False, edgecolor=colour, linewidth=thick, linestyle=style))
        x, y = outline[0].clip((0, 0), (0.93 * width, 0.93 * height))
        _number(axes, v, x, y)
    axes.set(xlim=(0, width), ylim=(height, 0), anchor="N")
    axes.axis("off")
    name = row.name if len(row.name) < 40 else f"...{row.name[-37:]}"
    axes.text(0, -0.03, f"{name}\n{width} x {height} px", transform=axes.transAxes, **_CAPTION)


def _number(axes: Axes, view: int, x: float, y: float) -> None:
    box = {"facecolor": _COLOURS[view % len(_COLOURS)], "edgecolor": "none", "pad": 0.8}
    axes.text(x, y, f" {view + 1} ", color="black", fontsize=7.5, weight="bold", va="top", bbox=box, clip_on=True)


def _frame(axes: Axes, view: int) -> None:
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), anchor="N")
    for spine in axes.spines.values():
        spine.set(edgecolor=_COLOURS[view % len(_COLOURS)], linewidth=2.0)


def _tinted(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Grey to (H, W, 3), with colour and a stripe over what is not valid."""
    colour = np.repeat(image[..., None], 3, axis=-1)
    row, column = np.indices(image.shape)
    stripe = ((row + column) * 40 // max(image.shape)) % 2
    tint = np.array(_NOT_VALID, dtype=np.float32) * (0.82 + 0.18 * stripe[..., None])
    tinted: NDArray[np.float32] = np.where(valid[..., None], colour, 0.25 * colour + 0.75 * tint).astype(np.float32)
    return tinted
