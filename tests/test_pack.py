"""Packs: what goes in comes out, whatever dies on the way; names stay at home; a second run adds what is new."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from io import BytesIO

import cv2
import imagehash
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import encode_png
from otcxr.cli import main
from otcxr.data import open_collection
from otcxr.data.dataset import PixelCache, check_records
from otcxr.data.identity import site_key
from otcxr.data.images import load_image
from otcxr.data.pack import AGE_BANDS, PackedImage, age_band, open_index, read_pack
from otcxr.data.records import Box, Radiograph, column, full_valid, take
from otcxr.errors import ConfigError, DataError
from otcxr.packing import PackConfig, pack_collection
from otcxr.packing.burned import LEAST, longest_line
from otcxr.packing.frontal import unlike_frontal
from otcxr.packing.page import NEAR, near_duplicates
from otcxr.packing.reduce import Task, perceptual_hash, reduce_image, target_shape
from otcxr.packing.store import Journal, Shards, replay
from otcxr.packing.workers import Failure, decode_all
from test_images import dicom, noise, smooth


def picture(seed, height=60, width=48):
    return smooth(height, width, seed)


def mixed(root, count=14, seed=0):
    """Files of every kind with a table; returns the folder. Patients are called SMITH^n, files too."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = ["image,patient,sex,age,view,split,Mass,Nodule"]
    for k in range(count):
        image, name = picture(100 * seed + k), f"SMITH-{k:04d}"
        kind = ("png", "jpg", "dcm", "png16", "rgba", "tif")[k % 6]
        path = root / f"part{k % 3}" / f"{name}.{kind[:3]}"
        path.parent.mkdir(exist_ok=True)
        if kind == "png":
            path.write_bytes(encode_png(image))
        elif kind == "jpg":
            path.write_bytes(bytes(cv2.imencode(".jpg", image)[1]))
        elif kind == "dcm":
            wide = image.astype(np.uint16) * 16
            path.write_bytes(dicom(wide, WindowCenter=2048, WindowWidth=4096, PatientID="SMITH^HEADER",
                                   PixelSpacing=[0.2, 0.2]))  # fmt: skip
        elif kind == "png16":
            path = path.with_suffix(".png")
            path.write_bytes(encode_png(image.astype(np.uint16) * 257))
        elif kind == "rgba":
            path = path.with_suffix(".png")
            whole = np.dstack([image, image, image, np.full_like(image, 255)])
            whole[:6, :, 3] = 0
            path.write_bytes(encode_png(whole))
        else:
            path.write_bytes(bytes(cv2.imencode(".tif", image)[1]))
        place = path.relative_to(root).as_posix()
        split = "train" if k // 2 % 3 else "test"
        lines.append(f"{place},SMITH^{k // 2},{'FM'[k // 2 % 2]},{10 + 6 * (k // 2)},{('PA', 'AP')[k % 2]},{split},"
                     f"{rng.integers(2)},{'' if k % 4 == 3 else rng.integers(2)}")  # fmt: skip
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return root


def pack(source, out, **more):
    config = {"size": 32, "workers": 1, "max_skipped": 0.5, **more}
    key = config.pop("key", None)
    return pack_collection(str(source), out, PackConfig(**config), key=key)


