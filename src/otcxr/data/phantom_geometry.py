"""Rays through a phantom: where a point of the body is seen, and which points of the body a pixel sees.

Two frames, both in millimetres. Body: x to the right of the picture (the patient's left), v downwards, z to the front,
origin in mid-chest. Image: x and y on the detector, origin in its middle. The focus is a point at ``focus`` mm from the
detector; postero-anterior (PA) the front of the body lies on the detector, antero-posterior (AP) the back:

    m(z)       = 1 - d(z) / focus,   d(z) = distance of the plane z from the detector;   m(z) = m_0 + slope z
    project    p = c + (X(z) - c) / m(z),   X(z) = (x + yaw z, v + pitch z);   image = R(angle) p + shift
    ray of p   x(z) = x_0 + x_1 z,   x_0 = c_x + (p_x - c_x) m_0,   x_1 = (p_x - c_x) slope - yaw;   v alike

1 / m is the magnification. Turns of the patient about the vertical (yaw) and about the left-right axis (pitch) enter as
shears: exact to first order in the angle.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "Geometry", "Rays", "grid_rays"]

Array: TypeAlias = NDArray[np.float32]


class Geometry(NamedTuple):
    """How one radiograph was taken; lengths in mm."""

    focus: float  # distance from the focus to the detector
    near: float  # m_0: 1 - distance of mid-chest from the detector / focus
    slope: float  # change of m with z: 1 / focus for PA, -1 / focus for AP
    centre: tuple[float, float]  # where the central ray meets the body, (x, v)
    yaw: float  # shear of x with z
    pitch: float  # shear of v with z
    angle: float  # rotation in the picture, radians
    shift: tuple[float, float]  # of the picture on the detector
    field: float  # width and height of the picture on the detector

    def shrink(self, z: ArrayLike) -> Array:
        """m(z), the inverse of the magnification of the plane z."""
        return np.asarray(self.near + self.slope * np.asarray(z), dtype=np.float32)

    def project(self, x: ArrayLike, v: ArrayLike, z: ArrayLike) -> tuple[Array, Array]:
        """Where points of the body are seen: image frame, mm."""
        x, v, z = np.asarray(x, dtype=np.float32), np.asarray(v, dtype=np.float32), np.asarray(z, dtype=np.float32)
        m = self.shrink(z)
        cx, cv = self.centre
        px = cx + (x + self.yaw * z - cx) / m
        pv = cv + (v + self.pitch * z - cv) / m
        c, s = math.cos(self.angle), math.sin(self.angle)
        return (
            np.asarray(c * px - s * pv + self.shift[0], dtype=np.float32),
            np.asarray(s * px + c * pv + self.shift[1], dtype=np.float32),
        )

    def rays(self, x: Array, y: Array) -> Rays:
        """The rays of points of the image frame."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        cx, cv = self.centre
        dx, dy = x - np.float32(self.shift[0]), y - np.float32(self.shift[1])
        px, pv = (c * dx + s * dy) - np.float32(cx), (c * dy - s * dx) - np.float32(cv)
        near, slope = np.float32(self.near), np.float32(self.slope)
        return Rays(
            np.asarray(px * near + np.float32(cx), dtype=np.float32),
            np.asarray(pv * near + np.float32(cv), dtype=np.float32),
            np.asarray(px * slope - np.float32(self.yaw), dtype=np.float32),
            np.asarray(pv * slope - np.float32(self.pitch), dtype=np.float32),
        )

    def plane_map(self, size: int) -> NDArray[np.float64]:
        """Affine map (2, 3) from pixel indices (column, row) to (x, v) where the rays cross the plane z = 0."""
        pitch = self.field / size
        c, s = math.cos(self.angle) * self.near, math.sin(self.angle) * self.near
        rest = 1.0 - self.near
        first = 0.5 * pitch - 0.5 * self.field
        ox, oy = first - self.shift[0], first - self.shift[1]
        return np.array([
            [c * pitch, s * pitch, c * ox + s * oy + rest * self.centre[0]],
            [-s * pitch, c * pitch, c * oy - s * ox + rest * self.centre[1]],
        ])  # fmt: skip


class Rays(NamedTuple):
    """Rays x(z) = x0 + x1 z, v(z) = v0 + v1 z; arrays that broadcast with each other."""

    x0: Array
    v0: Array
    x1: Array
    v1: Array

    def at(self, z: Array | float) -> tuple[Array, Array]:
        """Where the rays cross the surface or plane z."""
        return self.x0 + self.x1 * z, self.v0 + self.v1 * z

    def window(self, rows: slice, columns: slice) -> Rays:
        """The rays of a part of the picture."""
        return Rays(*(part[rows, columns] for part in self))

    def length(self) -> Array:
        """Millimetres of ray per millimetre of z."""
        return np.sqrt(1.0 + self.x1 * self.x1 + self.v1 * self.v1)


@lru_cache(maxsize=4)
def _centres(size: int) -> Array:
    """Centres of the pixels along one side, as a share of the side, origin in the middle."""
    return ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)


def grid_rays(geometry: Geometry, size: int) -> Rays:
    """The rays of the pixels of a picture, (size, size) each."""
    axis = _centres(size) * np.float32(geometry.field)
    return geometry.rays(axis[None, :], axis[:, None])
