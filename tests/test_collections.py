"""Readers of public collections: official layouts, rules that are said, and the counts of the real label tables."""

import contextlib
import gzip
import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.cli import main
from otcxr.data import open_collection
from otcxr.data.chexpert import FINDINGS as CHEXPERT
from otcxr.data.records import Box
from otcxr.data.rsna import read_opacities
from otcxr.data.tables import parse_options, read_rows
from otcxr.data.vindr import FINDINGS, read_readings
from otcxr.errors import DataError

LABELS = Path(__file__).parents[2] / "shared" / "data" / "labels"
real = pytest.mark.skipif(not LABELS.is_dir(), reason="the real label tables are not beside this checkout")


def image(path, shape=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(1, 250, shape, dtype=np.uint8))


# --- tables and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_rows_of_a_table(tmp_path, zipped):
    text = '\ufeffa, b ,extra\n 1,"x, y",\n\n2,z,3\n'.encode()
    path = tmp_path / ("t.csv.gz" if zipped else "t.csv")
    path.write_bytes(gzip.compress(text) if zipped else text)
    assert read_rows(path, ("b", "a")) == [{"b": "x, y", "a": "1"}, {"b": "z", "a": "2"}]
    with pytest.raises(DataError, match="no column 'c'"):
        read_rows(path, ("c",))


@pytest.mark.parametrize(("name", "data", "says"), [
    ("t.csv", b"a\n\xff\n", "not UTF-8"), ("t.csv", b"a,b\n1\n", "line 2 has 1 fields"),
    ("t.csv.gz", b"not zipped", "cannot be read"),
    ("t.csv.gz", gzip.compress(b"a" * 999, mtime=0)[:-9], "cannot be read"),
], ids=["encoding", "short", "plain", "cut"])  # fmt: skip
def test_broken_tables_are_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name, ("a", "b"))


def test_options_of_a_source(tmp_path):
    known = {"votes": ("2", "1"), "view": ("all", "frontal")}
    (tmp_path / "with, comma").mkdir()
    assert parse_options(str(tmp_path), known) == (tmp_path, {"votes": "2", "view": "all"})
    path, options = parse_options(f"{tmp_path}/with, comma,view=frontal,votes=1", known)
    assert (path.name, options) == ("with, comma", {"votes": "1", "view": "frontal"})
    for wrong, says in ((",vote=1", "did you mean 'votes'"), (",votes=9", "one of 2, 1"), ("/none", "no such folder")):
        with pytest.raises(DataError, match=says):
            parse_options(f"{tmp_path}{wrong}", known)


# --- VinDr-CXR -------------------------------------------------------------------------------------------------------


def vindr(root, extra=()):
    lines = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    lines += [f"aa,No finding,14,R{k},,,," for k in (1, 2, 3)]
    lines += ["bb,Nodule/Mass,8,R1,1,2,5,8", "bb,Nodule/Mass,8,R2,1,2,6,8", "bb,Nodule/Mass,8,R2,10,2,12,8",
              "bb,Cardiomegaly,3,R2,0,0,9,9", "bb,No finding,14,R3,,,,", "gone,No finding,14,R1,,,,",
              "gone,No finding,14,R2,,,,", "gone,No finding,14,R4,,,,"]  # fmt: skip
    (root / "train.csv").write_text("\n".join([*lines, *extra]) + "\n")
    for name in ("aa", "bb", "cc"):
        image(root / "train" / f"{name}.png")
    return root


@pytest.mark.parametrize(("votes", "present", "boxes"), [
    (1, {"Nodule/Mass", "Cardiomegaly"}, 4), (2, {"Nodule/Mass"}, 3), (3, set(), 0),
])  # fmt: skip
def test_votes_decide_what_counts(tmp_path, votes, present, boxes):
    found = open_collection(f"vindr:{vindr(tmp_path)},votes={votes}")
    assert found.findings == FINDINGS
    a, b = found.records
    assert sum(a.labels.values()) == 0
    assert {f for f, v in b.labels.items() if v} == present
    assert len(b.boxes) == boxes
    if boxes:
        assert b.boxes[0] == Box("Nodule/Mass", 1, 2, 4, 6)
    assert {(s.image, s.reason) for s in found.skipped} == {("gone", "missing"), ("cc.png", "not listed in train.csv")}
    assert any(f"{votes} of 3 readers" in note for note in found.notes)


def test_the_majority_is_what_counts_unless_the_source_says_otherwise(tmp_path):
    plain = open_collection(f"vindr:{vindr(tmp_path)}")
    assert plain.records == open_collection(f"vindr:{tmp_path},votes=2").records


