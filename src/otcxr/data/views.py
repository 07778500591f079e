"""Random views of a radiograph with exact geometry: the front door.

A view is a crop with a small rotation, resampled with antialiasing, then changed in intensity the way exposure,
windowing and detectors differ. No hue (there is none), no vertical flip, no large rotation; the horizontal flip is off
because it turns the heart to the other side. What is drawn and what it means: ``view_spec``; who carries it out:
``views_host`` and ``views_device``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from otcxr.data.geometry import ViewBatch
from otcxr.data.records import Radiograph, full_valid
from otcxr.data.view_spec import (
    MIN_VALID,
    DrawnView,
    GreyImage,
    ViewsConfig,
    draw_views,
    grey_image,
    view_generator,
)
from otcxr.data.views_host import host_views

__all__ = [
    "MIN_VALID",
    "ViewBatch",
    "ViewsConfig",
    "carry_out",
    "collate_views",
    "make_views",
    "view_generator",
]


def make_views(
    image: Radiograph | Tensor | GreyImage, config: ViewsConfig, generator: np.random.Generator, count: int = 2
) -> ViewBatch:
    """Draw views of one radiograph and make them on the host.

    Args:
        image: Pixels and validity; or an image (1, H, W) as ``load_image`` gives it, valid everywhere; or the 8-bit
            pixels that both are rounded to.
        config: The distribution of views.
        generator: Source of all randomness.
        count: How many views of ``config.size``; ``config.local_count`` smaller ones follow them.
    Returns: A ViewBatch with B = 1. ``geometry`` maps view to image exactly; a pixel is valid when its centre lies
        inside the image, everything it averages over is valid, and it was not cut out. Pixels outside are 0.
    """
    if isinstance(image, Tensor):
        image = Radiograph(image, full_valid(image), None)
    if isinstance(image, Radiograph):
        image = grey_image(image)
    shape: tuple[int, int] = image.pixels.shape
    return carry_out(image, draw_views(shape, image.valid, config, generator, count), clean=config.clean)


def carry_out(image: GreyImage, drawn: Sequence[DrawnView], *, clean: bool = False) -> ViewBatch:
    """Make views of one image from their numbers on the host; a ViewBatch with B = 1."""
    made = host_views(image, drawn, clean=clean)
    geometry = np.array([view.affine for view in drawn], dtype=np.float32).reshape(-1, 1, 2, 3)
    cleans = tuple(torch.from_numpy(view.clean)[None, None] for view in made if view.clean is not None)
    return ViewBatch(
        tuple(torch.from_numpy(view.view)[None, None] for view in made),
        torch.from_numpy(geometry),
        tuple(torch.from_numpy(view.valid)[None, None] for view in made),
        cleans if clean else None,
    )


def collate_views(samples: Sequence[ViewBatch]) -> ViewBatch:
    """Join samples along the batch dimension."""
    count = len(samples[0].views)
    clean = None
    if samples[0].clean is not None:
        clean = tuple(torch.cat([s.clean[v] for s in samples if s.clean is not None]) for v in range(count))
    return ViewBatch(
        tuple(torch.cat([s.views[v] for s in samples]) for v in range(count)),
        torch.cat([s.geometry for s in samples], dim=1),
        tuple(torch.cat([s.valid[v] for s in samples]) for v in range(count)),
        clean,
    )
