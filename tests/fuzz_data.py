"""Damaged input of every kind: it is read, or refused with a DataError; nothing crashes, hangs or takes all memory.

    python tests/fuzz_data.py --inputs 100000          some minutes
    python tests/fuzz_data.py --kind image --seed 3 --first 1234 --inputs 1     one input again

Inputs are made from whole ones, by a number: (kind, seed, number) is always the same input. A process of its own reads
them and says which one it is at; another one watches it: an input that ends it, or takes longer than 20 seconds, is
named, and the next process goes on behind it. What it may take is limited to 3 GB more than it starts with.
"""

from __future__ import annotations

import argparse
import gzip
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

KINDS = ("image", "header", "runs", "table", "pack")
LIMIT_S, LIMIT_GB = 20.0, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all kinds")
    parser.add_argument("--kind", choices=tuple(MAKERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", default="", help="(file in which a process says where it is)")
    given = parser.parse_args()
    if given.child:
        return child(given.kind, given.seed, given.first, given.inputs, given.child)
    failures = fuzz(given.inputs, given.seed, given.first, [given.kind] if given.kind else KINDS, progress=True)
    print("\n".join(failures) or "all hold")
    return 1 if failures else 0


def fuzz(inputs: int, seed: int = 0, first: int = 0, kinds=KINDS, *, limit_s=LIMIT_S, progress=False) -> list[str]:
    """Read so many damaged inputs; return what went wrong."""
    failures: list[str] = []
    for kind in kinds:
        number, end, begun = first, first + -(-inputs // len(kinds)), time.monotonic()
        while number < end:
            number, found = _watched(kind, seed, number, end, limit_s)
            failures += found
            if len(failures) > 20:
                return failures
        if progress:
            print(f"{kind}: {end - first:,} inputs, {time.monotonic() - begun:.0f} s, {len(failures)} failures so far",
                  flush=True)  # fmt: skip
    return failures


def _watched(kind: str, seed: int, first: int, end: int, limit_s: float) -> tuple[int, list[str]]:
    """Let a process read inputs; (the next number, what went wrong)."""
    with tempfile.NamedTemporaryFile() as place, tempfile.TemporaryFile() as said:
        place.write(bytes(8))
        place.flush()
        command = [sys.executable, __file__, "--child", place.name, "--kind", kind, "--seed", str(seed), "--first",
                   str(first), "--inputs", str(end - first)]  # fmt: skip
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        with mmap.mmap(place.fileno(), 8) as shown:
            at, since = first - 1, time.monotonic() + 60  # it takes a while to start
            while process.poll() is None:
                time.sleep(0.02)
                now = struct.unpack("q", shown[:8])[0] + first - 1
                if now != at:
                    at, since = now, time.monotonic()
                elif time.monotonic() - since > limit_s:
                    process.kill()
                    process.wait()
                    return at + 1, [f"{_again(kind, seed, at)}: not done after {limit_s:.0f} s"]
            at = struct.unpack("q", shown[:8])[0] + first - 1
        said.seek(0)
        found = said.read().decode().splitlines()
        if process.returncode:
            return at + 1, [*found, f"{_again(kind, seed, at)}: ended its process ({process.returncode})"]
        return end, found


def _again(kind: str, seed: int, number: int) -> str:
    return f"python tests/fuzz_data.py --kind {kind} --seed {seed} --first {number} --inputs 1"


def child(kind: str, seed: int, first: int, inputs: int, place: str) -> int:
    """Read inputs one after the other; print what went wrong."""
    import resource

    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    from otcxr.errors import DataError

    with tempfile.TemporaryDirectory() as folder, Path(place).open("r+b") as file, mmap.mmap(file.fileno(), 8) as shown:
        os.environ["XDG_CONFIG_HOME"] = folder
        read = MAKERS[kind](Path(folder))
        lines = Path("/proc/self/status").read_text().splitlines()
        held = int(next(line for line in lines if line.startswith("VmData:")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(LIMIT_GB * 1e9), resource.RLIM_INFINITY))
        for number in range(first, first + inputs):
            shown[:8] = struct.pack("q", number - first + 1)
            rng = np.random.default_rng((seed, tuple(MAKERS).index(kind), number))
            try:
                read(rng)
            except DataError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    print(f"{_again(kind, seed, number)}: its message is no line: {str(error)[:300]!r}", flush=True)
            except Exception as error:  # whatever else it is, it is what we are looking for
                print(f"{_again(kind, seed, number)}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


# --- damage ---


def damage(data: bytes, rng: np.random.Generator, other: bytes = b"") -> bytes:
    """One to four changes: bits, bytes, extremes, a part left out, doubled or taken from another input, a cut."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not out:
            break
        at = int(rng.integers(len(out)))
        how = rng.integers(8)
        if how == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            out[at] = int(rng.integers(256))
        elif how == 2:
            extreme = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff"]
            part = extreme[rng.integers(len(extreme))]
            out[at : at + len(part)] = part
        elif how == 3:
            del out[at : at + int(rng.integers(1, 64))]
        elif how == 4:
            out[at:at] = out[at : at + int(rng.integers(1, 64))]
        elif how == 5:
            out[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 16), dtype=np.uint8))
        elif how == 6 and other:
            start = int(rng.integers(len(other)))
            out[at : at + 64] = other[start : start + int(rng.integers(1, 64))]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def _mend_png(data: bytes) -> bytes:
    """A PNG with right checksums, so that its damage reaches the decoder."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out):
            break
        out[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(bytes(out[at + 4 : at + 8 + length])))
        at += 12 + length
    return bytes(out)


# --- kinds ---


def _pictures() -> list[tuple[str, bytes]]:
    """Small whole files of every format and encoding."""
    import cv2
    import pydicom
    from PIL import Image

    from test_images import dicom, encode_png, lut, smooth

    grey = smooth(40, 32)
    wide = grey.astype(np.uint16) * 16
    found = [(".png", encode_png(p)) for p in (grey, grey.astype(np.uint16) * 257, np.dstack([grey] * 3),
                                               np.dstack([grey] * 4), np.dstack([grey] * 2))]  # fmt: skip
    found += [(".jpg", bytes(cv2.imencode(".jpg", p)[1])) for p in (grey, np.dstack([grey] * 3))]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        buffer = BytesIO()
        Image.fromarray(grey).save(buffer, "TIFF", compression=compression)
        found.append((".tif", buffer.getvalue()))
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

    found += [(".dcm", dicom(wide, **more)) for more in (
        window, window | {"syntax": ExplicitVRBigEndian}, window | {"syntax": DeflatedExplicitVRLittleEndian},
        {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 0}, {"VOILUTSequence": lut(0, 8, range(256))},
        {"ModalityLUTSequence": lut(0, 12, range(4096), vr="OW"), **window},
        window | {"ShutterShape": "RECTANGULAR", "ShutterLeftVerticalEdge": 3, "ShutterRightVerticalEdge": 30,
                  "ShutterUpperHorizontalEdge": 2, "ShutterLowerHorizontalEdge": 39},
        window | {"CollimatorShape": "POLYGONAL", "VerticesOfThePolygonalCollimator": [1, 1, 1, 30, 30, 30]},
        window | {"VOILUTFunction": "SIGMOID", "RescaleSlope": -2, "RescaleIntercept": 5, "PatientAge": "044Y",
                  "PixelSpacing": [0.1, 0.2], "PatientID": "x", "SeriesDescription": "PA"},
    )]  # fmt: skip
    tests = Path(pydicom.__file__).parent / "data" / "test_files"
    for name in ("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "JPEG2000", "JPEG-LL",
                 "JPGExtended", "SC_rgb_jpeg_dcmd", "JPEGLSNearLossless_08"):  # fmt: skip
        path = tests / f"{name}.dcm"
        if path.is_file():
            found.append((".dcm", path.read_bytes()))
    return found


def make_image(folder: Path) -> Callable[[np.random.Generator], None]:
    """Whole files, damaged, through the decoder and on to what a pack keeps."""
    from otcxr.data.decode import decode_bytes
    from otcxr.packing.reduce import Task, reduce_image

    pictures = _pictures()

    def read(rng: np.random.Generator) -> None:
        suffix, whole = pictures[rng.integers(len(pictures))]
        data = damage(whole, rng, pictures[rng.integers(len(pictures))][1])
        if suffix == ".png" and rng.random() < 0.7:
            data = _mend_png(data)
        path = folder / f"x{suffix if rng.random() < 0.95 else '.png'}"
        if rng.random() < 0.1:
            path.write_bytes(data)
            reduced = reduce_image(Task(path, {}, None, None, 16, int(rng.choice([8, 16]))))
            assert min(reduced.pixels.shape) >= 1
            return
        decoded = decode_bytes(data, path)
        pixels = decoded.pixels
        assert pixels.ndim == 2
        assert pixels.dtype in (np.uint8, np.uint16, np.float32)
        if pixels.dtype == np.float32:
            assert float(pixels.min()) >= 0
            assert float(pixels.max()) <= 1
        assert decoded.valid is None or (decoded.valid.shape == pixels.shape and decoded.valid.any())
        assert decoded.spacing is None or min(decoded.spacing) > 0

    return read


def make_header(folder: Path) -> Callable[[np.random.Generator], None]:
    """Headers of DICOM files, damaged, and whole ones with nonsense in one element."""
    import pydicom
    from pydicom.dataelem import RawDataElement

    from otcxr.data.decode import decode_bytes
    from otcxr.data.dicom import read_header

    pictures = [data for suffix, data in _pictures() if suffix == ".dcm"]
    nonsense = [b"", b"\0", b"-1", b"1e999", b"nan", b"1\\2\\3\\4\\5", b"abc", b"9" * 40, b"\xff\xfe", b"0", b"-0.0",
                b"00000000", b"\\", b"1\\", bytes(64), b"99999999999"]  # fmt: skip

    def read(rng: np.random.Generator) -> None:
        whole = pictures[rng.integers(len(pictures))]
        path = folder / "x.dcm"
        if rng.random() < 0.5:
            data = damage(whole[: max(200, len(whole) // 3)], rng) + whole[max(200, len(whole) // 3) :]
        else:
            file = pydicom.dcmread(BytesIO(whole))
            tags = [e.tag for e in file if e.VR != "SQ" and e.keyword != "PixelData"]
            tag = tags[rng.integers(len(tags))]
            value = nonsense[rng.integers(len(nonsense))]
            value += b" " * (len(value) % 2)
            file._dict[tag] = RawDataElement(tag, file[tag].VR, len(value), value, 0, False, True)
            if rng.random() < 0.3:
                del file[tag]
            buffer = BytesIO()
            try:
                file.save_as(buffer)
            except Exception:  # pydicom does not write everything
                return
            data = buffer.getvalue()
        path.write_bytes(data)
        try:
            header = read_header(path)
        finally:
            decode_bytes(data, path)
        assert header.age is None or 0 <= header.age <= 120
        assert header.view in (None, "PA", "AP", "LATERAL")
        assert header.spacing is None or min(header.spacing) > 0

    return read


def make_runs(folder: Path) -> Callable[[np.random.Generator], None]:
    """Run lengths of masks."""
    from otcxr.data.masks import decode_runs

    def read(rng: np.random.Generator) -> None:
        side = int(rng.choice([1, 7, 64, 1024]))
        count = int(rng.integers(0, 40))
        top = int(
            rng.choice(
                [5, side * side // 10 + 1, side * side, 2**31, 2**62, 10**30], p=[0.3, 0.4, 0.1, 0.1, 0.05, 0.05]
            )
        )
        words = [str(int(rng.random() * top) - (rng.random() < 0.02)) for _ in range(count)]
        text = " ".join(words)
        if rng.random() < 0.3:
            text = damage(text.encode(), rng).decode("latin-1")
        mask = decode_runs(text, side, "x")
        numbers = [int(word) for word in text.split()]
        assert mask.shape == (side, side)
        assert int(mask.sum()) == sum(numbers[1::2])

    return read


def make_table(folder: Path) -> Callable[[np.random.Generator], None]:
    """Tables of every collection."""
    import test_collections as collections
    import test_readers as readers
    from otcxr.data import open_collection

    places: list[tuple[str, Path]] = []
    for name in ("vindr", "rsna", "chexpert"):
        root = folder / name
        root.mkdir()
        getattr(collections, name)(root)
        places += [(f"{name}:{root}", path) for path in root.glob("*.csv")]
    root = collections.physionet(folder / "physionet")
    places += [(f"vindr:{root}", path) for path in root.glob("annotations/*.csv")]
    root = folder / "mimic"
    root.mkdir()
    collections.mimic(root, zipped=True)
    places += [(f"mimic:{root}", path) for path in root.glob("*.csv.gz")]
    root = folder / "siim"
    (root / "x").mkdir(parents=True)
    (root / "train-rle.csv").write_text("ImageId, EncodedPixels\na,-1\nb,10 5 1000 7\nb,3 2\n")
    for name in ("a", "b"):
        collections.image(root / "x" / f"{name}.png")
    places.append((f"siim:{root}", root / "train-rle.csv"))
    root = folder / "nih"
    readers.nih(root)
    places += [(f"nih:{root}", path) for path in (*root.glob("*.csv"), *root.glob("*.txt"))]
    root = folder / "folder"
    (root / "x").mkdir(parents=True)
    (root / "t.csv").write_text(
        "image,patient,age,sex,view,split,Mass\nx/a.png,1,40,M,PA,train,1\nx/b.png,2,,F,,test,\n"
    )
    for name in ("a", "b"):
        collections.image(root / "x" / f"{name}.png")
    places.append((f"folder:{root}", root / "t.csv"))
    whole = {path: path.read_bytes() for _, path in places}

    def read(rng: np.random.Generator) -> None:
        source, path = places[rng.integers(len(places))]
        data = whole[path]
        if path.suffix == ".gz" and rng.random() < 0.8:
            changed = gzip.compress(_rewritten(gzip.decompress(data), rng), 1, mtime=0)
        else:
            changed = _rewritten(data, rng)
        path.write_bytes(changed)
        try:
            collection = open_collection(source)
            for record in collection.records:
                assert record.patient
                assert set(record.labels.values()) <= {0, 1}
                assert record.age is None or 0 <= record.age <= 120
                assert record.split in ("", *{r.split for r in collection.records})
        finally:
            path.write_bytes(data)

    return read


def _rewritten(data: bytes, rng: np.random.Generator) -> bytes:
    """A table with bytes damaged, or with fields exchanged for nonsense, lines doubled, dropped or mixed up."""
    if rng.random() < 0.5:
        return damage(data, rng)
    lines = [line.split(b",") for line in data.splitlines()]
    for _ in range(rng.integers(1, 4)):
        row = int(rng.integers(len(lines)))
        how = rng.integers(5) if lines[row] else 1
        words = [b"", b"-1", b"nan", b"1e400", b"999999999999999999999", b"\xe4", b'"', b"../../../etc", b"No Finding",
                 b"0|1", b"'; --", b"1.5", b"train", b" ", b"\0", b"=1+1"]  # fmt: skip
        if how == 0:
            lines[row][rng.integers(len(lines[row]))] = words[rng.integers(len(words))]
        elif how == 1:
            lines.insert(row, list(lines[rng.integers(len(lines))]))
        elif how == 2 and len(lines) > 1:
            del lines[row]
        elif how == 3:
            lines[row] = lines[row][: int(rng.integers(len(lines[row]) + 1))]
        else:
            lines[row].append(words[rng.integers(len(words))])
    return b"\n".join(b",".join(line) for line in lines) + b"\n"


def make_pack(folder: Path) -> Callable[[np.random.Generator], None]:
    """Packs: facts, index (with a right digest, so that its damage is read) and shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from otcxr.data.pack import file_digest, read_pack
    from otcxr.packing import PackConfig, pack_collection
    from otcxr.packing.store import replay

    root = folder / "pack"
    pack_collection("phantom:6,seed=1,size=32,prevalence=0.5", root, PackConfig(size=24, workers=1))
    names = ("pack.json", "index.parquet", "shards/000000.npy", "shards/bits-000000.npy")
    whole = {name: (root / name).read_bytes() for name in names}
    facts = json.loads(whole["pack.json"])
    table = pq.read_table(root / "index.parquet")
    numbers = [name for name in table.schema.names if pa.types.is_integer(table.schema.field(name).type)]
    values = [-1, 0, 1, 7, 2**31 - 1, -(2**31), 2**40, None]

    def nonsense(rng: np.random.Generator) -> bytes:
        """An index that can be read, with a number that makes no sense."""
        name = numbers[rng.integers(len(numbers))]
        column = table.column(name).to_pylist()
        column[rng.integers(len(column))] = values[rng.integers(len(values))]
        try:
            changed = pa.array(column, type=table.schema.field(name).type)
        except (pa.ArrowInvalid, OverflowError):
            changed = pa.array(column, type=pa.int64())
        sink = pa.BufferOutputStream()
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, changed), sink)
        return sink.getvalue().to_pybytes()

    def read(rng: np.random.Generator) -> None:
        name = names[rng.integers(len(names))]
        changed = nonsense(rng) if name == "index.parquet" and rng.random() < 0.5 else damage(whole[name], rng)
        try:
            (root / name).write_bytes(changed)
            if name != "pack.json" and rng.random() < 0.95:
                shards = [s if s["name"] != name.removeprefix("shards/") else s | {"bytes": len(changed)}
                          for s in facts["shards"]]  # fmt: skip
                digest = file_digest(changed) if name == "index.parquet" else facts["index_digest"]
                told = json.dumps(facts | {"index_digest": digest, "shards": shards})
                (root / "pack.json").write_text(told)
            (root / "journal").write_bytes(changed)
            try:
                list(replay(root / "journal"))
            finally:
                os.utime(root / "pack.json", ns=(0, int(rng.integers(2**50))))  # not the pack that was read before
                for record in read_pack(str(root)).records:
                    record.image.radiograph()
                    for mask in record.masks.values():
                        mask.radiograph()
        finally:
            for each, data in whole.items():
                (root / each).write_bytes(data)

    return read


def make_trouble(folder: Path) -> Callable[[np.random.Generator], None]:
    """Everything that the watching must notice, in turn: for the test of this file."""
    from otcxr.errors import DataError

    turn = iter(range(100))

    def read(rng: np.random.Generator) -> None:
        kind = next(turn)
        if kind == 1:
            raise DataError("refused")
        if kind == 2:
            raise KeyError("forgotten")
        if kind == 3:
            error = DataError("")
            error.args = ("two\nlines",)  # past what makes one line of a message
            raise error
        if kind == 4:
            np.ones(int(LIMIT_GB * 1.2e9), dtype=np.uint8)
        if kind == 5:
            os.abort()

    return read


def make_hang(folder: Path) -> Callable[[np.random.Generator], None]:
    """For the test of this file."""

    def read(rng: np.random.Generator) -> None:
        time.sleep(60)

    return read


MAKERS = {"image": make_image, "header": make_header, "runs": make_runs, "table": make_table, "pack": make_pack,
          "trouble": make_trouble, "hang": make_hang}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
