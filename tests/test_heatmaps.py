"""Heat maps over radiographs: pixel for pixel, side by side, as DICOM, and never outside the folder."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from otcxr.cli import main
from otcxr.data.dataset import DataConfig
from otcxr.data.images import fit_square
from otcxr.data.views import ViewsConfig
from otcxr.dicom_out import write_secondary_capture, write_segmentation
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.results import evaluate_run
from otcxr.evaluation.tasks import EvaluateConfig
from otcxr.files import file_name
from otcxr.heatmaps import compare_runs
from otcxr.overlay import TRUE, frames, from_square, overlay
from otcxr.report import write_report
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

REAL = Path(__file__).parents[2] / "shared" / "data" / "dicom"
EVIL = "../../evil <img src=x>"

# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_radiograph_is_never_covered():
    rng = np.random.default_rng(0)
    image, heat = rng.random((6, 8)), rng.random((6, 8))
    plain = np.round(image * 255).astype(np.uint8)
    assert np.array_equal(overlay(image, np.zeros((6, 8)), 0.0), np.repeat(plain[..., None], 3, 2))
    bright, dark = (overlay(np.full((1, 1), v), np.ones((1, 1)), 1.0)[0, 0].astype(int) for v in (1.0, 0.0))
    assert ((bright - dark) == round(255 * 0.4)).all()
    assert np.array_equal(overlay(image, heat, 1.0), overlay(image, 3 * heat, 3.0))  # one scale: the top decides
    assert np.array_equal(overlay(image, heat, 0.5), overlay(image, np.minimum(heat, 0.5), 0.5))


@pytest.mark.parametrize("shape", [(60, 100), (101, 60), (64, 64), (97, 31)])
@pytest.mark.parametrize("size", [50, 128])
def test_a_map_comes_back_onto_the_pixels_it_was_made_of(shape, size):
    """A planted marker, through the square that encoders see and back."""
    import torch

    image = torch.zeros(1, *shape)
    rows, columns = slice(20, 40), slice(5, 25)
    image[0, rows, columns] = 1
    back = from_square(fit_square(image, size)[0].numpy(), *shape)
    assert back.shape == shape
    found = np.argwhere(back > 0.5)
    pitch = max(shape) / size
    assert np.abs(found.min(0) - [20, 5]).max() <= max(1, pitch)
    assert np.abs(found.max(0) - [39, 24]).max() <= max(1, pitch)
    assert np.abs(found.mean(0) - [29.5, 14.5]).max() <= 0.3


def test_a_frame_is_around_the_pixels_of_the_box():
    picture = frames(np.zeros((20, 30, 3), np.uint8), [(4, 6, 9, 12)], TRUE)
    drawn = np.argwhere((picture == TRUE).all(-1))
    assert drawn.min(0).tolist() == [6, 4]
    assert drawn.max(0).tolist() == [11, 8]
    assert not picture[7:11, 5:8].any()
    assert frames(np.zeros((5, 5, 3), np.uint8), [(2, 2, 2.2, 2.2)], TRUE).any()  # less than a pixel is one


@given(st.text(max_size=120))
def test_a_name_leads_nowhere_else(text):
    name = file_name(text)
    assert Path(name).name == name
    assert name not in ("", ".", "..")
    assert not name.startswith(".")
    assert len(name) <= 90


@given(st.lists(st.text(max_size=12), unique=True, min_size=2, max_size=4))
def test_different_names_stay_different(texts):
    assert len({file_name(text) for text in texts}) == len(texts)


# --- runs ------------------------------------------------------------------------------------------------------------


def write_dicom(path, pixels, patient):
    file = pydicom.dataset.FileMetaDataset()
    file.TransferSyntaxUID, file.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1"
    file.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = file
    data.SOPClassUID, data.SOPInstanceUID = file.MediaStorageSOPClassUID, file.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientID, data.PatientName, data.AccessionNumber, data.Modality = patient, "Doe^Jane", "A-17", "CR"
    data.PhotometricInterpretation, data.SamplesPerPixel, data.PixelRepresentation = "MONOCHROME2", 1, 0
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelSpacing = [0.4, 0.4]
    data.PixelData = pixels.astype(np.uint8).tobytes()
    data.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Radiographs of 60 x 80 pixels, a part of them DICOM; a bright square is the finding with the evil name."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    lines = ["image,patient,split," + f'"{EVIL}"']
    for number in range(72):
        pixels = np.clip(rng.normal(90, 20, (60, 80)), 1, 200)
        has = number % 2
        if has:
            r, c = rng.integers(4, 40), rng.integers(4, 60)
            pixels[r : r + 14, c : c + 14] = 250
        split = ("train", "train", "val", "test")[number // 2 % 4]
        name = f"i{number:03d}.{'dcm' if split == 'test' else 'png'}"
        if split == "test":
            write_dicom(root / name, pixels, f"P{number}")
        else:
            cv2.imwrite(str(root / name), pixels.astype(np.uint8))
        lines.append(f"{name},P{number},{split},{has}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Two runs, each with a linear probe."""
    place = tmp_path_factory.mktemp("runs")
    out = []
    for method in ("simclr", "otcxr"):
        run = pretrain(PretrainConfig(
            data=DataConfig(f"folder:{folder}"), views=ViewsConfig(size=64), method=method,
            encoder=EncoderConfig(name="resnet18", width=8, stride=16), out=str(place / method),
            train=TrainConfig(epochs=1, batch_size=12, accelerator="cpu", probes=1, online_images=0),
        ))  # fmt: skip
        evaluate_run(run, "linear", config=EvaluateConfig(fractions=(1.0,), seeds=1, resamples=50, within=()))
        out.append(run)
    return out


