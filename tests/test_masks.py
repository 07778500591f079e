"""Masks and the collections that have them: run lengths, joined lungs, official layouts, the real table of SIIM."""

import contextlib
import gzip
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.console import SilentProgress
from otcxr.data import open_collection
from otcxr.data.masks import JoinedMask, RunLengthMask, decode_runs, load_mask, read_mask
from otcxr.data.records import split_by_hash
from otcxr.data.siim import read_runs
from otcxr.errors import DataError
from otcxr.evaluation.regions import segmented
from otcxr.evaluation.tasks import EvaluateConfig, prepare
from otcxr.evaluation.truth import mask_in_square

REAL = Path(__file__).parents[2] / "shared" / "data" / "labels" / "siim-pneumothorax-train-rle.csv.gz"


def encode(mask):
    """Pairs (skip, length) down the columns, pixel by pixel."""
    out, skip, length = [], 0, 0
    for value in mask.T.ravel().tolist():
        if value:
            length += 1
            continue
        if length:
            out += [skip, length]
            skip, length = 0, 0
        skip += 1
    return " ".join(map(str, out + ([skip, length] if length else [])))


@settings(max_examples=100)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_run_lengths_by_hand(side, seed):
    mask = np.random.default_rng(seed).random((side, side)) < 0.4
    if mask.any():
        assert np.array_equal(decode_runs(encode(mask), side, "x"), mask)


@pytest.mark.parametrize(("text", "says"), [
    ("1 2 3", "pairs"), ("", "pairs"), ("1 -2", "pairs"), ("a 2", "whole numbers"), ("0 17", "pairs"),
    ("10 5 2 4", "reach pixel 21 of 16"), ("9" * 30 + " 1", "whole numbers"),
])  # fmt: skip
def test_wrong_run_lengths_are_refused(text, says):
    with pytest.raises(DataError, match=says):
        decode_runs(text, 4, "image-1")


@settings(max_examples=200)
@given(st.text("0123456789 -.", max_size=40))
def test_any_run_lengths_are_a_mask_or_an_error(text):
    with contextlib.suppress(DataError):
        assert decode_runs(text, 8, "x").shape == (8, 8)


def test_rows_of_an_image_are_joined():
    one, two = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    one[1:4, 2:5], two[3:6, 3:7] = True, True  # they overlap
    mask = RunLengthMask("x", (encode(one), encode(two)), 8)
    assert np.array_equal(read_mask(mask), one | two)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.mark.parametrize(("pixels", "inside"), [
    (np.array([[0, 255], [0, 0]], np.uint8), [[0, 1], [0, 0]]),
    (np.array([[0, 1], [1, 0]], np.uint8), [[0, 1], [1, 0]]),  # masks of 0 and 1
    (np.zeros((2, 2), np.uint8), [[0, 0], [0, 0]]),  # nothing is there: that is an answer, not a broken file
    (np.full((2, 2), 255, np.uint8), [[1, 1], [1, 1]]),
    (np.array([[0, 100], [200, 255]], np.uint8), [[0, 0], [1, 1]]),  # edges that were made soft
    (np.array([[0, 65535], [0, 0]], np.uint16), [[0, 1], [0, 0]]),
])  # fmt: skip
def test_a_mask_of_a_file(tmp_path, pixels, inside):
    save(tmp_path / "m.png", pixels)
    assert load_mask(tmp_path / "m.png").astype(int).tolist() == inside
    save(tmp_path / "c.png", np.repeat(pixels[..., None], 3, axis=2))
    assert load_mask(tmp_path / "c.png").astype(int).tolist() == inside


def test_a_file_that_is_no_mask(tmp_path):
    (tmp_path / "m.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no PNG or JPEG"):
        load_mask(tmp_path / "m.png")
    with pytest.raises(DataError, match="cannot be read"):
        load_mask(tmp_path / "none.png")
    (tmp_path / "e.png").write_bytes(b"")
    with pytest.raises(DataError, match="no PNG or JPEG"):
        load_mask(tmp_path / "e.png")


def test_masks_of_different_sizes_do_not_join(tmp_path):
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "b.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(DataError, match="different sizes"):
        JoinedMask((tmp_path / "a.png", tmp_path / "b.png")).radiograph()


# --- collections -----------------------------------------------------------------------------------------------------


@pytest.fixture
def montgomery(tmp_path):
    root = tmp_path / "MontgomerySet"
    rng = np.random.default_rng(0)
    for number in range(1, 61):
        name = f"MCUCXR_{number:04d}_{number % 2}"
        save(root / "CXR_png" / f"{name}.png", rng.integers(1, 200, (48, 40), dtype=np.uint8))
        for side, columns in (("leftMask", slice(22, 34)), ("rightMask", slice(6, 18))):
            mask = np.zeros((48, 40), np.uint8)
            mask[10:36, columns] = 255
            save(root / "ManualMask" / side / f"{name}.png", mask)
        path = root / "ClinicalReadings" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("Patient's Sex: F\nPatient's Age: 045Y\nnormal\n")
    return root


def test_montgomery_joins_both_lungs(montgomery):
    collection = open_collection(f"montgomery:{montgomery}")
    assert collection.findings == ("Tuberculosis",)
    assert len(collection.records) == 60
    first = collection.records[0]
    assert (first.labels, first.sex, first.age, first.patient) == ({"Tuberculosis": 1}, "F", 45.0, "MCUCXR_0001_1")
    mask = read_mask(first.masks["lungs"])
    assert mask.shape == (48, 40)
    assert mask.sum() == 26 * 24
    square = mask_in_square(first, "lungs", 48)  # 4 columns of black on either side
    assert np.array_equal(square[:, 4:44], mask)
    assert {r.split for r in collection.records} == {"train", "val", "test"}
    (montgomery / "ManualMask" / "leftMask" / f"{first.name}").unlink()
    assert "lungs" not in open_collection(f"montgomery:{montgomery}").records[0].masks  # half a lung is none


