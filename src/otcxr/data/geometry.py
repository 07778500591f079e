"""Where the positions of a view lie: batches of views and their exact geometry.

All coordinates are (x right, y down) in [0, 1] of an image or view, so they do not depend on its pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Correspondence", "ViewBatch", "correspondence", "token_centres", "token_valid"]


class ViewBatch(NamedTuple):
    """One entry per view; views may differ in size.

    Attributes:
        views: (B, 1, H_v, W_v) float32 in [0, 1] each.
        geometry: (V, B, 2, 3) affine map from view to source image, both in [0, 1]: crop, rotation, flip.
        valid: (B, 1, H_v, W_v) bool each: not padding, rotation corner or collimation.
        clean: the same views before intensity changes, for methods that restore them; None where nobody asked.
    """

    views: tuple[Tensor, ...]
    geometry: Tensor
    valid: tuple[Tensor, ...]
    clean: tuple[Tensor, ...] | None = None


class Correspondence(NamedTuple):
    """Where the tokens of one view lie in the other one.

    Attributes:
        position: (B, n, 2) coordinates of each token's centre in the other view; outside [0, 1] if it is not seen.
        cell: (B, n) index of the other view's token that contains it; -1 where there is none.
        known: (B, n) bool: the token is valid and its true position lies in a valid token of the other view.
    """

    position: Tensor
    cell: Tensor
    known: Tensor


def token_centres(height: int, width: int, device: torch.device | None = None, first: float = 0.5) -> Tensor:
    """Centres of a grid of tokens in [0, 1], row by row: (height * width, 2) as (x, y).

    Args:
        height, width: Of the grid.
        device: Where to put them.
        first: Where the first token's centre lies, in cells: 0.5 is the middle of its cell. ``Encoder.first_centre``
            says where a network really looks.
    """
    y = (torch.arange(height, device=device) + first) / height
    x = (torch.arange(width, device=device) + first) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)


def token_valid(valid: Tensor, height: int, width: int, share: float = 0.5) -> Tensor:
    """Tokens of which at least ``share`` of the area is valid: (B, 1, H, W) bool -> (B, height * width) bool."""
    covered = torch.nn.functional.adaptive_avg_pool2d(valid.float(), (height, width))
    return covered.flatten(1) >= share


def apply_affine(affine: Tensor, points: Tensor) -> Tensor:
    """Map points (..., n, 2) by affine maps (..., 2, 3); at their own precision, also under autocast."""
    with torch.autocast(points.device.type, enabled=False):
        return points @ affine[..., :, :2].transpose(-1, -2) + affine[..., None, :, 2]


def invert_affine(affine: Tensor) -> Tensor:
    """Inverse of affine maps (..., 2, 3); at their own precision, also under autocast."""
    with torch.autocast(affine.device.type, enabled=False):
        linear = torch.linalg.inv(affine[..., :, :2])
        return torch.cat((linear, -(linear @ affine[..., :, 2:])), dim=-1)


def correspondence(
    geometry_s: Tensor,
    geometry_t: Tensor,
    valid_s: Tensor,
    valid_t: Tensor,
    grid_s: tuple[int, int],
    grid_t: tuple[int, int],
    first: float = 0.5,
) -> Correspondence:
    """True position of every token of view s in view t, from the known geometry of both.

        p_t = G_t^{-1} G_s p_s

    Args:
        geometry_s, geometry_t: (B, 2, 3) maps from view to source.
        valid_s, valid_t: (B, n) and (B, m) bool, valid tokens.
        grid_s, grid_t: (height, width) of the token grids.
        first: Centre of the first token in cells, see ``token_centres``; a position belongs to the nearest centre.
    """
    centres = token_centres(*grid_s, geometry_s.device, first).to(geometry_s.dtype)
    source = apply_affine(geometry_s, centres.expand(geometry_s.shape[0], -1, -1))
    position = apply_affine(invert_affine(geometry_t), source)
    height, width = grid_t
    inside = ((position >= 0) & (position < 1)).all(-1)
    nearest = position * position.new_tensor((width, height)) + (0.5 - first)
    column = nearest[..., 0].floor().long().clamp(0, width - 1)
    row = nearest[..., 1].floor().long().clamp(0, height - 1)
    cell = torch.where(inside, row * width + column, -1)
    known = inside & valid_s & valid_t.gather(1, cell.clamp_min(0))
    return Correspondence(position, cell, known)


def squared_distance(
    geometry_s: Tensor, geometry_t: Tensor, grid_s: tuple[int, int], grid_t: tuple[int, int], first: float = 0.5
) -> Tensor:
    """Squared distance between what tokens of two views show, in cells of view t: (B, n, m), zero where it is the same.

        d_ij^2 = |S (G_t^{-1} G_s p_i - p_j)|^2,   S = (width, height) of the grid of t

    Args: as :func:`correspondence`.
    """
    centres = token_centres(*grid_s, geometry_s.device, first).to(geometry_s.dtype)
    source = apply_affine(geometry_s, centres.expand(geometry_s.shape[0], -1, -1))
    position = apply_affine(invert_affine(geometry_t), source)
    others = token_centres(*grid_t, geometry_s.device, first).to(geometry_s.dtype)
    scale = position.new_tensor((grid_t[1], grid_t[0]))
    return ((position.unsqueeze(-2) - others) * scale).square().sum(-1)
