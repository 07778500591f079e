"""The tuberculosis collections of the NLM: Montgomery County and Shenzhen, with masks of the lungs.

Source: Jaeger et al., Quantitative Imaging in Medicine and Surgery 4, 2014. The last digit of a name says whether there
are signs of tuberculosis. Montgomery comes with one mask for each lung; those of Shenzhen are a separate release by
others (Stirenko et al., 2018) and cover a part of the images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from otcxr.data.masks import JoinedMask
from otcxr.data.records import Collection, ImageRef, Record, Skipped, split_by_hash
from otcxr.errors import DataError

__all__ = ["FINDING", "read_montgomery", "read_shenzhen"]

FINDING = "Tuberculosis"
_MONTGOMERY, _SHENZHEN = re.compile(r"MCUCXR_\d+_[01]"), re.compile(r"CHNCXR_\d+_[01]")
_AGE = re.compile(r"(\d+)\s*(?:Y|yr|year)", re.IGNORECASE)


def read_montgomery(text: str) -> Collection:
    """Read the folder ``MontgomerySet``: ``CXR_png``, ``ManualMask/leftMask`` and ``rightMask``, ``ClinicalReadings``.

    Returns: A record for each image, with a mask "lungs" where both masks are there. Every image is of another patient;
        the split (70 % train, 10 % val, 20 % test, by a hash of the name) is ours, as the source has none.
    Raises: DataError: no such folder, or no images in it.
    """
    root = Path(text)
    folders = [root / "ManualMask" / side for side in ("leftMask", "rightMask")]

    def lungs(image: Path) -> ImageRef | None:
        files = tuple(folder / image.name for folder in folders)
        return JoinedMask(files) if all(file.is_file() for file in files) else None

    return _read("montgomery", root, _MONTGOMERY, lungs)


def read_shenzhen(text: str) -> Collection:
    """Read the folder ``ChinaSet_AllFiles``: ``CXR_png``, ``ClinicalReadings`` and, if it was put there, ``mask``.

    Arguments, result and errors as of :func:`read_montgomery`; masks are ``mask/NAME_mask.png``.
    """
    root = Path(text)

    def lungs(image: Path) -> ImageRef | None:
        file = root / "mask" / f"{image.stem}_mask.png"
        return file if file.is_file() else None

    return _read("shenzhen", root, _SHENZHEN, lungs)


def _read(reader: str, root: Path, pattern: re.Pattern[str], lungs: Callable[[Path], ImageRef | None]) -> Collection:
    folder = root / "CXR_png"
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}; {reader} expects the unpacked set with CXR_png/ in it")
    records: list[Record] = []
    skipped: list[Skipped] = []
    for image in sorted(folder.glob("*.png")):
        if not pattern.fullmatch(image.stem):
            skipped.append(Skipped(image.name, "its name is none of this collection"))
            continue
        mask = lungs(image)
        sex, age = _reading(root / "ClinicalReadings" / f"{image.stem}.txt")
        records.append(Record(
            image=image, study=image.stem, patient=image.stem, sex=sex, age=age, source=reader,
            labels={FINDING: int(image.stem[-1])}, masks={} if mask is None else {"lungs": mask},
            split=split_by_hash(image.stem),
        ))  # fmt: skip
    if not records:
        raise DataError(f"{folder} holds no image of {reader}; expected names such as "
                        f"{'MCUCXR_0001_0' if reader == 'montgomery' else 'CHNCXR_0001_0'}.png")  # fmt: skip
    return Collection(f"{reader}:{root}", (FINDING,), records, tuple(skipped))


def _reading(path: Path) -> tuple[str | None, float | None]:
    """Sex and age of a clinical reading; None where it does not say, or is not there."""
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    named = re.search(r"Sex:\s*([MF])", text) or re.search(r"\b(fe)?male\b", text, re.IGNORECASE)
    sex = None
    if named:
        word = named.group(0).lower()
        sex = "F" if "female" in word or word.endswith("f") else "M"
    age = _AGE.search(text)
    years = float(age.group(1)) if age else None
    return sex, years if years is not None and years <= 120 else None
