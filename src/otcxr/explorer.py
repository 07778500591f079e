"""The transport explorer: what a method pairs in two views, under the mouse, in a page that needs nothing else.

Made of ``pairs/*.npz`` alone, so it can be written at any moment of a training. The page computes transport itself, in
double precision, by the scaling iteration

    u = (a / (K v))^w,   v = (b / (K' u))^w,   K = a b' exp(-cost / epsilon),   P = diag(u) K diag(v)

with w = 1, or reach / (reach + epsilon) where mass may stay; it stops when the plan's marginals are right to 1e-7, or
nothing moves any more.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otcxr.runs import Run

__all__ = ["EPSILONS", "explorer_data", "pair_data", "true_cells"]

EPSILONS = (0.005, 1.0)  # ends of the slider: below, exp(-2 / epsilon) leaves the range of doubles
_MOST_BYTES = 6_000_000  # of all pairs of a run: a page is read on phones too


def explorer_data(run: Run) -> dict[str, Any] | None:
    """Everything the page needs of a run, as plain values; None for a method that pairs nothing.

    Returns: ``pairs`` as of :func:`pair_data`, as many as fit into 6 MB; ``left_out`` how many do not; ``epsilon`` and
        ``reach`` of the method (0: all mass moves), ``transports`` whether it has these settings at all.
    """
    pairs: list[dict[str, Any]] = []
    files = sorted((run.path / "pairs").glob("*.npz"))
    used = 0
    for path in files:
        with np.load(path) as stored:
            pair = pair_data(dict(stored))
        used += len(json.dumps(pair))
        if pairs and used > _MOST_BYTES:
            break
        pairs.append(pair)
    if not pairs:
        return None
    method = run.read_config()["method"]
    return {
        "pairs": pairs, "left_out": len(files) - len(pairs), "method": method["name"],
        "epsilon": float(method.get("epsilon", 0.05)), "reach": float(method.get("reach") or 0.0),
        "transports": "epsilon" in method, "epsilons": list(EPSILONS),
    }  # fmt: skip


def pair_data(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """One stored pair as plain values: pictures as PNG, numbers as base64 of little-endian float32 (attention uint8).

    Args:
        arrays: What training wrote to ``pairs/NNN.npz``.
    """
    (rows, columns), (rows_t, columns_t) = arrays["valid_s"].shape, arrays["valid_t"].shape
    attention = arrays.get("attention")
    heads = []
    if attention is not None:
        top = attention.max(axis=(1, 2), keepdims=True)
        levels = np.round(attention / np.where(top > 0, top, 1) * 255).astype(np.uint8)
        heads = [base64.b64encode(head.tobytes()).decode() for head in levels]
    return {
        "name": str(arrays["name"]),
        "views": [_png(arrays["view_s"]), _png(arrays["view_t"])],
        "grids": [[rows, columns], [rows_t, columns_t]],
        "valid": [arrays["valid_s"].ravel().astype(int).tolist(), arrays["valid_t"].ravel().astype(int).tolist()],
        "first": float(arrays["first_centre"]),
        "true": true_cells(arrays).tolist(),
        "cost": _packed(arrays["cost"]), "plan": _packed(arrays["plan"]),
        "a": _packed(arrays["a"]), "b": _packed(arrays["b"]), "heads": heads,
    }  # fmt: skip


def true_cells(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """(n,) where each position of the first view truly lies in the second, by their geometry; -1 where that does not
    show it.

    Args:
        arrays: What training wrote to ``pairs/NNN.npz``.
    """
    import torch

    from otcxr.data.geometry import correspondence

    first, second = arrays["valid_s"], arrays["valid_t"]
    true = correspondence(
        torch.from_numpy(arrays["geometry"][:1]), torch.from_numpy(arrays["geometry"][1:]),
        torch.from_numpy(first).view(1, -1), torch.from_numpy(second).view(1, -1),
        (first.shape[0], first.shape[1]), (second.shape[0], second.shape[1]), float(arrays["first_centre"]),
    )  # fmt: skip
    cells: NDArray[np.int64] = torch.where(true.known, true.cell, -1)[0].numpy()
    return cells


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def _png(view: NDArray[Any]) -> str:
    """A view (H, W) in [0, 1] as a data URI."""
    import cv2

    pixels = np.round(np.clip(view.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    done, data = cv2.imencode(".png", pixels)
    assert done
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()