@pytest.mark.parametrize(("line", "says"), [
    ("cc,Nodule,8,R1,1,2,5,8", "unknown finding 'Nodule'"), ("bb,ILD,5,R1,5,2,1,8", "ends before it begins"),
    ("bb,ILD,5,R1,a,2,1,8", "not four numbers"), ("bb,ILD,5,R9,1,2,5,8", "4 readers; expected 3"),
    ("bb,Nodule/Mass,8,R1,1,2,500,8", "a box beyond"),
])  # fmt: skip
def test_tables_of_vindr_that_make_no_sense(tmp_path, line, says):
    with pytest.raises(DataError, match=says):
        open_collection(f"vindr:{vindr(tmp_path, [line])}")


def physionet(root, extra=()):
    """The edition of PhysioNet: labels by reader, boxes, a test set by consensus, other names of diseases."""
    folder = root / "annotations"
    folder.mkdir(parents=True)
    lines = ["image_id,rad_id,Nodule/Mass,Edema,Other diseases,No finding"]
    lines += ["aa,R1,0,0,0,1", "aa,R2,0,,0,1", "aa,R3,0.0,0,1.0,0"]
    lines += ["bb,R1,1,1,0,0", "bb,R2,1,0,0,0", "bb,R4,0,0,0,1", *[f"gone,R{k},0,0,0,1" for k in (1, 2, 3)]]
    (folder / "image_labels_train.csv").write_text("\n".join([*lines, *extra]) + "\n")
    lines = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max", "aa,R1,No finding,,,,", "bb,R1,Nodule/Mass,1,2,5,8",
             "bb,R2,Nodule/Mass,1,2,6,8", "bb,R1,Edema,0,0,9,9", "aa,R3,Other disease,1,1,2,2"]  # fmt: skip
    (folder / "annotations_train.csv").write_text("\n".join(lines) + "\n")
    (folder / "image_labels_test.csv").write_text("image_id,Nodule/Mass,Edema,Other disease,No finding\ncc,0,0,1,0\n")
    lines = ("image_id,class_name,x_min,y_min,x_max,y_max", "cc,Other disease,3,4,5,6", "")
    (folder / "annotations_test.csv").write_text("\n".join(lines))
    for split, names in (("train", ("aa", "bb")), ("test", ("cc", "dd"))):
        for name in names:
            image(root / split / f"{name}.png")
    return root


@pytest.mark.parametrize(("votes", "of_a", "of_b", "boxes"), [
    (1, {"Other diseases"}, {"Nodule/Mass", "Edema"}, 3), (2, set(), {"Nodule/Mass"}, 2), (3, set(), set(), 0),
])  # fmt: skip
def test_vindr_of_physionet(tmp_path, votes, of_a, of_b, boxes):
    found = open_collection(f"vindr:{physionet(tmp_path)},votes={votes}")
    assert found.findings == ("Nodule/Mass", "Edema", "Other diseases")
    a, b, c = found.records
    for record, present in ((a, of_a), (b, of_b), (c, {"Other diseases"})):
        assert {f for f, v in record.labels.items() if v} == present
        assert set(record.labels) == set(found.findings)
    assert len(b.boxes) == boxes
    assert c.boxes == (Box("Other diseases", 3, 4, 2, 2),)
    assert (c.split, {a.split, b.split} <= {"train", "val"}) == ("test", True)
    assert {(s.image, s.reason) for s in found.skipped} == {
        ("gone", "missing"), ("dd.png", "not listed in image_labels_*.csv")}  # fmt: skip
    assert any(f"{votes} of 3 readers" in note and f"{len(of_a) + len(of_b)} pairs" in note for note in found.notes)


@pytest.mark.parametrize(("line", "says"), [
    ("ee,R1,0,0,0,1", "ee has 1 readers; expected 3"), ("bb,R9,0,x,0,1", "'x' in column 'Edema'"),
])  # fmt: skip
def test_tables_of_physionet_that_make_no_sense(tmp_path, line, says):
    with pytest.raises(DataError, match=says):
        open_collection(f"vindr:{physionet(tmp_path, [line])}")


def test_tables_of_physionet_without_their_columns(tmp_path):
    path = physionet(tmp_path) / "annotations" / "image_labels_train.csv"
    path.write_text(path.read_text().replace("rad_id", "reader"))
    with pytest.raises(DataError, match="no column 'image_id' or rad_id"):
        open_collection(f"vindr:{tmp_path}")


@real
def test_the_real_table_of_vinbigdata(tmp_path):
    table = LABELS / "vinbigdata-train.csv.gz"
    assert len(read_rows(table, ("image_id",))) == 67_914
    readings = read_readings(table)
    assert len(readings) == 15_000
    assert sum(not reading.votes for reading in readings.values()) == 10_606
    votes = [count for reading in readings.values() for count in reading.votes.values()]
    assert [votes.count(k) for k in (1, 2, 3)] == [6_540, 3_559, 5_266]
    assert len(votes) == 15_365
    assert sum(count >= 2 for count in votes) == 8_825
    assert len({reader for reading in readings.values() for reader in reading.readers}) == 17


