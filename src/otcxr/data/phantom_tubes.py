"""Tubes of a phantom (vessels, bones of the limbs, lines): projected and drawn all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from otcxr.data.phantom_geometry import Array, Geometry

__all__ = ["Tubes"]

_PIECE = 10.0  # pixels; long tubes are cut so that the windows that hold the pieces stay small
_CLASSES = (2.0, 5.0, 12.0, 30.0, 1e9)  # radii in pixels that share a window


class Tubes:
    """Cones with round ends, in the body frame; where several lie on a ray, the longest path counts."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, ...]] = []  # a, b (x, v, z each), radii at a and b, weight

    def path(
        self, points: Sequence[tuple[float, float, float]], radii: tuple[float, float], weight: float = 1.0,
        smooth: int = 0,
    ) -> None:  # fmt: skip
        """Add a tube through points.

        Args:
            points: (x, v, z), mm.
            radii: At the first and the last point; linear between.
            weight: Factor on the path: what a millimetre of the tube counts.
            smooth: Cut each stretch in so many, along a Catmull-Rom spline; 0 leaves the stretches straight.
        """
        if smooth:
            p = np.array([points[0], *points, points[-1]])
            t = (np.arange(smooth) / smooth)[:, None]
            curve = [
                0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
            ]
            points = [tuple(row) for row in np.concatenate([*curve, p[-1:]]).tolist()]
        steps = len(points) - 1
        for k in range(steps):
            r = [radii[0] + (radii[1] - radii[0]) * (k + e) / steps for e in (0, 1)]
            self._ends.append((*points[k], *points[k + 1], *r, weight))

    def longest(self, geometry: Geometry, size: int) -> Array | None:
        """Path through the tubes along every ray times weight, (size, size) float32 in mm of z; None without tubes.

        A tube thinner than 1.6 pixels is drawn that wide and as much fainter, so that no size shows broken lines.
        """
        if not self._ends:
            return None
        ends = np.array(self._ends, dtype=np.float32)
        pixel = geometry.field / size
        (ax, ay), (bx, by) = (
            tuple(part / pixel + (size / 2 - 0.5) for part in geometry.project(*ends[:, k : k + 3].T)) for k in (0, 3)
        )
        near = geometry.shrink(0.5 * (ends[:, 2] + ends[:, 5]))
        ra, rb = ends[:, 6] / (near * pixel), ends[:, 7] / (near * pixel)
        weight = ends[:, 8] * near * pixel  # from pixels to mm of the body
        count = np.maximum(np.ceil(np.hypot(bx - ax, by - ay) / _PIECE), 1).astype(np.intp)
        owner = np.repeat(np.arange(len(ends)), count)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        begin, end = (nth / count[owner]).astype(np.float32), ((nth + 1) / count[owner]).astype(np.float32)
        pieces = np.stack([
            (a + (b - a) * t)[...] for a, b in ((ax[owner], bx[owner]), (ay[owner], by[owner]), (ra[owner], rb[owner]))
            for t in (begin, end)
        ], axis=1)  # x, x, y, y, r, r  # fmt: skip
        thick = np.maximum(pieces[:, 4], pieces[:, 5])
        reach = np.maximum(thick, 0.8)
        margin = _wide(reach)  # no window reaches beyond it
        canvas = np.zeros((size + 2 * margin, size + 2 * margin), np.float32)
        lowest = np.float32(0.0)
        for highest in _CLASSES:
            chosen = np.nonzero((thick >= lowest) & (thick < highest))[0]
            lowest = np.float32(highest)
            if len(chosen):
                _draw(canvas, margin, size, pieces[chosen], weight[owner[chosen]], reach[chosen])
        return np.ascontiguousarray(canvas[margin : margin + size, margin : margin + size])


def _draw(canvas: Array, margin: int, size: int, pieces: Array, weight: Array, reach: Array) -> None:
    """Raise ``canvas`` to the paths through pieces of tubes, each in a window of the same size."""
    x0, x1, y0, y1, r0, r1 = pieces.T
    left = np.floor(np.minimum(x0, x1) - reach).astype(np.intp)
    top = np.floor(np.minimum(y0, y1) - reach).astype(np.intp)
    wide = _wide(reach)
    there = (left + wide > 0) & (top + wide > 0) & (left < size) & (top < size)
    if not there.any():
        return
    x0, x1, y0, y1, r0, r1, weight, left, top = (
        part[there] for part in (x0, x1, y0, y1, r0, r1, weight, left, top)
    )  # fmt: skip
    index = np.arange(wide, dtype=np.float32)
    dx = (left.astype(np.float32) - x0)[:, None] + index
    dy = (top.astype(np.float32) - y0)[:, None] + index
    ux, uy = x1 - x0, y1 - y0
    length2 = np.maximum(ux * ux + uy * uy, 1e-6)
    t = (dx * (ux / length2)[:, None])[:, None, :] + (dy * (uy / length2)[:, None])[:, :, None]
    np.clip(t, 0.0, 1.0, out=t)
    far = (dx[:, None, :] - t * ux[:, None, None]) ** 2
    far += (dy[:, :, None] - t * uy[:, None, None]) ** 2
    radius = r0[:, None, None] + (r1 - r0)[:, None, None] * t
    drawn = np.maximum(radius, 0.8)
    path = np.sqrt(np.maximum(drawn * drawn - far, 0.0))
    path *= (radius / drawn) ** 2
    path *= (2.0 * weight)[:, None, None]
    rows, columns = (top + margin).tolist(), (left + margin).tolist()
    for k, (row, column) in enumerate(zip(rows, columns, strict=True)):
        part = canvas[row : row + wide, column : column + wide]
        np.maximum(part, path[k], out=part)


def _wide(reach: Array) -> int:
    """Side of a window that holds any piece whose ends reach so far, in pixels."""
    return int(np.ceil(2 * reach.max() + _PIECE)) + 2
