"""From folders and tables to records: every NIH layout, any folder, and errors that say what to do."""

from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest

from conftest import encode_png
from otcxr.data.folder import read_folder
from otcxr.data.images import load_image
from otcxr.data.nih import FINDINGS, read_nih
from otcxr.data.records import Collection, Record, full_valid
from otcxr.data.sources import READERS, open_collection
from otcxr.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = (
    "00000001_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,57,M,AP,2894,2729,0.143,0.15",
    "00000002_000.png,Infiltration,0,2,412,F,PA,2500,2048,0.168,0.168",
    "00000003_000.png,Pleural_Thickening,0,3,,X,LL,,,,",
)
NAMES = tuple(row.split(",")[0] for row in ROWS)
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
LAYOUTS = {
    "nested": "images/{}",
    "archives": "images_00{number}/images/{}",
    "flat": "{}",
    "deep": "images/part/{number}/{}",
}


def nih(
    root, *, layout="nested", table="Data_Entry_2017_v2020.csv", header=HEADER, rows=ROWS, size=(48, 64), boxes=None
):
    """Make a miniature of the NIH folder."""
    root.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        path = root / LAYOUTS[layout].format(name, number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(20, 230, size, dtype=np.uint8)
        path.write_bytes(encode_png(pixels))
    if table:
        (root / table).write_text("\n".join((header, *rows)) + "\n")
    if boxes:
        (root / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    return root


def by_name(collection):
    return {record.name: record for record in collection.records}


def save(root, name, text=None):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.write_bytes(encode_png(np.random.default_rng(len(name)).integers(20, 230, (12, 16), dtype=np.uint8)))
    else:
        path.write_text(text)
    return path


# -------------------------------------------------------------------------------------------------------------- NIH


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"])
def test_nih_in_every_layout(tmp_path, layout, table):
    collection = read_nih(str(nih(tmp_path, layout=layout, table=table)))
    assert collection.name == f"nih:{tmp_path}"
    assert collection.findings == FINDINGS
    assert collection.skipped == ()
    assert [record.name for record in collection.records] == list(NAMES)  # in the order of the table
    for record in collection.records:
        assert load_image(record.image).shape == (1, 48, 64)
        assert record.source == "nih"
        assert record.boxes == ()
        assert record.split == ""
        assert tuple(record.labels) == FINDINGS  # all are assessed
    first, second, third, fourth = collection.records
    assert [f for f, present in first.labels.items() if present] == ["Cardiomegaly", "Emphysema"]
    assert not any(second.labels.values())
    assert third.labels["Infiltration"] == 1
    assert [r.patient for r in collection.records] == ["1", "1", "2", "3"]
    assert len({r.study for r in collection.records}) == 4
    assert [r.age for r in collection.records] == [58, 57, None, None]
    assert [r.sex for r in collection.records] == ["M", "M", "F", None]
    assert [r.view for r in collection.records] == ["PA", "AP", "PA", None]
    # pitch of the detector times original over stored pixels; rows are y
    assert second.spacing == pytest.approx((0.15 * 2729 / 48, 0.143 * 2894 / 64))
    assert fourth.spacing is None


def test_nih_newer_table_wins_and_trailing_commas_are_harmless(tmp_path):
    nih(tmp_path, header=HEADER + ",Unnamed: 11", rows=[row + "," for row in ROWS])
    (tmp_path / "Data_Entry_2017.csv").write_text(HEADER + "\n")
    plain = read_nih(str(nih(tmp_path / "plain")))
    collection = read_nih(str(tmp_path))
    assert [r._replace(image=None) for r in collection.records] == [r._replace(image=None) for r in plain.records]
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\ufeff" + "\r\n".join((HEADER + ",", *ROWS)))  # from Excel
    assert len(read_nih(str(tmp_path)).records) == 4


@pytest.mark.parametrize("header", [BOXES, "Image Index,Finding Label,Bbox [x,y,w,h],Unnamed: 6,Unnamed: 7,Unnamed: 8"])
@pytest.mark.parametrize("size", [(48, 64), (256, 256), (1024, 1024)])
def test_nih_boxes_are_scaled_to_the_pixels_found(tmp_path, header, size):
    rows = (
        "00000002_000.png,Infiltrate,512.0,256.0,128.0,64.0,,,",
        "00000001_000.png,Cardiomegaly,0,0,1024,1024,,,",
        "00000001_000.png,Mass,1,2,3,4,,,",
    )
    records = by_name(read_nih(str(nih(tmp_path, size=size, boxes=(header, *rows)))))
    height, width = size
    (box,) = records["00000002_000.png"].boxes
    assert box.finding == "Infiltration"
    assert box[1:] == pytest.approx((width / 2, height / 4, width / 8, height / 16))
    first, second = records["00000001_000.png"].boxes
    assert first[1:] == pytest.approx((0, 0, width, height))
    assert second.finding == "Mass"
    assert second[1:] == pytest.approx((width / 1024, height / 512, width * 3 / 1024, height / 256))
    assert records["00000001_001.png"].boxes == ()


def test_nih_missing_and_damaged_images_are_listed(tmp_path):
    nih(tmp_path, rows=(*ROWS, "00000009_000.png,No Finding,0,9,50,F,PA,1,1,1,1"))
    (tmp_path / "images" / NAMES[1]).write_bytes(b"\xff\xd8 a JPEG that is named as a PNG")
    (tmp_path / "images" / NAMES[2]).write_bytes(b"")
    collection = read_nih(str(tmp_path))
    assert [record.name for record in collection.records] == [NAMES[0], NAMES[3]]
    reasons = {item.image: item.reason for item in collection.skipped}
    assert set(reasons) == {NAMES[1], NAMES[2], "00000009_000.png"}
    assert "not a PNG" in reasons[NAMES[1]]
    assert "cut short" in reasons[NAMES[2]]
    assert reasons["00000009_000.png"] == "missing"


def test_nih_splits(tmp_path):
    nih(tmp_path)
    (tmp_path / "train_val_list.txt").write_text("\n".join(NAMES[:2]))
    (tmp_path / "test_list.txt").write_text(f"{NAMES[3]}\r\n")
    collection = read_nih(str(tmp_path))
    assert [record.split for record in collection.records] == ["train", "train", "", "test"]
    assert [record.name for record in collection.split("train").records] == list(NAMES[:2])
    assert collection.split("test").findings == FINDINGS
    (tmp_path / "test_list.txt").write_text("\n".join(NAMES[1:]))
    with pytest.raises(DataError, match=rf"{NAMES[1]} is in train_val_list.txt and in test_list.txt; remove it"):
        read_nih(str(tmp_path))


def nih_error(root, match):
    with pytest.raises(DataError, match=match):
        read_nih(str(root))


def test_nih_without_a_patient(tmp_path):
    nih_error(
        nih(tmp_path / "gap", rows=(ROWS[0].replace(",0,1,", ",0,,"), *ROWS[1:])), "names no patient for 00000001_000"
    )


def test_nih_errors_say_what_is_wrong(tmp_path):
    nih_error(tmp_path / "nowhere", "no such folder: .*nowhere; expected the folder that holds Data_Entry")
    (tmp_path / "empty").mkdir()
    nih_error(tmp_path / "empty", r"Data_Entry_2017_v2020.csv is missing under .*empty;.*Found: nothing")
    root = nih(tmp_path / "a", table="")
    (root / "README.txt").write_text("x")
    nih_error(root, r"is missing under .*a; .*beside images/. Found: README.txt, images/")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Data_Entry_2017.csv").write_text(HEADER)
    nih_error(tmp_path / "b", r"no \*.png under .*b or its images\* folders; unpack")
    nih_error(
        nih(tmp_path / "c", header=HEADER.replace("Patient ID", "Patient")), "has no column 'Patient ID'; expected"
    )
    nih_error(nih(tmp_path / "d", rows=(ROWS[0].replace("Emphysema", "Emphysemia"),)), "'Emphysemia', which is none")
    nih_error(nih(tmp_path / "e", rows=(ROWS[0], NAMES[1])), r"v2020.csv line 3 has 1 fields; expected at least 11")
    nih_error(nih(tmp_path / "f", boxes=(BOXES, f"{NAMES[0]},Mass,1,2,x,4,,,")), f"box on {NAMES[0]} that is not four")
    nih_error(
        nih(tmp_path / "g", boxes=(BOXES, f"{NAMES[0]},Masses,1,2,3,4,,,")), f"'Masses' on {NAMES[0]}, which is none"
    )
    nih_error(nih(tmp_path / "h", boxes=("Image Index,Finding Label,x,y,w,h",)), r"no column 'Bbox \[x'")
    (nih(tmp_path / "i") / "Data_Entry_2017_v2020.csv").write_bytes(b"Image Index,\xff\xfe")
    nih_error(tmp_path / "i", "is not UTF-8 text")
    nih_error(nih(tmp_path / "j", header="", rows=()), "has no column 'Image Index'")


def test_real_nih_mini(shared_data):
    collection = open_collection(f"nih:{shared_data / 'nih-mini'}")
    records = by_name(collection)
    assert len(records) == len(collection.records) == 761
    assert len({record.patient for record in collection.records}) == 541
    assert collection.skipped == ()
    train, test = collection.split("train"), collection.split("test")
    assert (len(train.records), len(test.records)) == (477, 284)
    assert {r.patient for r in train.records}.isdisjoint(r.patient for r in test.records)
    boxed = [record for record in collection.records if record.boxes]
    assert len(boxed) == 31
    assert sum(len(record.boxes) for record in boxed) == 36
    assert sum(len(record.boxes) for record in test.records) == 16
    for record in boxed:
        for box in record.boxes:
            assert record.labels[box.finding] == 1
            assert 0 <= box.x < box.x + box.width <= 256
            assert 0 <= box.y < box.y + box.height <= 256
    # 863.004444444444,693.229045138889,72.8177777777778,112.64 in the frame of the originals
    effusion, infiltration = records["00010277_000.png"].boxes[:2]
    assert effusion.finding == "Effusion"
    assert effusion[1:] == pytest.approx(tuple(v / 4 for v in (863.0044444, 693.2290451, 72.8177778, 112.64)))
    assert infiltration.finding == "Infiltration"
    patient = records["00000061_012.png"]
    assert [f for f, one in patient.labels.items() if one] == [
        "Effusion", "Infiltration", "Pneumonia", "Edema", "Pleural_Thickening",
    ]  # fmt: skip
    assert (patient.patient, patient.age, patient.sex, patient.view) == ("61", 77, "M", "AP")
    assert patient.spacing == pytest.approx((0.139 * 2544 / 256, 0.139 * 3056 / 256))
    assert Counter(r.labels["Pneumonia"] for r in collection.records)[1] > 300
    assert all(record.age is not None and record.sex and record.view for record in collection.records)


def test_real_boxes_hold_the_same_picture_at_both_sizes(shared_data, tmp_path):
    """The reader scales the boxes differently for the originals and for their reductions by four."""
    mini = shared_data / "nih-mini"
    (tmp_path / "images").symlink_to(mini / "originals")
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        (tmp_path / name).symlink_to(mini / name)
    originals, reduced = read_nih(str(tmp_path)), by_name(read_nih(str(mini)))
    assert len(originals.records) == 16
    assert len(originals.skipped) == 761 - 16
    boxed = [record for record in originals.records if record.boxes]
    assert len(boxed) == 8
    for record in boxed:
        twin = reduced[record.name]
        for big, small in zip(record.boxes, twin.boxes, strict=True):
            assert big[1:] == pytest.approx(tuple(4 * v for v in small[1:]))
            assert big.x + big.width <= 1024
            assert big.y + big.height <= 1024
    box = boxed[0].boxes[0]
    crops = []
    for record, scale in ((boxed[0], 1), (reduced[boxed[0].name], 4)):
        left, top, right, bottom = (round(v / scale) for v in (box.x, box.y, box.x + box.width, box.y + box.height))
        picture = load_image(record.image)[0, top:bottom, left:right].numpy()
        crops.append(cv2.resize(picture, (24, 24), interpolation=cv2.INTER_AREA).ravel())
    assert np.corrcoef(*crops)[0, 1] > 0.95


# ----------------------------------------------------------------------------------------------------------- folder


def test_folder_without_a_table(tmp_path):
    for name in ("b.png", "a/x.PNG", "c/x.png", "a/notes.txt", "d.jpeg"):
        save(tmp_path, name)
    collection = read_folder(str(tmp_path))
    assert collection.name == f"folder:{tmp_path}"
    assert collection.findings == ()
    assert [record.study for record in collection.records] == ["a/x.PNG", "b.png", "c/x.png", "d.jpeg"]
    assert [record.patient for record in collection.records] == [record.study for record in collection.records]
    assert all(
        record.labels == {} and record.split == "" and record.source == "folder" for record in collection.records
    )
    assert collection.skipped == ()


def test_folder_with_one_table(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png", "e.png"):
        save(tmp_path, name)
    save(
        tmp_path,
        "labels.csv",
        "image,patient,sex,age,view,study,split,Mass,Nodule,score,empty\n"
        "b.png,p1,female,061Y,pa,s1,train,1,,0.3,\n"
        "a.png,p1,M,200,LL,,train,0,1,1,\n"
        "sub/c.png,p2,,,AP,,test,,0,0,\n"  # by its path
        "d.png,p3,U,50,,,val,1,1,2,\n"  # by its bare name
        "gone.png,p4,M,40,PA,,train,1,1,2,\n",
    )
    collection = read_folder(str(tmp_path))
    assert collection.findings == ("Mass", "Nodule")  # score holds other numbers, empty holds nothing
    b, a, c, d = collection.records
    assert [r.name for r in (b, a, c, d)] == ["b.png", "a.png", "c.png", "d.png"]
    assert (b.patient, b.sex, b.age, b.view, b.study, b.split) == ("p1", "F", 61, "PA", "s1", "train")
    assert (a.patient, a.sex, a.age, a.view) == ("p1", "M", None, None)
    assert (c.sex, c.age, c.view, c.split, d.sex) == (None, None, "AP", "test", None)
    assert len({r.study for r in collection.records}) == 4
    assert [dict(r.labels) for r in collection.records] == [
        {"Mass": 1}, {"Mass": 0, "Nodule": 1}, {"Nodule": 0}, {"Mass": 1, "Nodule": 1},
    ]  # fmt: skip
    assert {item.image: item.reason for item in collection.skipped} == {
        "gone.png": "missing",
        "e.png": "not listed in labels.csv",
    }
    assert [r.name for r in collection.split("train").records] == ["b.png", "a.png"]
    assert d.image == tmp_path / "sub" / "d.png"


def test_folder_labels_from_floating_point_columns(tmp_path):
    """Tables with gaps are often written with 1.0 and 0.0; losing such a finding in silence would be worse."""
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path, name)
    save(tmp_path, "t.csv", "image,patient,Mass,Edema\na.png,1,1.0, 1\nb.png,2,,0 \nc.png,3,0.0,1\n")
    collection = read_folder(str(tmp_path))
    assert collection.findings == ("Mass", "Edema")
    assert [dict(r.labels) for r in collection.records] == [
        {"Mass": 1, "Edema": 1}, {"Edema": 0}, {"Mass": 0, "Edema": 1},
    ]  # fmt: skip


def test_folder_two_tables(tmp_path):
    save(tmp_path, "a.png")
    save(tmp_path, "one.csv", "image,patient,Mass\na.png,p1,1\n")
    save(tmp_path, "two.csv", "image,patient,Mass\na.png,p2,0\n")
    with pytest.raises(DataError, match=r"several tables \(one.csv, two.csv\); say which: folder:.*,csv=one.csv"):
        read_folder(str(tmp_path))
    assert read_folder(f"{tmp_path},csv=one.csv").records[0].patient == "p1"
    assert read_folder(f"{tmp_path},csv={tmp_path / 'two.csv'}").records[0].patient == "p2"
    assert read_folder(f"{tmp_path},csv=none").findings == ()
    assert read_folder(f"{tmp_path},csv=none").records[0].patient == "a.png"
    with pytest.raises(DataError, match=r"no such table: three.csv, neither under"):
        read_folder(f"{tmp_path},csv=three.csv")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_folder_options_and_a_path_with_commas(tmp_path, order):
    root = tmp_path / "films, 2019,csv=old"
    save(root, "a.png")
    save(root, "one.csv", "file,who,Mass\na.png,p7,1\n")
    save(root, "two.csv", "x\n")
    options = ("csv=one.csv", "image=file", "patient=who")
    text = ",".join((str(root), *(options[i] for i in order)))
    collection = open_collection(f"folder:{text}")
    assert collection.name == f"folder:{text}"
    assert collection.records[0].patient == "p7"
    assert collection.findings == ("Mass",)


def test_folder_same_name_in_several_folders(tmp_path):
    for name in ("x.png", "a/x.png", "b/x.png"):
        save(tmp_path, name)
    save(tmp_path, "t.csv", "image,patient\nx.png,1\na/x.png,2\nb/x.png,3\n")
    collection = read_folder(str(tmp_path))  # "x.png" is a path, too, and the only one of that name
    assert [r.image for r in collection.records] == [tmp_path / n for n in ("x.png", "a/x.png", "b/x.png")]
    assert len({r.study for r in collection.records}) == 3
    (tmp_path / "x.png").unlink()
    with pytest.raises(DataError, match=r"t.csv line 2: 'x.png' is not one image: 2 files .* give paths relative to"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("file,patient\na.png,1\n", r"has no column 'image'; .*Found: file, patient.*folder:PATH,image=COLUMN"),
        ("image;patient\na.png;1\n", r"has no column 'image'.*Found: image;patient"),
        ("image,who\na.png,1\n", r"has no column 'patient'.*folder:PATH,patient=COLUMN"),
        ("", r"has no column 'image'"),
        ("image,patient\na.png,1\n\na.png,1\n", r"line 4: 'a.png' .*an earlier line names it too"),
        ("image,patient\na.png, \n", r"line 2 has no patient; fill column 'patient'"),
        ("image,patient,Mass,Mass\na.png,1,0,1\n", r"two columns 'Mass'; rename"),
    ],
)
def test_folder_tables_that_are_refused(tmp_path, table, match):
    save(tmp_path, "a.png")
    save(tmp_path, "t.csv", table)
    with pytest.raises(DataError, match=match):
        read_folder(str(tmp_path))


def test_folder_other_errors(tmp_path):
    with pytest.raises(DataError, match=r"no such folder: .*nowhere; check data.source"):
        read_folder(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no radiograph; expected files ending in \.dcm"):
        read_folder(str(tmp_path))
    save(tmp_path, "a.png")
    (tmp_path / "t.csv").write_bytes("image,patient\na.png,Müller\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t.csv is not UTF-8 text .*; save it as UTF-8 CSV"):
        read_folder(str(tmp_path))
    (tmp_path / "t.csv").write_bytes("image,patient\na.png,Müller\n".encode("utf-8-sig"))
    assert read_folder(str(tmp_path)).records[0].patient == "Müller"


# ------------------------------------------------------------------------------------------------------ collections


def test_open_collection(tmp_path):
    assert set(READERS) == {
        "chexpert",
        "folder",
        "mimic",
        "montgomery",
        "nih",
        "pack",
        "phantom",
        "rsna",
        "shenzhen",
        "siim",
        "vindr",
    }
    assert len(open_collection("phantom:3,size=32").records) == 3
    nih(tmp_path)
    assert len(open_collection(f"nih:{tmp_path}").records) == 4
    for source in ("nih", "nih:", "", "phantom"):
        with pytest.raises(DataError, match=rf"data.source is '{source}'; expected READER:ARGUMENT"):
            open_collection(source)
    with pytest.raises(DataError, match="unknown reader 'phantm' in data.source; did you mean 'phantom'"):
        open_collection("phantm:3")
    with pytest.raises(
        DataError,
        match="unknown reader 'zzz' in data.source; known: chexpert, folder, mimic, .*, vindr",
    ):
        open_collection("zzz:3")


def some(tmp_path, splits):
    return Collection("x:y", (), [Record(tmp_path, str(i), patient, split=s) for i, (patient, s) in enumerate(splits)])


def test_split_never_cuts_through_a_patient(tmp_path):
    fine = some(tmp_path, [("a", "train"), ("b", "test"), ("a", "train"), ("b", ""), ("c", "val")])
    assert [r.study for r in fine.split("train").records] == ["0", "2"]
    assert fine.split("test").name == "x:y"
    cut = some(tmp_path, [("a", "train"), ("b", "train"), ("b", "test"), ("c", "val")])
    for name in ("train", "test"):
        with pytest.raises(DataError, match=rf"1 patients of x:y are in split '{name}' and .*\(first: b\).*mend"):
            cut.split(name)
    assert len(cut.split("val").records) == 1


def test_unknown_split(tmp_path):
    fine = some(tmp_path, [("a", "train"), ("b", "test")])
    with pytest.raises(DataError, match=r"x:y has no record in split 'trian'; did you mean 'train'"):
        fine.split("trian")
    with pytest.raises(DataError, match=r"'holdout'; known: test, train"):
        fine.split("holdout")
    with pytest.raises(DataError, match=r"'train'; this source defines no splits"):
        some(tmp_path, [("a", "")]).split("train")


def test_full_valid(save_png):
    image = load_image(save_png("a.png"))
    assert full_valid(image).shape == image.shape
    assert full_valid(image).all()


def test_nih_names_are_unique_when_folders_overlap(tmp_path):
    """A partly repeated download must not change which file is read from one call to the next."""
    nih(tmp_path, layout="archives")
    nih(tmp_path, layout="nested")
    first = read_nih(str(tmp_path))
    assert len(first.records) == 4
    folders = defaultdict(list)
    for record in first.records:
        folders[record.image.parent.parent.name].append(record.name)
    assert first.records == read_nih(str(tmp_path)).records
    assert list(folders) == [tmp_path.name]  # images/ sorts before images_000/