def test_side_by_side_and_nothing_outside(runs, tmp_path):
    out = tmp_path / "a" / "b" / "out"
    entries = compare_runs(runs, out, each=3)
    (entry,) = entries
    assert entry["title"] == EVIL
    assert "simclr, otcxr" in entry["text"]
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(out).as_posix() for path in everything) == sorted(["index.json", entry["file"]])
    assert (out / entry["file"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "index.json").read_text()) == entries
    picture = cv2.imread(str(out / entry["file"]))
    assert picture.shape[0] > picture.shape[1] * 0.8  # a row of radiographs, and one for each encoder


def test_one_run_too_writes_only_into_its_folder(runs, capsys):
    run = runs[1]
    before = set(run.path.parent.rglob("*"))
    assert main(["explain", str(run.path)]) == 0
    new = set(run.path.parent.rglob("*")) - before
    assert new
    assert all(path.is_relative_to(run.path / "explain") for path in new)
    assert "explorer.html" in capsys.readouterr().out
    page = write_report([run], run.path / "report.html").read_text()
    assert "<img src=x>" not in page
    assert "evil &lt;img src=x&gt;" in page


def test_dicom_opens_beside_its_source(runs, folder, tmp_path):
    compare_runs(runs, tmp_path, each=2, dicom=True)
    captures, regions = (sorted((tmp_path / "dicom").glob(f"*-{kind}.dcm")) for kind in ("sc", "seg"))
    assert len(captures) == 4  # two images of two runs
    for path in captures:
        made = pydicom.dcmread(path)
        source = pydicom.dcmread(folder / f"{path.name.split('-')[0]}.dcm")
        for name in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
            assert made[name].value == source[name].value
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        assert (made.Rows, made.Columns, made.SamplesPerPixel) == (source.Rows, source.Columns, 3)
        assert made.SOPClassUID.name.startswith("Secondary Capture")
        assert made.SeriesDescription.startswith("not for diagnosis: ")
        assert "not for diagnosis" in made.DerivationDescription
    for path in regions:
        made = pydicom.dcmread(path)
        source = pydicom.dcmread(folder / f"{path.name.split('-')[0]}.dcm")
        assert made.Modality == "SEG"
        assert made.StudyInstanceUID == source.StudyInstanceUID
        assert made.PatientID == source.PatientID
        assert made.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == (
            source.SOPInstanceUID
        )
        assert made.pixel_array.shape[-2:] == source.pixel_array.shape
        assert made.pixel_array.any()


