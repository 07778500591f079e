"""Fit the check for frontal chest radiographs (``otcxr.packing.frontal``) on NIH images, and measure what it flags.

    python benchmarks/fit_frontal.py data/nih-mini

Components from the training patients; the threshold is the 99th percentile of one half of the test patients; rates are
of the other half and of what is no upright frontal chest radiograph: the same pictures turned and as negatives, and the
files that pydicom brings for its tests. No lateral radiograph is at hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pydicom

from otcxr.data import open_collection
from otcxr.data.decode import decode_file
from otcxr.data.records import split_by_hash
from otcxr.errors import DataError
from otcxr.files import write_atomic
from otcxr.packing.frontal import SIDE, describe, residual
from otcxr.runs import describe_environment

COMPONENTS = 10
SHARE = 0.99


def main(folder: str) -> int:
    collection = open_collection(f"nih:{folder}")
    pictures = {r.name: decode_file(r.image).pixels for r in collection.records}
    fit = np.stack([describe(pictures[r.name]) for r in collection.records if r.split == "train"])
    mean = fit.mean(0)
    components = np.linalg.svd(fit - mean, full_matrices=False)[2][:COMPONENTS]
    stored = {"mean": mean.astype(np.float16), "components": components.astype(np.float16)}
    mean, components = (value.astype(np.float32) for value in stored.values())
    test = [r for r in collection.records if r.split == "test"]
    halves = [[r for r in test if (split_by_hash(f"half {r.patient}") == "train") == first] for first in (True, False)]
    threshold = float(np.quantile([residual(describe(pictures[r.name]), mean, components) for r in halves[0]], SHARE))

    def flagged(images: list[np.ndarray]) -> dict[str, float | int]:
        found = [residual(describe(image), mean, components) > threshold for image in images]
        return {"images": len(found), "flagged": int(np.sum(found)), "share": round(float(np.mean(found)), 4)}

    held = [pictures[r.name] for r in halves[1]]
    others = []
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        try:
            others.append(decode_file(path).pixels)
        except DataError:
            continue
    phantoms = [r.image.radiograph().image[0].numpy() for r in open_collection("phantom:200,seed=0,size=96").records]
    rates = {
        "frontal, other patients": flagged(held),
        "phantoms": flagged(phantoms),
        "turned by a quarter": flagged([np.ascontiguousarray(np.rot90(image)) for image in held]),
        "upside down": flagged([np.ascontiguousarray(np.rot90(image, 2)) for image in held]),
        "negatives": flagged([255 - image for image in held]),
        "left half only": flagged([np.ascontiguousarray(image[:, : image.shape[1] // 2]) for image in held]),
        "pydicom's test files (no chest)": flagged(others),
    }
    buffer = Path("src/otcxr/packing/frontal.npz")
    with buffer.open("wb") as file:
        np.savez_compressed(file, **stored, threshold=np.float32(threshold))
    result = {
        **describe_environment(), "command": f"python benchmarks/fit_frontal.py {folder}", "side": SIDE,
        "components": COMPONENTS, "fitted_on": len(fit), "threshold": round(threshold, 4),
        "threshold_images": len(halves[0]), "rates": rates,
        "source": "NIH ChestX-ray14, NIH Clinical Center; images of 256 px",
    }  # fmt: skip
    write_atomic(Path("docs/results/frontal.json"), json.dumps(result, indent=1) + "\n")
    for name, rate in rates.items():
        print(f"{name:<34} {rate['flagged']:>4} of {rate['images']:<4} {rate['share']:.1%}")
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main(*sys.argv[1:]))
