"""Probe pairs: the same few radiographs, with what the method pairs in two of their views, stored as arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from otcxr.data.dataset import read_pixels
from otcxr.data.geometry import token_valid
from otcxr.data.records import Collection, Record, column, take
from otcxr.data.views import ViewsConfig, make_views, view_generator
from otcxr.errors import DataError
from otcxr.methods.base import SSLMethod
from otcxr.runs import Run

__all__ = ["choose_probes", "write_pairs"]

_EPOCH = 2**31  # an epoch that no training reaches: the views of probe pairs are never views of the training


def choose_probes(collection: Collection, training: Collection, count: int, seed: int) -> Collection:
    """Choose readable radiographs: from the test split where there is one, those with boxes first.

    Nothing is trained or tuned on them: they are looked at.
    """
    outside = [index for index, split in enumerate(column(collection.records, "split")) if split == "test"]
    candidates = take(collection.records, outside) if outside else training.records
    order = np.random.default_rng((seed, 8)).permutation(len(candidates))
    boxed = column(candidates, "boxed")
    ranked = sorted(order, key=lambda i: not boxed[i])
    chosen: list[Record] = []
    for index in ranked:
        if len(chosen) == count:
            break
        try:
            read_pixels(candidates[index].image)
        except DataError:  # counted and listed where the split it belongs to is used
            continue
        chosen.append(candidates[index])
    return collection._replace(records=chosen)


def write_pairs(
    run: Run, method: SSLMethod, probes: Collection, views: ViewsConfig, seed: int, device: torch.device
) -> None:
    """Write ``pairs/NNN.npz`` for every probe: views, geometry, validity, boxes, and the method's ``Match``.

    Arrays: view_s, view_t (H, W) float16; geometry (2, 2, 3); first_centre of the encoder; valid_s (h, w), valid_t
    (h', w') of tokens; cost, plan (n, m); a (n,), b (m,); attention (heads, n, m) if any; boxes (k, 4) x, y, width,
    height in [0, 1] of the image; findings (k,); name. A method that pairs nothing writes nothing.
    """
    training, dtype = method.training, next(method.parameters()).dtype
    views = replace(views, local_count=0)  # a pair is two views
    method.eval()
    for number, record in enumerate(probes.records):
        try:
            radiograph = read_pixels(record.image)
        except DataError:  # it has become unreadable since it was chosen: its last pair stays
            continue
        batch = make_views(radiograph, views, view_generator(seed, _EPOCH, number))
        on_device = batch._replace(
            views=tuple(v.to(device, dtype) for v in batch.views),
            geometry=batch.geometry.to(device),
            valid=tuple(v.to(device) for v in batch.valid),
        )
        match = method.match(on_device)
        if match is None:
            break
        stride = method.encoder.strides[-1]
        grids = [tuple(-(-side // stride) for side in view.shape[-2:]) for view in batch.views[:2]]
        height, width = radiograph.image.shape[-2:]
        arrays: dict[str, Any] = {
            "view_s": batch.views[0][0, 0].numpy().astype(np.float16),
            "view_t": batch.views[1][0, 0].numpy().astype(np.float16),
            "geometry": batch.geometry[:2, 0].numpy(),
            "valid_s": token_valid(batch.valid[0], *grids[0]).view(grids[0]).numpy(),
            "valid_t": token_valid(batch.valid[1], *grids[1]).view(grids[1]).numpy(),
            "first_centre": np.array(method.encoder.first_centre),
            "cost": match.cost[0].float().cpu().numpy(),
            "plan": match.plan[0].float().cpu().numpy(),
            "a": match.a[0].float().cpu().numpy(),
            "b": match.b[0].float().cpu().numpy(),
            "boxes": np.array(
                [[b.x / width, b.y / height, b.width / width, b.height / height] for b in record.boxes]
            ).reshape(-1, 4),
            "findings": np.array([b.finding for b in record.boxes], dtype=np.str_),
            "name": np.array(record.name),
        }
        if match.attention is not None:
            arrays["attention"] = match.attention[0].float().cpu().numpy()
        run.write_arrays(f"pairs/{number:03d}.npz", arrays)
    method.train(training)