def test_a_marker_stays_where_it_is_in_dicom(tmp_path):
    pixels = np.full((60, 80), 40, np.uint8)
    pixels[10:20, 50:70] = 200
    write_dicom(tmp_path / "source.dcm", pixels, "P1")
    mask = np.zeros((60, 80), bool)
    mask[10:20, 50:70] = True
    write_segmentation(tmp_path / "source.dcm", mask, "Mass", tmp_path / "seg.dcm")
    assert np.array_equal(pydicom.dcmread(tmp_path / "seg.dcm").pixel_array.reshape(60, 80) > 0, mask)
    picture = overlay(pixels / 255, mask.astype(float), 1.0)
    write_secondary_capture(tmp_path / "source.dcm", picture, "Mass", tmp_path / "sc.dcm")
    made = pydicom.dcmread(tmp_path / "sc.dcm")
    assert np.array_equal(made.pixel_array, picture)
    assert [float(x) for x in made.PixelSpacing] == [0.4, 0.4]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real DICOM file is not beside this checkout")
def test_a_real_file(tmp_path):
    source = next(path for path in REAL.glob("1.2.*.dcm"))
    original = pydicom.dcmread(source)
    shape = (original.Rows, original.Columns)
    write_secondary_capture(source, np.zeros((*shape, 3), np.uint8), "Pneumothorax", tmp_path / "sc.dcm")
    mask = np.zeros(shape, bool)
    mask[100:300, 200:400] = True
    write_segmentation(source, mask, "Pneumothorax", tmp_path / "seg.dcm")
    for name in ("sc.dcm", "seg.dcm"):
        made = pydicom.dcmread(tmp_path / name)
        assert made.StudyInstanceUID == original.StudyInstanceUID
        assert made.PatientID == original.PatientID


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch, runs):
    write_dicom(tmp_path / "s.dcm", np.full((20, 20), 9, np.uint8), "P1")
    with pytest.raises(DataError, match="20 x 20 pixels, the picture 20 x 21"):
        write_secondary_capture(tmp_path / "s.dcm", np.zeros((20, 21, 3), np.uint8), "x", tmp_path / "o.dcm")
    with pytest.raises(DataError, match="no evidence"):
        write_segmentation(tmp_path / "s.dcm", np.zeros((20, 20), bool), "x", tmp_path / "o.dcm")
    (tmp_path / "no.dcm").write_bytes(b"no DICOM")
    with pytest.raises(DataError, match="not a readable DICOM"):
        write_secondary_capture(tmp_path / "no.dcm", np.zeros((20, 20, 3), np.uint8), "x", tmp_path / "o.dcm")
    bare = pydicom.dcmread(tmp_path / "s.dcm")
    del bare.StudyInstanceUID
    bare.save_as(tmp_path / "bare.dcm")
    with pytest.raises(DataError, match="no StudyInstanceUID"):
        write_secondary_capture(tmp_path / "bare.dcm", np.zeros((20, 20, 3), np.uint8), "x", tmp_path / "o.dcm")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"otcxr\[dicom\]"):
        write_segmentation(tmp_path / "s.dcm", np.ones((20, 20), bool), "x", tmp_path / "o.dcm")
    assert not (tmp_path / "o.dcm").exists()
    with pytest.raises(ConfigError, match="different names"):
        compare_runs([runs[0], runs[0]], tmp_path)


def test_words_that_do_not_go_together(runs, capsys):
    paths = [str(run.path) for run in runs]
    assert main(["explain", *paths]) == 1
    assert "--out" in capsys.readouterr().err
    assert main(["explain", paths[0], "--dicom", "true"]) == 1
    assert "--dicom needs --out" in capsys.readouterr().err