# --- RSNA ------------------------------------------------------------------------------------------------------------


def rsna(root, extra=()):
    lines = ["patientId,x,y,width,height,Target", "a,,,,,0", "b,264,152,213,379,1", "b,562,152,256,453,1", "gone,,,,,0"]
    (root / "stage_2_train_labels.csv").write_text("\n".join([*lines, *extra]) + "\n")
    for name in ("a", "b"):
        image(root / "stage_2_train_images" / f"{name}.png", (512, 512))
    return root


def test_rsna_takes_several_rows_of_an_image(tmp_path):
    found = open_collection(f"rsna:{rsna(tmp_path)}")
    a, b = found.records
    assert (a.labels, a.boxes) == ({"Lung Opacity": 0}, ())
    assert b.labels == {"Lung Opacity": 1}
    assert b.boxes == (Box("Lung Opacity", 132, 76, 106.5, 189.5), Box("Lung Opacity", 281, 76, 128, 226.5))
    assert b.patient == "b"
    assert any("no patients are known" in note for note in found.notes)
    assert [s.image for s in found.skipped] == ["gone"]


def test_with_the_mapping_patients_and_split_are_those_of_nih(tmp_path):
    rsna(tmp_path)
    mapping = [
        {"subset_img_id": "a", "img_id": "00000013_005.png"},
        {"subset_img_id": "b", "img_id": "00000013_006.png"},
    ]
    (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mapping))
    a, b = open_collection(f"rsna:{tmp_path}").records
    assert a.patient == b.patient == "00000013"
    assert a.split == b.split  # by a hash of the patient
    (tmp_path / "test_list.txt").write_text("00000013_005.png\n00000013_006.png\n")
    found = open_collection(f"rsna:{tmp_path}")
    assert {r.split for r in found.records} == {"test"}
    assert "the split is NIH's" in found.notes
    (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text("[1]")
    with pytest.raises(DataError, match="subset_img_id"):
        open_collection(f"rsna:{tmp_path}")


@pytest.mark.parametrize(("line", "says"), [
    ("a,1,2,3,4,1", "one for all rows"), ("c,1,2,x,4,1", "not four numbers"), ("c,,,,,2", "expected 0 or 1"),
])  # fmt: skip
def test_tables_of_rsna_that_make_no_sense(tmp_path, line, says):
    with pytest.raises(DataError, match=says):
        open_collection(f"rsna:{rsna(tmp_path, [line])}")


@real
def test_the_real_table_of_rsna(tmp_path):
    with zipfile.ZipFile(LABELS / "kaggle_stage_2_train_labels.csv.zip") as archive:
        (tmp_path / "t.csv").write_bytes(archive.read("stage_2_train_labels.csv"))
    boxes = read_opacities(tmp_path / "t.csv")
    assert len(read_rows(tmp_path / "t.csv", ("patientId",))) == 30_227
    assert len(boxes) == 26_684
    assert sum(bool(own) for own in boxes.values()) == 6_012
    assert sum(map(len, boxes.values())) == 9_555


# --- CheXpert and MIMIC ----------------------------------------------------------------------------------------------


def row_of(values):
    return ",".join(values.get(finding, "") for finding in CHEXPERT)


def chexpert(root, extra=()):
    head = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(CHEXPERT)
    base = "CheXpert-v1.0-small/train"
    rows = [
        f"{base}/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,,"
        + row_of({"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"}),
        f"{base}/patient00001/study1/view2_lateral.jpg,Female,68,Lateral,,," + row_of({"Edema": "1.0"}),
        f"{base}/patient00002/study2/view1_frontal.jpg,Unknown,0,Frontal,PA,1.0," + row_of({}),
        f"{base}/patient00003/study1/view1_frontal.jpg,Male,40,Frontal,AP,," + row_of({}), *extra,
    ]  # fmt: skip
    root.mkdir(exist_ok=True)
    (root / "train.csv").write_text("\n".join([head, *rows]) + "\n")
    (root / "valid.csv").write_text(
        head + "\nCheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,,"
        + row_of({"Cardiomegaly": "1.0"}) + "\n"
    )  # fmt: skip
    for row in rows[:3]:
        image(root / Path(*Path(row.split(",")[0]).parts[1:]))
    image(root / "valid" / "patient64541" / "study1" / "view1_frontal.jpg")
    return root


@pytest.mark.parametrize(("options", "pneumonia", "mass"), [
    ("", None, 0), (",uncertain=ones", 1, 0), (",uncertain=zeros,blank=ignore", 0, None),
])  # fmt: skip
def test_what_becomes_of_the_uncertain_is_said(tmp_path, options, pneumonia, mass):
    found = open_collection(f"chexpert:{chexpert(tmp_path / 'c')}{options}")
    first, lateral, other, valid = found.records
    assert (first.labels.get("Pneumonia"), first.labels.get("Lung Lesion")) == (pneumonia, mass)
    assert (first.labels["Edema"], first.labels["Fracture"]) == (1, 0)
    assert (first.patient, first.study, first.sex, first.age, first.view) == (
        "patient00001", "patient00001/study1", "F", 68.0, "AP"
    )  # fmt: skip
    assert lateral.view == "LATERAL"
    assert (other.sex, other.age, other.view) == (None, None, "PA")
    assert (valid.split, first.split) == ("val", "train")
    assert any("1 uncertain labels" in note for note in found.notes)
    assert [s.reason for s in found.skipped] == ["missing"]


def test_laterals_are_left_out_only_when_asked(tmp_path):
    found = open_collection(f"chexpert:{chexpert(tmp_path / 'c')},view=frontal")
    assert {r.view for r in found.records} == {"AP", "PA"}
    assert any("leaves out 1 other images" in note for note in found.notes)


@pytest.mark.parametrize(("path", "says"), [
    ("CheXpert-v1.0-small/train/../../x/patient00001/study1/v.jpg", "is not .../patientN"),
    ("elsewhere.jpg", "is not .../patientN"),
])  # fmt: skip
def test_paths_of_chexpert_stay_inside(tmp_path, path, says):
    with pytest.raises(DataError, match=says):
        open_collection(f"chexpert:{chexpert(tmp_path / 'c', [f'{path},Male,1,Frontal,AP,,' + row_of({})])}")


def test_labels_that_are_none(tmp_path):
    extra = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Male,1,Frontal,AP,," + row_of(
        {"Edema": "2"}
    )
    with pytest.raises(DataError, match="Edema is '2'"):
        open_collection(f"chexpert:{chexpert(tmp_path / 'c', [extra])}")


