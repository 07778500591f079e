"""How fast radiographs are read, packed and windowed, each beside a peer in the same run.

    python benchmarks/bench_data.py data/nih-mini/originals      docs/results/data.json, table in docs/packs.md
    python benchmarks/bench_data.py FOLDER --quick --out FILE    a small one

Pictures of 1024 px are made from those in the folder (shifted in a circle, so that no two are equal) and lie in a
temporary folder, as PNG; the page cache holds them for all who read. Nothing else should run.

    read      a random row of a pack, every byte of it copied, against OpenCV decoding one of the same 1024 px PNG
    pack      against a loop that decodes, reduces by area and saves .npy, one process, OpenCV with one thread
    window    12-bit values to grey through a table, 5 megapixels, against pydicom's functions
    million   a pack whose index has a million rows over the same shards: opening it, checking it before a training,
              memory that a loader worker has for itself
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from pages import embed, machine
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from otcxr.data.dicom import window_pixels
from otcxr.data.pack import file_digest, open_index, read_pack
from otcxr.files import write_atomic
from otcxr.memory import keep_memory
from otcxr.packing import PackConfig, pack_collection
from otcxr.runs import describe_environment

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "data.json"


def make_pictures(originals: Path, folder: Path, count: int) -> list[Path]:
    found = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted(originals.glob("*.png"))]
    rng = np.random.default_rng(0)
    folder.mkdir()
    paths = []
    for number in range(count):
        image = np.roll(found[number % len(found)], rng.integers(0, 1024, 2), (0, 1))
        paths.append(folder / f"{number:06d}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_read(paths: list[Path], packs: dict[int, Path], reads: int) -> dict[str, Any]:
    data = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths[:200]]

    def decode() -> None:
        for content in data:
            cv2.imdecode(content, cv2.IMREAD_UNCHANGED)

    rows: dict[str, Any] = {}
    for size, pack in packs.items():
        records = read_pack(str(pack)).records
        order = np.random.default_rng(1).integers(0, len(records), reads).tolist()
        into = np.empty((size, size), np.uint8)  # the pictures are square

        def read(records: Any = records, order: list[int] = order, into: Any = into) -> None:
            for row in order:
                np.copyto(into, records[row].image.stored().pixels)

        read()
        rounds = [(timed(decode) / len(data), timed(read) / reads) for _ in range(7)]  # they take turns
        ratios = [theirs / ours for theirs, ours in rounds]
        rows[str(size)] = {
            "read_us": 1e6 * float(np.median([ours for _, ours in rounds])),
            "opencv_decode_ms": 1e3 * float(np.median([theirs for theirs, _ in rounds])),
            "ratio": float(np.median(ratios)), "ratios": ratios, "rows": len(records),
        }  # fmt: skip
    return rows


def bench_pack(paths: list[Path], folder: Path, size: int) -> dict[str, Any]:
    def loop() -> None:
        (folder / "loop").mkdir(exist_ok=True)
        for path in paths:
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            np.save(folder / "loop" / f"{path.stem}.npy", small)

    def pack(workers: int) -> None:
        out = folder / f"pack{workers}-{len(list(folder.glob('pack*')))}"
        pack_collection(f"folder:{paths[0].parent}", out, PackConfig(size=size, workers=workers), key=folder / "key")

    loop()  # the first run of either warms the page cache
    rounds = [{"loop_s": timed(loop), "one_s": timed(lambda: pack(1)), "two_s": timed(lambda: pack(2))}
              for _ in range(3)]  # fmt: skip
    return {
        "images": len(paths), "size": size, "rounds": rounds,
        **{f"{name}_images_per_s": len(paths) / float(np.median([r[f"{name}_s"] for r in rounds]))
           for name in ("loop", "one", "two")},
        "one_worker_over_loop": float(np.median([r["loop_s"] / r["one_s"] for r in rounds])),
        "two_workers_over_one": float(np.median([r["one_s"] / r["two_s"] for r in rounds])),
    }  # fmt: skip


def bench_window() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    stored = rng.integers(0, 4096, (2560, 2048)).astype(np.uint16)
    rows = {}
    for name in ("linear", "sigmoid", "rescaled"):
        dataset = Dataset()
        dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 12, 0
        rescaled = name == "rescaled"
        dataset.WindowCenter, dataset.WindowWidth = (800, 1500) if rescaled else (1800, 3000)
        dataset.RescaleSlope, dataset.RescaleIntercept = (0.5, -100) if rescaled else (1, 0)
        dataset.VOILUTFunction = "SIGMOID" if name == "sigmoid" else "LINEAR"
        # pydicom's result spans the range of its input; both are compared as grey values
        peer = apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
        low, high = (-100, 4095 / 2 - 100) if rescaled else (0, 4095)
        difference = np.abs((peer - low) / (high - low) - window_pixels(stored, None, dataset, "bench")).max()
        ratios, ours, theirs = [], [], []
        for _ in range(7):
            theirs.append(timed(lambda d=dataset: apply_voi_lut(apply_modality_lut(stored, d), d)))
            ours.append(timed(lambda d=dataset: window_pixels(stored, None, d, "bench")))
            ratios.append(theirs[-1] / ours[-1])
        rows[name] = {"table_ms": 1e3 * float(np.median(ours)), "pydicom_ms": 1e3 * float(np.median(theirs)),
                      "ratio": float(np.median(ratios)), "largest_difference": float(difference)}  # fmt: skip
    return rows


def make_million(pack: Path, out: Path, rows: int) -> None:
    """A pack of so many rows over the shards of a real one: 300,000 patients, 14 findings, splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts, table = open_index(str(pack))
    rng = np.random.default_rng(3)
    whole = table.take(pa.array(np.arange(rows) % len(table)))
    patient = rng.integers(0, 3 * rows // 10, rows)
    split = np.array(["train", "val", "test"], dtype=object)[np.minimum(patient % 10 // 7 + patient % 10 // 8, 2)]
    new = {"id": [f"{n:020x}" for n in range(rows)], "study": [f"s{n:019x}" for n in range(rows)],
           "patient": [f"p{n:019x}" for n in patient.tolist()], "split": split.tolist(),
           "sex": np.array(["F", "M"], dtype=object)[patient % 2].tolist()}  # fmt: skip
    for name, values in new.items():
        kind = whole.schema.field(name).type
        whole = whole.set_column(whole.schema.get_field_index(name), name, pa.array(values, type=kind))
    findings = [f"finding {n}" for n in range(14)]
    place = whole.schema.get_field_index("boxes")
    for finding in reversed(findings):
        whole = whole.add_column(place, f"label:{finding}", pa.array(rng.integers(0, 2, rows), type=pa.int8()))
    out.mkdir()
    (out / "shards").symlink_to((pack / "shards").resolve())
    pq.write_table(whole, out / "index.parquet", compression="zstd", row_group_size=65536)
    digest = file_digest((out / "index.parquet").read_bytes())
    write_atomic(out / "pack.json", json.dumps(facts | {"rows": rows, "findings": findings, "index_digest": digest}))


_OPEN = """
import json, sys, time
from otcxr.data.sources import open_collection
import pyarrow.parquet
start = time.perf_counter()
collection = open_collection(f"pack:{sys.argv[1]}")
first = collection.records[len(collection.records) // 2]
opened = time.perf_counter() - start
start = time.perf_counter()
training = collection.split("train")
split = time.perf_counter() - start
from otcxr.data.dataset import EpochBatches, PixelCache, ViewDataset, check_records, join_views
start = time.perf_counter()
checked = check_records(training, PixelCache(0.0), 0.05)
check = time.perf_counter() - start
import torch
from torch.utils.data import DataLoader
from otcxr.data.view_spec import ViewsConfig
from otcxr.memory import release_memory
def keep_little(worker):
    release_memory()
torch.set_num_threads(1)
sampler = EpochBatches(checked.usable, 64, 0)
views = ViewDataset(training.records, checked.usable, ViewsConfig(size=224), 0, PixelCache(2.0, bits=8))
loader = DataLoader(views, batch_sampler=sampler, collate_fn=join_views, num_workers=2, worker_init_fn=keep_little)
def private(pid):
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()
    kept = [line.split() for line in lines if line.startswith(("Private", "Rss", "Anon"))]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in kept}
steps = iter(loader)
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    next(steps)
loaded = time.perf_counter() - start
workers = [private(worker.pid) for worker in steps._workers]
print(json.dumps({"open_s": opened, "split_s": split, "check_s": check, "usable": len(checked.usable),
                  "batches": int(sys.argv[2]), "views_per_s": 128 * int(sys.argv[2]) / loaded,
                  "worker_mb": workers, "main_mb": private("self")}))
"""


def bench_million(pack: Path, folder: Path, rows: int, batches: int) -> dict[str, Any]:
    make_million(pack, folder / "million", rows)
    done = subprocess.run([sys.executable, "-c", _OPEN, str(folder / "million"), str(batches)], check=True,
                          capture_output=True, text=True)  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["rows"] = rows
    result["index_mb"] = (folder / "million" / "index.parquet").stat().st_size / 2**20
    # what is written to or made in the worker; its mapped shards belong to the page cache and can be given back
    result["worker_private_mb"] = max(worker["Private_Dirty"] for worker in result["worker_mb"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    keep_memory()  # as the command line does
    cv2.setNumThreads(1)
    count, images, reads, rows, batches = (
        (60, 80, 500, 20_000, 5) if words.quick else (1200, 3000, 20_000, 1_000_000, 200)
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_pictures(words.originals, folder / "png", count)
        packs = {}
        for size in (256, 512):
            packs[size] = folder / f"size{size}"
            pack_collection(f"folder:{folder / 'png'}", packs[size], PackConfig(size=size), key=folder / "key")
        read = bench_read(paths, packs, reads)
        print(json.dumps(read), flush=True)
        # enough of them that the workers' half a second of start counts for little
        packing = bench_pack(make_pictures(words.originals, folder / "more", images), folder, 512)
        print(json.dumps(packing), flush=True)
        window = bench_window()
        print(json.dumps(window), flush=True)
        million = bench_million(packs[256], folder, rows, batches)
        print(json.dumps(million), flush=True)
    result = {
        "command": "python benchmarks/bench_data.py data/nih-mini/originals", "read": read, "pack": packing,
        "window": window, "million": million, "machine": machine(), "pydicom": pydicom.__version__,
        "environment": describe_environment(),
        "source": "16 radiographs of NIH ChestX-ray14 (NIH Clinical Center), shifted",
    }  # fmt: skip
    write_atomic(words.out, json.dumps(result, indent=1) + "\n")
    if words.out != OUT:
        return
    r, p, m = read, packing, million
    table = [
        "| what | here | beside | ratio |", "|---|---|---|---|",
        *(f"| a random radiograph of a pack of {row['rows']:,}, short side {size} | {row['read_us']:.0f} µs | OpenCV, "
          f"the same as PNG of 1024 px: {row['opencv_decode_ms']:.1f} ms | {row['ratio']:.0f} |"
          for size, row in r.items()),
        f"| packing {p['images']:,} PNG of 1024 px, one worker | {p['one_images_per_s']:.0f} images/s | a loop that "
        f"decodes, reduces, saves: {p['loop_images_per_s']:.0f} images/s | {p['one_worker_over_loop']:.2f} |",
        f"| packing, two workers | {p['two_images_per_s']:.0f} images/s | one worker | "
        f"{p['two_workers_over_one']:.2f} |",
        *(f"| windowing 5 megapixels, {name} | {row['table_ms']:.1f} ms | pydicom's `apply_modality_lut` and "
          f"`apply_voi_lut`: {row['pydicom_ms']:.0f} ms | {row['ratio']:.1f} |" for name, row in window.items()),
        "", f"A pack of {m['rows']:,} rows, 14 findings (index of {m['index_mb']:.0f} MB): opened in {m['open_s']:.2f} "
        f"s, its training split taken in {m['split_s']:.1f} s and checked in {m['check_s']:.1f} s; of memory a loader "
        f"worker has {m['worker_private_mb']:.0f} MB for itself after {m['batches']} batches of 64.",
        "", f"Two cores of {result['machine']}, OpenCV with one thread; "
        f"opencv {result['environment']['versions']['opencv-python-headless']}, pydicom {result['pydicom']}, "
        f"{result['environment']['date']}. Everything lies in the page cache. JSON: `results/data.json`, by "
        "`benchmarks/bench_data.py`.",
    ]  # fmt: skip
    embed(ROOT / "docs" / "packs.md", "data", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