def test_lungs_of_montgomery_are_material_for_segmentation(montgomery):
    config = EvaluateConfig(size=32)
    whole = prepare(open_collection(f"montgomery:{montgomery}"), ("train", "test"), config, "val", SilentProgress())
    material = segmented(whole, 32, (), SilentProgress())
    assert material.findings == ("lungs",)
    assert (material.fit.labels == 1).all()


def test_shenzhen_takes_masks_where_they_are(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / "CXR_png" / f"CHNCXR_{number:04d}_1.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    save(tmp_path / "CXR_png" / "Thumbs.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    save(tmp_path / "mask" / "CHNCXR_0002_1_mask.png", np.eye(8, dtype=np.uint8) * 255)
    (tmp_path / "ClinicalReadings").mkdir()
    (tmp_path / "ClinicalReadings" / "CHNCXR_0001_1.txt").write_text("male 45yrs\nbilateral PTB")
    (tmp_path / "ClinicalReadings" / "CHNCXR_0002_1.txt").write_text("female  21yrs\nsecondary PTB")
    found = open_collection(f"shenzhen:{tmp_path}")
    assert [bool(r.masks) for r in found.records] == [False, True, False]
    assert [(r.sex, r.age) for r in found.records] == [("M", 45.0), ("F", 21.0), (None, None)]
    assert [s.image for s in found.skipped] == ["Thumbs.png"]


@pytest.mark.parametrize("reader", ["montgomery", "shenzhen", "siim"])
def test_empty_folders_say_what_is_expected(tmp_path, reader):
    with pytest.raises(DataError, match=r"CXR_png|holds none of"):
        open_collection(f"{reader}:{tmp_path}")
    with pytest.raises(DataError, match="no such folder"):
        open_collection(f"{reader}:{tmp_path / 'none'}")
    (tmp_path / "CXR_png").mkdir()
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\n")
    with pytest.raises(DataError, match="holds no image"):
        open_collection(f"{reader}:{tmp_path}")


def siim(root, lines):
    (root / "train-rle.csv").write_text("ImageId, EncodedPixels\n" + "\n".join(lines) + "\n")
    for name in ("1.2.a", "1.2.b", "1.2.c"):
        save(root / "dicom-images-train" / name / f"{name}.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    return root


def test_siim_has_masks_of_the_positives_and_denies_the_others(tmp_path):
    found = open_collection(f"siim:{siim(tmp_path, ['1.2.a, -1', '1.2.b,100 3 1021 3', '1.2.b,5 2', '1.2.gone,-1'])}")
    a, b = found.records
    assert (a.labels, dict(a.masks)) == ({"Pneumothorax": 0}, {})
    assert b.labels == {"Pneumothorax": 1}
    mask = read_mask(b.masks["Pneumothorax"])
    assert mask.shape == (1024, 1024)
    rows, columns = np.nonzero(mask)
    assert sorted(zip(columns.tolist(), rows.tolist(), strict=True)) == [
        (0, 5), (0, 6), (0, 100), (0, 101), (0, 102), (1, 100), (1, 101), (1, 102)
    ]  # fmt: skip
    assert {(s.image, s.reason) for s in found.skipped} == {
        ("1.2.gone", "missing"), ("1.2.c.png", "not listed in train-rle.csv")
    }  # fmt: skip


@pytest.mark.parametrize(("lines", "says"), [
    (["1.2.a,-1", "1.2.a,5 2"], "has a mask, and a row that says it has none"), (["1.2.a"], "1 fields"),
])  # fmt: skip
def test_contradictions_in_the_table_are_refused(tmp_path, lines, says):
    with pytest.raises(DataError, match=says):
        open_collection(f"siim:{siim(tmp_path, lines)}")


@pytest.mark.skipif(not REAL.is_file(), reason="the real table of SIIM-ACR is not beside this checkout")
def test_the_real_table_has_the_counts_that_are_known(tmp_path):
    table = tmp_path / "train-rle.csv"
    table.write_bytes(gzip.decompress(REAL.read_bytes()))
    runs = read_runs(table)
    assert len(runs) == 12_047
    assert sum(not rows for rows in runs.values()) == 9_378
    positive = {name: rows for name, rows in runs.items() if rows}
    assert len(positive) == 2_669
    assert sum(map(len, positive.values())) == 3_576
    several = {name: rows for name, rows in positive.items() if len(rows) > 1}
    assert len(several) == 624
    assert max(map(len, several.values())) == 10
    apart = {name: [decode_runs(row, 1024, name) for row in rows] for name, rows in several.items()}
    assert sum(np.sum(parts, axis=0).max() > 1 for parts in apart.values()) == 183
    area = [read_mask(RunLengthMask(name, rows)).mean() for name, rows in positive.items()]
    assert np.quantile(area, [0.05, 0.5, 0.95]) == pytest.approx([0.0013, 0.0082, 0.044], rel=0.05)


def test_a_split_by_hash_is_the_same_everywhere():
    assert [split_by_hash(f"p{i}") for i in range(8)] == ["train", "test", *["train"] * 6]
    found = [split_by_hash(f"patient {i}") for i in range(5000)]
    assert [round(found.count(s) / 5000, 2) for s in ("train", "val", "test")] == pytest.approx(
        [0.7, 0.1, 0.2], abs=0.02
    )