def mimic(root, zipped):
    def write(name, text):
        data = text.encode()
        path = root / f"mimic-cxr-2.0.0-{name}.csv{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(data) if zipped else data)

    write("chexpert", f"subject_id,study_id,{','.join(CHEXPERT)}\n10000032,50414267,{row_of({'Edema': '1.0'})}\n")
    write("split", "dicom_id,study_id,subject_id,split\nd1,50414267,10000032,validate\nd2,50414267,10000032,validate\n"
                   "d3,7,10000099,train\n")  # fmt: skip
    write("metadata", "dicom_id,subject_id,study_id,ViewPosition,Rows\nd1,10000032,50414267,PA,9\n"
                      "d2,10000032,50414267,LATERAL,9\nd3,10000099,7,AP,9\nd4,10000099,7,,9\n")  # fmt: skip
    for name in ("p10000032/s50414267/d1", "p10000032/s50414267/d2", "p10000099/s7/d3"):
        image(root / "files" / "p10" / f"{name}.jpg")
    return root


@pytest.mark.parametrize("zipped", [False, True])
def test_mimic_joins_the_labels_of_a_study(tmp_path, zipped):
    found = open_collection(f"mimic:{mimic(tmp_path, zipped)}")
    one, two, three = found.records
    assert one.labels == two.labels
    assert (one.labels["Edema"], one.labels["Fracture"]) == (1, 0)
    assert (one.patient, one.study, one.view, one.split) == ("p10000032", "s50414267", "PA", "val")
    assert two.view == "LATERAL"
    assert (three.labels, three.split) == ({}, "train")
    assert any("1 images are of studies without labels" in note for note in found.notes)
    assert [s.image for s in found.skipped] == ["d4.jpg"]


def test_inspect_says_the_rules(tmp_path, capsys):
    assert main(["data", "inspect", f"vindr:{vindr(tmp_path)}"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 readers" in out
    assert "no patients are known" in out


# --- anything at all -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["vindr", "rsna", "siim", "chexpert"]), st.binary(max_size=400), st.booleans())
def test_any_table_is_read_or_refused(tmp_path_factory, reader, data, headed):
    root = tmp_path_factory.mktemp("any")
    image(root / "a.png")
    name, head = {
        "vindr": ("train.csv", b"image_id,class_name,rad_id,x_min,y_min,x_max,y_max\n"),
        "rsna": ("stage_2_train_labels.csv", b"patientId,x,y,width,height,Target\n"),
        "siim": ("train-rle.csv", b"ImageId, EncodedPixels\n"),
        "chexpert": ("train.csv", ("Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(CHEXPERT) + "\n").encode()),
    }[reader]
    (root / name).write_bytes(head + data if headed else data)
    with contextlib.suppress(DataError):
        assert open_collection(f"{reader}:{root}").findings
