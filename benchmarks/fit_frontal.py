"""Fit the check for frontal chest radiographs (``otcxr.packing.frontal``) on NIH images; measure what it, and the
screen for writing (``otcxr.packing.burned``), flag.

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
from otcxr.packing.burned import LEAST, longest_line
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
    rng = np.random.default_rng(0)
    names = markers = 0
    some = [cv2.resize(pictures[r.name], (512, 512), interpolation=cv2.INTER_CUBIC) for r in collection.records[:200]]
    for image in some:
        name, marker = image.copy(), image.copy()
        place = int(rng.integers(5, 100)), int(rng.choice([18, 30, 495]))
        scale = float(rng.uniform(0.35, 0.6))
        cv2.putText(name, "SMITH JOHN 12.03.1956", place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
        cv2.putText(marker, "L", (470, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2, cv2.LINE_AA)
        names += longest_line(name) >= LEAST
        markers += longest_line(marker) >= LEAST > longest_line(image)  # where there is no writing without it
    writing = {
        "radiographs as they are": {"images": len(pictures), "flagged": sum(longest_line(p) >= LEAST
                                                                          for p in pictures.values())},
        "with a name": {"images": len(some), "flagged": int(names)},
        "with a lone L, and not without it": {"images": len(some), "flagged": int(markers)},
        "phantoms of 512 px": {"images": 60, "flagged": sum(
            longest_line(np.round(255 * r.image.radiograph().image[0].numpy()).astype(np.uint8)) >= LEAST
            for r in open_collection("phantom:60,seed=3,size=512").records[:60])},
    }  # fmt: skip
    buffer = Path("src/otcxr/packing/frontal.npz")
    with buffer.open("wb") as file:
        np.savez_compressed(file, **stored, threshold=np.float32(threshold))
    result = {
        **describe_environment(), "command": f"python benchmarks/fit_frontal.py {folder}", "side": SIDE,
        "components": COMPONENTS, "fitted_on": len(fit), "threshold": round(threshold, 4),
        "threshold_images": len(halves[0]), "rates": rates, "writing": writing,
        "source": "NIH ChestX-ray14, NIH Clinical Center; images of 256 px",
    }  # fmt: skip
    write_atomic(Path("docs/results/frontal.json"), json.dumps(result, indent=1) + "\n")
    for name, rate in {**rates, **{f"writing: {k}": v for k, v in writing.items()}}.items():
        print(f"{name:<34} {rate['flagged']:>4} of {rate['images']}")
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main(*sys.argv[1:]))