def content(out):
    """Everything that must be the same, byte by byte."""
    files = [*sorted((out / "shards").glob("*.npy")), out / "index.parquet"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("bits", [8, 16])
def test_pixels_are_those_of_the_source_reduced_by_area(tmp_path, bits):
    source = mixed(tmp_path / "in")
    packed = pack(f"folder:{source}", tmp_path / "out", bits=bits)
    assert (packed.rows, packed.new, packed.aliases, packed.skipped, packed.conflicts) == (14, 14, 0, (), ())
    before, after = open_collection(f"folder:{source}").records, read_pack(str(tmp_path / "out")).records
    assert len(before) == len(after) == 14
    step = 0.5 / (2**bits - 1)
    for a, b in zip(before, after, strict=True):
        whole = load_image(a.image)[0].double().numpy()
        seen = b.image.radiograph()
        assert seen.image.shape == (1, 40, 32)
        # 60 x 48 to 40 x 32: each pixel is the mean of 1.5 x 1.5, so of weights 1, 1/2 over two neighbours
        weights = [np.zeros((n, m)) for n, m in ((40, 60), (32, 48))]
        for w in weights:
            for k in range(len(w)):
                for j in range(w.shape[1]):
                    w[k, j] = max(0, min(j + 1, 1.5 * (k + 1)) - max(j, 1.5 * k)) / 1.5
        expected = weights[0] @ whole @ weights[1].T
        tolerance = step + (0.51 / 255 if a.image.suffix in (".png", ".jpg", ".tif") and bits == 8 else 1e-4)
        assert np.abs(seen.image[0].double().numpy() - expected).max() < tolerance, a.name
        dead = a.image.name in {f"SMITH-{k:04d}.png" for k in range(4, 14, 6)}
        assert bool(seen.valid[0, :4].any()) != dead
        assert bool(seen.valid[0, 5:].all())
        assert seen.spacing == b.spacing
        if a.image.suffix == ".dcm":
            assert b.spacing == pytest.approx((0.3, 0.3))


def test_what_is_known_of_images_comes_out_again(tmp_path):
    source = mixed(tmp_path / "in")
    pack(f"folder:{source}", tmp_path / "out")
    before, packed = open_collection(f"folder:{source}"), open_collection(f"pack:{tmp_path / 'out'}")
    assert packed.findings == before.findings
    groups = {}
    for a, b in zip(before.records, packed.records, strict=True):
        assert (a.sex, a.view, a.split, dict(a.labels), a.source) == (b.sex, b.view, b.split, dict(b.labels), b.source)
        assert int(a.age) // 10 == int(b.age) // 10
        assert groups.setdefault(a.patient, b.patient) == b.patient
    assert len(set(groups.values())) == len(groups) == 7
    part = packed.split("test")
    assert column(part.records, "split") == ["test"] * len(part.records)
    assert list(part.records) == [r for r in packed.records if r.split == "test"]


def test_boxes_and_masks_are_of_the_reduced_picture(tmp_path):
    before = open_collection("phantom:40,seed=4,size=64,prevalence=0.5").records
    pack("phantom:40,seed=4,size=64,prevalence=0.5", tmp_path / "out", size=32)
    after = read_pack(str(tmp_path / "out")).records
    boxed = 0
    for a, b in zip(before, after, strict=True):
        assert len(a.boxes) == len(b.boxes)
        for x, y in zip(a.boxes, b.boxes, strict=True):
            assert y == Box(x.finding, *(pytest.approx(v / 2, abs=1e-4) for v in x[1:]))
            boxed += 1
        assert set(a.masks) == set(b.masks)
        for name, mask in a.masks.items():
            whole = mask.radiograph().image[0].numpy()
            small = b.masks[name].radiograph().image[0].numpy()
            share = whole.reshape(32, 2, 32, 2).mean((1, 3))
            assert set(np.unique(small)) <= {0, 1}
            assert (small > 0).any() == (whole > 0).any()  # nothing vanishes
            if (share >= 0.5).any():
                assert np.array_equal(small > 0, share >= 0.5), name
    assert boxed > 10


def test_ages_become_bands():
    assert [age_band(age) for age in (0, 9.9, 10, 89.5, 90, 104, None)] == [
        "0-9", "0-9", "10-19", "80-89", "90+", "90+", None]  # fmt: skip
    assert len(AGE_BANDS) == 10


@pytest.mark.parametrize(("shape", "spacing", "size", "expected"), [
    ((60, 48), None, 32, (40, 32)), ((48, 60), (0.1, 0.1), 32, (32, 40)), ((20, 30), None, 32, (20, 30)),
    ((100, 100), (0.1, 0.2), 100, (50, 100)), ((100, 200), (0.2, 0.1), 50, (50, 50)),
    ((4000, 3000), (0.1, 0.1005), 512, (683, 512)), ((1000, 3), None, 32, (1000, 3)),
])  # fmt: skip
def test_pixels_become_square_and_nothing_is_enlarged(shape, spacing, size, expected):
    assert target_shape(shape, spacing, size) == expected


def test_training_on_a_pack_is_training_on_its_files(tmp_path):
    """Small 8-bit pictures are kept as they are, so the weights must be the same to the last bit."""
    from otcxr.train import config_from_plain, pretrain

    source = mixed(tmp_path / "in", 24)
    for path in [p for p in source.rglob("*") if p.suffix in (".dcm",)]:
        path.unlink()
    (source / "table.csv").unlink()
    pack(f"folder:{source}", tmp_path / "out", size=64)

    def trained(text):
        run = pretrain(config_from_plain({
            "method": {"name": "otcxr-uniform"}, "out": str(tmp_path / text.partition(":")[0]),
            "data": {"source": text}, "views": {"size": 32}, "encoder": {"name": "resnet18", "width": 8, "stride": 16},
            "train": {"epochs": 1, "batch_size": 8, "accelerator": "cpu", "probes": 1, "online_images": 0},
        }))  # fmt: skip
        return torch.load(run.path / "last.ckpt", weights_only=False)["method"]

    plain, packed = trained(f"folder:{source}"), trained(f"pack:{tmp_path / 'out'}")
    assert plain.keys() == packed.keys()
    assert all(torch.equal(plain[name], packed[name]) for name in plain)


# ----------------------------------------------------------------------------------------------------- names stay home


def test_no_name_of_the_source_is_in_the_pack(tmp_path, config_home):
    source = mixed(tmp_path / "in")
    (source / "part0" / "SMITH-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    more = "".join(f"{name}.png,SMITH^9,M,40,PA,train,1,0\n" for name in ("part0/SMITH-broken", "SMITH-gone"))
    (source / "table.csv").write_text((source / "table.csv").read_text() + more)
    packed = pack(f"folder:{source}", tmp_path / "out")
    assert len(packed.skipped) == 2
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"SMITH" not in path.read_bytes(), path
            assert "SMITH" not in path.name
    listed = list((config_home / "packs").glob("*.csv"))
    assert len(listed) == 1
    assert listed[0].stat().st_mode & 0o777 == 0o600
    names = {row["id"]: row["name"] for row in csv.DictReader(listed[0].read_text().splitlines())}
    assert {names[item.image] for item in packed.skipped} == {"part0/SMITH-broken.png", "SMITH-gone.png"}
    assert (config_home / "site.key").stat().st_mode & 0o777 == 0o600
    facts = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert facts["key"] == site_key().fingerprint
    assert site_key().secret.hex() not in (tmp_path / "out" / "pack.json").read_text()


def test_reasons_of_a_reader_say_no_name_and_no_place(tmp_path):
    from test_readers import NAMES, nih

    root = nih(tmp_path / "SMITH-FOLDER")
    next(root.rglob(NAMES[0])).write_bytes(b"\x89PNG\r\n\x1a\n")
    next(root.rglob(NAMES[1])).unlink()
    packed = pack(f"nih:{root}", tmp_path / "out", max_skipped=0.9)
    assert sorted(item.reason.replace(item.image, "ID")[:23] for item in packed.skipped) == [
        "ID is a PNG that is cut", "missing"]  # fmt: skip
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"SMITH-FOLDER" not in content, path
            assert b"/images" not in content, path
            assert not any(name.encode() in content for name in NAMES), path


def test_keys(tmp_path):
    one, other = site_key(tmp_path / "a" / "k"), site_key(tmp_path / "b" / "k")
    assert one == site_key(tmp_path / "a" / "k")
    assert one.fingerprint != other.fingerprint
    assert one.name("patient", "7") != other.name("patient", "7")
    assert one.name("patient", "7") != one.name("study", "7")
    assert len({one.name("patient", str(k)) for k in range(1000)}) == 1000
    assert set(one.name("x", "y")) <= set("0123456789abcdef")
    wide = tmp_path / "wide"
    shutil.copy(tmp_path / "a" / "k", wide)
    wide.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        site_key(wide)
    none = tmp_path / "none"
    none.write_text("abc\n")
    none.chmod(0o600)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        site_key(none)


def test_the_folder_may_move(tmp_path):
    source = mixed(tmp_path / "in", 6)
    pack(f"folder:{source}", tmp_path / "out")
    source.rename(tmp_path / "elsewhere")
    assert pack(f"folder:{tmp_path / 'elsewhere'}", tmp_path / "out").new == 0


def test_headers_say_who_dicom_files_are_of(tmp_path):
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    of = {"PatientID": "SMITH7", "StudyInstanceUID": "1.2.3", "PatientSex": "F", "PatientAge": "044Y",
          "ViewPosition": "PA", "PixelSpacing": [0.1, 0.1]}  # fmt: skip
    for k in range(3):
        wide = picture(k).astype(np.uint16) * 16
        (root / "a" / f"SMITH-{k}.dcm").write_bytes(dicom(wide, **window, **(of if k < 2 else {"PatientID": "X"})))
    (root / "b.png").write_bytes(encode_png(picture(9)))
    (root / "c.dcm").write_bytes(b"nothing")
    collection = open_collection(f"folder:{root}")
    a, b, c, d, e = collection.records
    assert a.patient == b.patient == site_key().name("patient", "SMITH7")
    assert a.study == b.study == site_key().name("study", "1.2.3")
    assert (a.sex, a.age, a.view, a.spacing) == ("F", 44, "PA", (0.1, 0.1))
    assert c.patient not in (a.patient, "X")
    assert c.study == "a/SMITH-2.dcm"
    assert (d.patient, e.patient) == ("b.png", "c.dcm")
    assert "3 of 5 files name their patient" in collection.notes[0]
    plain = open_collection(f"folder:{root},headers=no")
    assert [r.patient for r in plain.records] == [r.study for r in plain.records]
    with pytest.raises(DataError, match="headers must be yes or no"):
        open_collection(f"folder:{root},headers=maybe")
    pack(f"folder:{root}", tmp_path / "out")
    people = column(read_pack(str(tmp_path / "out")).records, "patient")
    assert len(people) == 4
    assert len(set(people)) == 3
    # a source that knows less than the files, such as a table without sex: the header fills in
    (root / "t.csv").write_text("image,patient,view\na/SMITH-0.dcm,P1,AP\n")
    pack(f"folder:{root}", tmp_path / "table", max_skipped=0.9)
    record = read_pack(str(tmp_path / "table")).records[0]
    assert (record.sex, record.age, record.view) == ("F", 45, "AP")


# ------------------------------------------------------------------------------------------ equal, odd and broken files


def test_equal_pictures_share_their_pixels_and_contradictions_are_listed(tmp_path):
    source = mixed(tmp_path / "in", 6)
    shutil.copy(source / "part0" / "SMITH-0000.png", source / "copy.png")
    text = (source / "table.csv").read_text()
    first = text.splitlines()[1].split(",")
    flipped = str(1 - int(first[6]))
    (source / "table.csv").write_text(
        text + f"copy.png,SMITH^77,M,{first[3]},{first[4]},{first[5]},{flipped},{first[7]}\n"
    )
    packed = pack(f"folder:{source}", tmp_path / "out")
    assert (packed.rows, packed.aliases) == (7, 1)
    a, b = (read_pack(str(tmp_path / "out")).records[k] for k in (0, 6))
    assert (a.image.shard, a.image.offset) == (b.image.shard, b.image.offset)
    assert torch.equal(a.image.radiograph().image, b.image.radiograph().image)
    assert a.image != b.image
    _, table = open_index(str(tmp_path / "out"))
    assert table.column("alias_of").to_pylist() == [None] * 6 + [a.name]
    assert {c.field for c in packed.conflicts} == {"patient", "sex", "Mass"}
    assert all((c.image, c.first) == (b.name, a.name) for c in packed.conflicts)
    rows = list(csv.DictReader((tmp_path / "out" / "conflicts.csv").read_text().splitlines()))
    assert len(rows) == 3
    total = sum(shard.size for shard in map(np.load, sorted((tmp_path / "out" / "shards").glob("0*.npy"))))
    assert total == 6 * 40 * 32


@dataclass(frozen=True)
class Trouble:
    """A picture whose reading does something to its process."""

    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"

    def radiograph(self) -> Radiograph:
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.kind == "exits":
            os._exit(3)
        if self.kind == "hangs":
            time.sleep(600)
        if self.kind == "eats":
            np.ones(2 * 10**9, dtype=np.uint8)
        if self.kind == "raises":
            raise RuntimeError("no such thing")
        if self.kind == "slow":
            time.sleep(0.3)
        image = torch.from_numpy(picture(self.seed).astype(np.float32) / 255)[None]
        return Radiograph(image, full_valid(image), None)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_costs_its_worker_and_nothing_else(workers):
    kinds = ["fine", "dies", "fine", "hangs", "eats", "slow", "raises", "exits", "fine", "dies", "fine", "fine"]
    tasks = [Task(Trouble(kind, k), {}, None, None, 32, 8) for k, kind in enumerate(kinds)]
    results = list(decode_all(iter(tasks), workers=workers, memory_gb=1.0, timeout_s=15.0))
    assert [number for number, _ in results] == list(range(len(kinds)))
    for (number, result), kind in zip(results, kinds, strict=True):
        if kind in ("fine", "slow"):
            assert result.digest == reduce_image(tasks[number]).digest
        else:
            assert isinstance(result, Failure)
            says = {"dies": "SIGSEGV", "exits": "exit code 3", "hangs": "within 15 s", "eats": "more than 1 GB",
                    "raises": "RuntimeError: no such thing"}[kind]  # fmt: skip
            assert says in result.reason


def test_nothing_to_do_and_more_workers_than_tasks():
    assert list(decode_all(iter(()), workers=2, memory_gb=1, timeout_s=9)) == []
    one = [Task(Trouble("fine", 1), {}, None, None, 32, 8)]
    assert len(list(decode_all(iter(one), workers=3, memory_gb=1, timeout_s=9))) == 1


def test_flags_are_kept_and_not_acted_upon(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    plain = {"WindowCenter": 2048, "WindowWidth": 4096}
    wide = picture(1).astype(np.uint16) * 16
    (root / "a.dcm").write_bytes(dicom(wide, **plain, ViewPosition="LL"))
    (root / "b.dcm").write_bytes(dicom(wide[::-1], **plain, Modality="MR", BodyPartExamined="SKULL"))
    (root / "c.dcm").write_bytes(dicom(wide[:, ::-1], **plain, BodyPartExamined="CHEST", BurnedInAnnotation="YES"))
    (root / "d.png").write_bytes(encode_png(picture(5)))
    packed = pack(f"folder:{root}", tmp_path / "out")
    assert packed.rows == 4
    flags = open_index(str(tmp_path / "out"))[1].column("flags").to_pylist()
    assert "lateral by its header or table" in flags[0]
    assert {"modality MR", "body part SKULL"} <= set(flags[1])
    assert "annotation burned in" in flags[2]
    assert not any("body part" in flag for flag in flags[2])
    assert flags[3] == ["unlike a frontal chest radiograph"]  # a cloud
    assert read_pack(str(tmp_path / "out")).records[0].view == "LATERAL"


def test_the_check_for_frontal_radiographs():
    images = [r.image.radiograph().image[0].numpy() for r in open_collection("phantom:60,seed=9,size=96").records]
    assert sum(map(unlike_frontal, images)) <= 3
    assert sum(unlike_frontal(1 - image) for image in images) >= 57
    assert sum(unlike_frontal(np.ascontiguousarray(np.rot90(image))) for image in images) >= 50
    for image in images[:9]:  # any grey scale
        assert unlike_frontal(image) == unlike_frontal(image**3)


@pytest.mark.parametrize("bits", [8, 16])
def test_writing_is_noticed_and_a_marker_is_none(bits):
    images = [r.image.radiograph().image[0].numpy() for r in open_collection("phantom:8,seed=3,size=512").records]
    for k, image in enumerate(images):
        picture = np.round(image * 220).astype(np.uint8)
        named, marked = picture.copy(), picture.copy()
        cv2.putText(named, "DOE JANE 1956", (20 + 40 * k, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 1, cv2.LINE_AA)
        cv2.putText(marked, "R", (30, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2, cv2.LINE_AA)
        wide = (lambda p: p.astype(np.uint16) * 257) if bits == 16 else (lambda p: p)
        assert longest_line(wide(named)) >= LEAST
        assert longest_line(wide(marked)) < LEAST
        assert longest_line(wide(picture)) < LEAST
        inside = picture.copy()
        cv2.putText(inside, "DOE", (240, 256), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1)
        assert longest_line(wide(inside)) < LEAST  # three signs, and not near an edge
    assert longest_line(np.zeros((40, 30), np.uint8)) == 0


def test_broken_files_are_set_aside_with_reason_and_picture(tmp_path):
    source = mixed(tmp_path / "in", 8)
    (source / "table.csv").unlink()
    (source / "cut.png").write_bytes(encode_png(noise((99, 99)))[:500])
    (source / "white.png").write_bytes(encode_png(np.full((40, 40), 255, np.uint8)))
    screen = noise((50, 40, 3))
    (source / "screen.dcm").write_bytes(dicom(screen, SamplesPerPixel=3, PhotometricInterpretation="RGB",
                                              PlanarConfiguration=0))  # fmt: skip
    packed = pack(f"folder:{source}", tmp_path / "out", workers=2)
    assert packed.rows == 8
    reasons = {
        row["id"]: row["reason"]
        for row in csv.DictReader((tmp_path / "out" / "quarantine.csv").read_text().splitlines())
    }
    assert len(reasons) == 3
    for text in ("cut short", "every pixel is 1.000", "'RGB'"):
        assert any(text in reason for reason in reasons.values())
    assert len(list((tmp_path / "out" / "quarantine").glob("*.png"))) >= 1
    page = (tmp_path / "out" / "data.html").read_text()
    assert "every pixel is #.###" in page
    # mended, they come in, and nothing else is decoded again
    (source / "cut.png").write_bytes(encode_png(picture(77)))
    shards = content(tmp_path / "out")
    again = pack(f"folder:{source}", tmp_path / "out")
    assert (again.rows, again.new, len(again.skipped)) == (9, 1, 2)
    after = content(tmp_path / "out")
    assert all(after[name] == data for name, data in shards.items() if name.endswith(".npy"))
    assert after.keys() - shards.keys() == {"shards/000001.npy"}


def test_too_much_that_is_broken_is_refused_and_nothing_is_lost(tmp_path):
    source = mixed(tmp_path / "in", 6)
    (source / "table.csv").unlink()
    for k in range(3):
        (source / f"bad{k}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3 of 9 images .* --max_skipped 0.334"):
        pack(f"folder:{source}", tmp_path / "out", max_skipped=0.1)
    with pytest.raises(DataError, match="is no pack"):
        read_pack(str(tmp_path / "out"))
    before = [line for line in replay(tmp_path / "out" / "journal.jsonl") if "id" in line]
    assert len(before) == 9
    packed = pack(f"folder:{source}", tmp_path / "out", max_skipped=0.4)
    assert (packed.rows, len(packed.skipped)) == (6, 3)
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_what_cannot_be_a_pack(tmp_path):
    source = mixed(tmp_path / "in", 6)
    pack(f"folder:{source}", tmp_path / "out")
    for more, says in (({"size": 48}, "size 32, now 48"), ({"bits": 16}, "bits 8, now 16"),
                       ({"key": tmp_path / "other.key"}, "key ")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            pack(f"folder:{source}", tmp_path / "out", **more)
    with pytest.raises(ConfigError, match="into its source"):
        pack(f"folder:{source}", source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other things \(thesis.doc\)"):
        pack(f"folder:{source}", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.doc"]  # nothing is left behind
    for wrong in ({"size": 8}, {"bits": 12}, {"workers": -1}, {"memory_gb": 0}, {"max_skipped": 2}):
        with pytest.raises(ConfigError):
            PackConfig(**wrong)


# --------------------------------------------------------------------------------------------------- killed and gone on


def test_workers_do_not_change_a_byte(tmp_path):
    source = mixed(tmp_path / "in", 20)
    one, three = (tmp_path / name for name in ("one", "three"))
    pack(f"folder:{source}", one, shard_gb=8e-6)
    pack(f"folder:{source}", three, workers=3, shard_gb=8e-6)
    assert content(one) == content(three)
    assert len([name for name in content(one) if name.startswith("shards/0")]) == 4


def test_a_second_run_adds_what_is_new_and_takes_new_labels(tmp_path):
    source = mixed(tmp_path / "in", 8)
    text = (source / "table.csv").read_text()
    (source / "table.csv").write_text("\n".join(text.splitlines()[:6]) + "\n")
    pack(f"folder:{source}", tmp_path / "out")
    old = list(read_pack(str(tmp_path / "out")).records)
    lines = text.splitlines()
    lines[1] = lines[1].replace(",PA,", ",AP,")
    (source / "table.csv").write_text("\n".join(lines) + "\n")
    packed = pack(f"folder:{source}", tmp_path / "out")
    assert (packed.rows, packed.new) == (8, 3)
    new = list(read_pack(str(tmp_path / "out")).records)
    assert new[0] == old[0]._replace(view="AP")
    assert new[1:5] == old[1:5]
    # what the source has no more stays
    (source / "table.csv").write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    assert pack(f"folder:{source}", tmp_path / "out").rows == 8
    assert list(read_pack(str(tmp_path / "out")).records) == new


def test_a_second_run_keeps_what_only_headers_say(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    wide = picture(1).astype(np.uint16) * 16
    (root / "a.dcm").write_bytes(dicom(wide, **window, PatientSex="F", PatientAge="044Y", ViewPosition="PA"))
    (root / "b.png").write_bytes(encode_png(picture(2)))
    (root / "t.csv").write_text("image,patient\na.dcm,P1\n")
    pack(f"folder:{root}", tmp_path / "out", max_skipped=0.9)
    (root / "t.csv").write_text("image,patient,sex\na.dcm,P2,\nb.png,P3,M\n")
    assert pack(f"folder:{root}", tmp_path / "out").new == 1
    a, b = read_pack(str(tmp_path / "out")).records
    assert (a.sex, a.age, a.view, b.sex) == ("F", 45, "PA", "M")
    assert a.patient == site_key().name("patient", "P2")


def test_a_pack_goes_on_although_the_source_has_lost_files(tmp_path, monkeypatch):
    import otcxr.packing.collection as module

    source = mixed(tmp_path / "in", 8)
    pack(f"folder:{source}", tmp_path / "whole")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Index, "table", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(f"folder:{source}", tmp_path / "out")
    lines = (source / "table.csv").read_text().splitlines()
    (source / lines[2].split(",")[0]).unlink()
    (source / "table.csv").write_text("\n".join([lines[0], lines[1], *lines[3:]]) + "\n")
    assert pack(f"folder:{source}", tmp_path / "out").rows == 8
    whole, out = (read_pack(str(tmp_path / name)).records for name in ("whole", "out"))
    assert [r._replace(image=None) for r in out] == [r._replace(image=None) for r in whole]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_rows_in_many_parts_are_the_same_rows(tmp_path, monkeypatch):
    import otcxr.packing.index as module

    source = mixed(tmp_path / "in", 20)
    pack(f"folder:{source}", tmp_path / "one")
    monkeypatch.setattr(module, "_ROWS", 3)
    pack(f"folder:{source}", tmp_path / "many")
    assert [r._replace(image=None) for r in read_pack(str(tmp_path / "one")).records] == [
        r._replace(image=None) for r in read_pack(str(tmp_path / "many")).records]  # fmt: skip
    (source / "new.png").write_bytes(encode_png(picture(500)))
    (source / "table.csv").write_text((source / "table.csv").read_text() + "new.png,P,M,40,PA,train,1,\n")
    assert pack(f"folder:{source}", tmp_path / "many").rows == 21


def test_another_pack_where_one_was_read_is_read_anew(tmp_path):
    def first(seed):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        pack(f"folder:{mixed(tmp_path / f'in{seed}', 4, seed)}", tmp_path / "out")
        return read_pack(str(tmp_path / "out")).records[0].image.radiograph().image

    one, two = first(1), first(2)
    assert not torch.equal(one, two)
    assert torch.equal(two, read_pack(str(tmp_path / "out")).records[0].image.radiograph().image)


def killed(source, out, rng, kills, span, more=()):
    """Pack in a process of its own, killed ``kills`` times at random moments, then to the end."""
    command = [sys.executable, "-m", "otcxr", "pack", source, str(out), "--size", "32", "--workers", "2",
               "--shard_gb", "8e-6", "--max_skipped", "0.5", *more]  # fmt: skip
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            process.wait(rng.uniform(*span))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        else:
            assert process.returncode == 0, process.stderr.read().decode()
            break  # it was faster than we wanted to kill it
        finally:
            process.stderr.close()
            process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return done


def test_killed_packs_go_on_to_the_same_bytes(tmp_path):
    """Stopped after every k-th line of the journal, and with half a line and half a picture behind it."""
    source = mixed(tmp_path / "in", 12)
    (source / "broken.png").write_bytes(b"no")
    (source / "table.csv").unlink()
    shutil.copy(source / "part0" / "SMITH-0000.png", source / "z.png")
    pack(f"folder:{source}", tmp_path / "whole", shard_gb=8e-6)
    expected = content(tmp_path / "whole")

    class Stop(Exception):
        pass

    for stop in range(1, 14):
        out, seen = tmp_path / f"cut{stop}", 0
        with pytest.MonkeyPatch.context() as patch:
            real = Journal.append

            def append(self, line, real=real, stop=stop):
                nonlocal seen
                real(self, line)
                self.sync()
                seen += 1
                if seen > stop:
                    raise Stop

            patch.setattr(Journal, "append", append)
            with contextlib.suppress(Stop):
                pack(f"folder:{source}", out, shard_gb=8e-6)
        with (out / "journal.jsonl").open("ab") as file:
            file.write(b'{"id":"half a li')
        for part in (out / "shards").glob("*.part"):
            with part.open("ab") as file:
                file.write(bytes(700))
        packed = pack(f"folder:{source}", out, shard_gb=8e-6, workers=2)
        assert (packed.rows, packed.aliases, len(packed.skipped)) == (13, 1, 1)
        assert content(out) == expected, stop


@pytest.mark.parametrize("where", ["shards", "index", "facts"])
def test_killed_at_the_very_end(tmp_path, monkeypatch, where):
    import otcxr.packing.collection as module

    source = mixed(tmp_path / "in", 8)
    pack(f"folder:{source}", tmp_path / "whole")
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        if where == "shards":
            patch.setattr(module.Index, "table", stop)
        else:
            real = module.write_atomic

            def write(path, data):
                real(path, data)
                if path.name == {"index": "index.parquet", "facts": "pack.json"}[where]:
                    raise Stop

            patch.setattr(module, "write_atomic", write)
        with pytest.raises(Stop):
            pack(f"folder:{source}", out)
    assert (out / "journal.jsonl").exists()
    packed = pack(f"folder:{source}", out)
    assert packed.rows == 8
    assert content(out) == content(tmp_path / "whole")


def test_killed_by_the_system_at_random_moments(tmp_path):
    source = f"folder:{mixed(tmp_path / 'in', 30)}"
    pack(source, tmp_path / "whole", workers=2, shard_gb=8e-6)
    killed(source, tmp_path / "out", random.Random(0), 3, (1.0, 2.5))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    """500 mixed files, 20 kills at random moments after the first second: the same bytes as without."""
    root = mixed(tmp_path / "in", 500)
    (root / "table.csv").unlink()
    rng = random.Random(1)
    for k in range(12):
        (root / f"bad{k}.png").write_bytes(bytes(rng.randrange(256) for _ in range(50)))
        shutil.copy(root / "part0" / "SMITH-0000.png", root / f"same{k}.png")
    for path in list(root.rglob("SMITH-*.png"))[:60]:  # some that take long
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        path.write_bytes(encode_png(np.repeat(np.repeat(image, 20, 0), 20, 1)))
    source = f"folder:{root}"
    pack(source, tmp_path / "whole", workers=2, shard_gb=8e-6)
    done = killed(source, tmp_path / "out", rng, 20, (0.9, 2.2))
    assert done == 20
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), cut=st.integers(0, 12), extra=st.integers(0, 50),
       limit=st.integers(1, 90))  # fmt: skip
def test_shards_that_are_cut_and_gone_on_with(tmp_path_factory, lengths, cut, extra, limit):
    folder = tmp_path_factory.mktemp("shards")
    parts = [np.full(n, k, dtype=np.uint16) for k, n in enumerate(lengths)]

    def written(root, first, then):
        shards = Shards(root, "", np.uint16, limit)
        places = [shards.append(part) for part in first]
        if then is not None:
            for _ in range(extra):  # more than the journal knows
                shards.append(np.zeros(7, np.uint16))
            shards.close()
            shards = Shards(root, "", np.uint16, limit)
            shards.go_on(*((places[-1][0], places[-1][1] + first[-1].size) if places else (0, 0)))
            places += [shards.append(part) for part in then]
        shards.finish()
        return places

    plain = written(folder / "a", parts, None)
    resumed = written(folder / "b", parts[:cut], parts[cut:])
    assert plain == resumed
    assert {p.name: p.read_bytes() for p in (folder / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (folder / "b").iterdir()}  # fmt: skip
    for (shard, offset), part in zip(plain, parts, strict=True):
        stored = np.load(folder / "a" / f"{shard:06d}.npy")
        assert np.array_equal(stored[offset : offset + part.size], part)
        assert stored.nbytes <= max(limit, 2 * max(lengths))


# --------------------------------------------------------------------------------------------------- reading a pack


@pytest.fixture
def packed(tmp_path):
    pack(f"folder:{mixed(tmp_path / 'in', 12)}", tmp_path / "out")
    return tmp_path / "out"


def test_records_are_made_when_they_are_asked_for(packed):
    records = open_collection(f"pack:{packed}").records
    assert len(records) == 12
    assert records[-1] == records[11] == list(records)[11]
    with pytest.raises(IndexError):
        records[12]
    assert list(records[2:9:3]) == [records[2], records[5], records[8]]
    assert list(take(records, [3, 1])) == [records[3], records[1]]
    assert column(records[4:], "patient") == [r.patient for r in records[4:]]
    for name in ("name", "study", "sex", "view", "split", "source", "labelled"):
        assert column(records, name) == [getattr(r, name) for r in records], name
    copy = pickle.loads(pickle.dumps(records[3:7]))
    assert list(copy) == list(records[3:7])
    assert len(pickle.dumps(records[3:7])) < 1000
    assert {records[0].image: 1}[pickle.loads(pickle.dumps(records[0].image))] == 1
    assert isinstance(records[0].image, PackedImage)
    assert str(records[0].image) == records[0].name


def test_a_pack_is_not_read_before_training(packed, monkeypatch):
    collection = open_collection(f"pack:{packed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedImage, "stored", lambda self: pytest.fail("read"))
        checked = check_records(collection, PixelCache(1), 0.0)
    assert checked.usable == list(range(12))
    again = check_records(collection, PixelCache(0), 0.0, again=True)
    assert again.usable == checked.usable
    part = collection._replace(records=collection.records[:11])
    assert check_records(part, PixelCache(0), 0.0).contents != checked.contents


def test_what_is_mostly_padding_is_passed_over(tmp_path):
    image = np.zeros((60, 60), np.uint8)
    image[:, 28:33] = noise((60, 5))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_png(image))
    (tmp_path / "in" / "b.png").write_bytes(encode_png(picture(3)))
    pack(f"folder:{tmp_path / 'in'}", tmp_path / "out", size=60)
    checked = check_records(open_collection(f"pack:{tmp_path / 'out'}"), PixelCache(0), 0.5)
    assert checked.usable == [1]
    assert "only 8.3% of its area is a picture" in checked.skipped[0].reason


@pytest.mark.parametrize("bits", [8, 16])
def test_the_cache_gives_stored_pixels_without_a_copy(tmp_path, bits):
    pack(f"folder:{mixed(tmp_path / 'in', 6)}", tmp_path / "out", bits=bits)
    image = open_collection(f"pack:{tmp_path / 'out'}").records[0].image
    cache = PixelCache(1.0, bits=bits)
    own = cache.grey(image).pixels if bits == 8 else image.stored().pixels
    assert not own.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        own[0, 0] = 1
    for kept in (8, 16):
        seen = PixelCache(1.0, bits=kept).get(image).image
        assert np.abs((seen - image.radiograph().image).numpy()).max() <= (0 if kept >= bits else 0.5001 / 255)
        grey = PixelCache(1.0, bits=kept).grey(image).pixels
        assert grey.dtype == np.uint8
        assert np.abs(grey / 255 - image.radiograph().image[0].numpy()).max() <= 0.5001 / 255


def test_damaged_packs_are_named(packed, tmp_path):
    def broken(change, says):
        copy = tmp_path / "copy"
        shutil.copytree(packed, copy)
        change(copy)
        with pytest.raises(DataError, match=says):
            [record.image.radiograph() for record in read_pack(str(copy)).records]
        shutil.rmtree(copy)

    def edit(copy, **more):
        facts = json.loads((copy / "pack.json").read_text())
        (copy / "pack.json").write_text(json.dumps(facts | more))

    shard = "shards/000000.npy"
    broken(lambda c: (c / "pack.json").unlink(), "is no pack")
    broken(lambda c: (c / "pack.json").write_text("{"), "is no pack")
    broken(lambda c: (c / "pack.json").write_text("[]"), "format list")
    broken(lambda c: edit(c, format=99), "format 99")
    broken(lambda c: edit(c, shards=3), "damaged")
    broken(lambda c: edit(c, shards=[{"name": "../x", "bytes": 1}]), "damaged")
    broken(lambda c: edit(c, rows=99), "12 rows, pack.json says 99")
    broken(lambda c: edit(c, findings=["Other"]), "cannot be read")
    broken(lambda c: (c / "index.parquet").unlink(), "cannot be read")
    broken(lambda c: (c / "index.parquet").write_bytes(b"PAR1"), "not the file that pack.json was written for")
    broken(lambda c: (c / shard).unlink(), "has no bytes, expected")
    broken(lambda c: os.truncate(c / shard, 500), "has 500 bytes, expected")
    broken(lambda c: (c / shard).write_bytes(bytes((c / shard).stat().st_size)), "is no shard")
    with pytest.raises(DataError, match="no such folder"):
        read_pack(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------ near duplicates


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(2, 30))
def test_near_duplicates_are_all_pairs_that_differ_little(seed, count):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    for k in range(1, count, 2):  # every other one is its neighbour with some bits turned
        bits = np.unpackbits(hashes[k - 1])
        bits[rng.choice(256, rng.integers(0, 14), replace=False)] ^= 1
        hashes[k] = np.packbits(bits)
    expected = {
        (i, j, int(np.bitwise_count(hashes[i] ^ hashes[j]).sum()))
        for i in range(count) for j in range(i + 1, count)
        if np.bitwise_count(hashes[i] ^ hashes[j]).sum() <= NEAR
    }  # fmt: skip
    assert set(map(tuple, near_duplicates(hashes))) == expected


def test_near_duplicates_of_a_crowd_and_of_nothing():
    assert near_duplicates(np.zeros((0, 32), np.uint8)) == []
    assert near_duplicates(np.zeros((1, 32), np.uint8)) == []
    crowd = near_duplicates(np.zeros((500, 32), np.uint8), crowd=8)
    assert len(crowd) < 500 * 8
    assert {pair.first for pair in crowd} == set(range(499))


def test_a_radiograph_that_was_compressed_again_is_found(tmp_path):
    (tmp_path / "in").mkdir()
    for k, record in enumerate(open_collection("phantom:12,seed=2,size=256").records):
        image = np.round(record.image.radiograph().image[0].numpy() * 255).astype(np.uint8)
        (tmp_path / "in" / f"{k:02d}.png").write_bytes(encode_png(image))
        if k < 3:
            again = bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1])
            (tmp_path / "in" / f"{k:02d}.jpg").write_bytes(again)
    pack(f"folder:{tmp_path / 'in'}", tmp_path / "out", size=256)
    _, table = open_index(str(tmp_path / "out"))
    hashes = np.frombuffer(b"".join(table.column("phash").to_pylist()), np.uint8).reshape(-1, 32)
    assert {(pair.first, pair.second) for pair in near_duplicates(hashes)} == {(0, 1), (2, 3), (4, 5)}
    page = (tmp_path / "out" / "data.html").read_text()
    assert "3 further pairs look nearly the same" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_of_a_pack_where_another_one_lay_shows_its_own_pictures(tmp_path):
    for count in (3, 9):
        (tmp_path / "in").mkdir(exist_ok=True)
        for k in range(count):  # noise is flagged as unlike a chest, and so shown on the page
            picture = np.random.default_rng(k).integers(0, 256, (64, 64), dtype=np.uint8)
            (tmp_path / "in" / f"{k}.png").write_bytes(encode_png(picture))
        pack(f"folder:{tmp_path / 'in'}", tmp_path / "out", size=64)
        assert (tmp_path / "out" / "data.html").read_text().count("unlike a frontal") >= count
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("bits", [8, 16])
def test_the_perceptual_hash_is_the_librarys(bits):
    for record in open_collection("phantom:12,seed=3,size=128").records:
        grey = np.round(record.image.radiograph().image[0].numpy() * 255).astype(np.uint8)
        pixels = grey if bits == 8 else grey.astype(np.uint16) * 257
        small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA)
        expected = imagehash.phash(Image.fromarray(small), hash_size=16).hash
        ours = np.unpackbits(np.frombuffer(perceptual_hash(pixels), np.uint8)).reshape(16, 16).astype(bool)
        assert (ours != expected).sum() <= (0 if bits == 8 else 4)  # 8 bits round the reduced picture


def test_the_perceptual_hash_of_a_mirror_image_does_not_depend_on_rounding():
    half = np.random.default_rng(0).integers(0, 256, (64, 32), dtype=np.uint8)
    picture = np.hstack([half, half[:, ::-1]])
    bits = np.unpackbits(np.frombuffer(perceptual_hash(picture), np.uint8)).reshape(16, 16)
    assert not bits[:, 1::2].any()  # coefficients of odd columns are zero, and so is the median
    assert bits[:, ::2].any()


# ------------------------------------------------------------------------------------------------------- command line


def test_the_verb(tmp_path, capsys):
    source = mixed(tmp_path / "in", 8)
    assert main(["pack", f"folder:{source}", str(tmp_path / "out"), "--size", "32", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "fingerprint" in said
    assert "8 radiographs (8 new), 0 of them with the pixels of another, 0 left out" in said
    assert f"use it: --data.source pack:{tmp_path / 'out'}" in said
    assert main(["data", "inspect", f"pack:{tmp_path / 'out'}"]) == 0
    assert "8 usable images, 4 patients" in capsys.readouterr().out
    assert main(["pack", f"folder:{source}", str(tmp_path / "out"), "--size", "64"]) == 1
    assert "size 32, now 64" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cut.dcm", "x.dcm"])
def test_a_thumbnail_is_a_courtesy(tmp_path, name):
    from otcxr.packing.reduce import thumbnail

    path = tmp_path / name
    path.write_bytes(b"nothing" if name == "cut.dcm" else dicom(np.stack([noise((30, 20))] * 3), NumberOfFrames=3,
                                                                Rows=30, Columns=20))  # fmt: skip
    small = thumbnail(path)
    if name == "cut.dcm":
        assert small is None
    else:
        assert cv2.imdecode(np.frombuffer(small, np.uint8), -1).shape == (96, 64)
    assert thumbnail(Trouble("fine", 1)) is None
    assert BytesIO(small or b"").read(4) in (b"\x89PNG", b"")
