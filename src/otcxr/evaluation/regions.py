"""Material whose labels are regions: does an image show it, and where?

What is known of an image and a region: its mask, if the record has one (perhaps an empty one); that there is none, if
it is a finding that the record denies; else nothing, and the image says nothing of that region.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from otcxr.console import Progress
from otcxr.data.records import Skipped
from otcxr.errors import DataError, did_you_mean
from otcxr.evaluation.labelled import Material, Part
from otcxr.evaluation.truth import Masks

__all__ = ["placed", "segmented"]

_MOST_BROKEN = 0.05  # share of the masks that may be unreadable


def placed(material: Material, size: int, wanted: Sequence[str], progress: Progress) -> Material:
    """The material whose test images are labelled 1 where a box or mask says where a finding is, for heat maps.

    Args:
        material: With labels of findings.
        size: Side of the square in pixels.
        wanted: No choice here: the findings are those of the material.
        progress: Where to show progress.
    Returns: Test ``labels`` (N, F) are 1 or NaN; those of images to fit and validate on stay.
    Raises: DataError: no test image says where a finding is, or a mask cannot be read.
    """
    masks = Masks(size)

    def part(own: Part) -> Part:
        labels = np.full(own.labels.shape, np.nan)
        with progress.bar(f"regions of {own.name}"[:28], len(own.records), "images") as bar:
            for row, record in enumerate(own.records):
                for f, finding in enumerate(material.findings):
                    asked = record.labels.get(finding, 1) == 1
                    if asked and masks.truth(record, finding, material.pixels) is not None:
                        labels[row, f] = 1.0
                bar(row + 1)
        return own._replace(labels=labels)

    tests = {name: part(own) for name, own in material.tests.items()}
    if not any((own.labels == 1).any() for own in tests.values()):
        raise DataError(f"no test image of {material.collection} has a box or mask of a finding; localisation needs "
                        "some (NIH: BBox_List_2017.csv beside the label table)")  # fmt: skip
    return material._replace(tests=tests, masks=masks, classes=material)


def segmented(material: Material, size: int, wanted: Sequence[str], progress: Progress) -> Material:
    """The material with regions for findings, for tasks that are judged on masks.

    Args:
        material: With labels of findings.
        size: Side of the square in pixels.
        wanted: Regions; empty takes every one of which an image to fit on has a mask: organs by name, then findings.
        progress: Where to show progress.
    Returns: ``findings`` are the regions, ``labels`` (N, R) 1 where the mask shows something, 0 where it is known to be
        empty, NaN where nothing is known; masks that cannot be read are listed as skipped.
    Raises: DataError: no image to fit on has a mask, none has a wanted one, or too many cannot be read.
    """
    there = {name for record in material.fit.records for name in record.masks}
    if not there:
        raise DataError(f"no image of '{material.fit.name}' of {material.collection} has a mask; segmentation needs "
                        "some (boxes are judged by otcxr localize)")  # fmt: skip
    known = [*sorted(there - set(material.findings)), *(f for f in material.findings if f in there)]
    for name in wanted:
        if name not in there:
            raise DataError(f"no image to fit on has a mask of '{name}'{did_you_mean(name, known)}; there are "
                            f"{', '.join(known)}")  # fmt: skip
    regions = tuple(wanted) or tuple(known)
    masks = Masks(size)

    def part(own: Part) -> Part:
        labels = np.full((len(own.records), len(regions)), np.nan)
        broken: list[Skipped] = []
        tried = 0
        with progress.bar(f"masks of {own.name}"[:28], len(own.records), "images") as bar:
            for row, record in enumerate(own.records):
                for r, name in enumerate(regions):
                    if name in record.masks:
                        tried += 1
                        try:
                            labels[row, r] = float(masks(record, name).any())
                        except DataError as error:
                            broken.append(Skipped(record.name, f"mask of {name}: {error}", record.split))
                    elif name in material.findings and record.labels.get(name) == 0:
                        labels[row, r] = 0.0
                bar(row + 1)
        if len(broken) > _MOST_BROKEN * tried:
            raise DataError(f"{len(broken)} of {tried} masks of '{own.name}' cannot be read, more than "
                            f"{_MOST_BROKEN:.0%}; the first: {broken[0].reason}")  # fmt: skip
        if broken:
            progress.say(f"{len(broken)} masks cannot be read (first: {broken[0].image}: {broken[0].reason})")
        return own._replace(labels=labels, skipped=(*own.skipped, *broken))

    return material._replace(
        findings=regions, fit=part(material.fit), val=part(material.val),
        tests={name: part(own) for name, own in material.tests.items()}, masks=masks, classes=material,
    )  # fmt: skip
