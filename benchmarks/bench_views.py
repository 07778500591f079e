"""How fast views are made, and what is folded into them: writes docs/results/views.json and tables of docs/views.md.

    python benchmarks/bench_views.py                          some minutes on one core
    python benchmarks/bench_views.py --quick --out /tmp/v.json  does it still run

Two views of every image by one recipe, on one core: a crop of 30 to 100 % of the area, resized; a rotation of up to
10 degrees; gamma, contrast and brightness; a blur of every other view; noise. Ours on the host and on the device (here
a CPU) beside albumentations and kornia, each in the way its documentation recommends, with bilinear interpolation. All
take turns in every round, so that they meet the same machine; a ratio is of one round, and its median is given with the
smallest and the largest. Time is that of the process on its core, so other programs disturb less.

What counts: ours from 8-bit pixels to a batch of float32 views with geometry and validity, draws included.
albumentations from 8-bit pixels to 8-bit views, without the conversion to a batch of tensors that a training still
needs. kornia from a batch of float32 images that is already there, in batches as ours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version

import albumentations
import cv2
import kornia
import numpy as np
import torch
from bench_health import machine
from kornia import augmentation
from numpy.typing import NDArray
from pages import embed

from otcxr.data.view_spec import DrawnView, GreyImage, ViewsConfig, draw_views, view_generator
from otcxr.data.views import carry_out, collate_views
from otcxr.data.views_device import collate_requests, device_views, request_views
from otcxr.files import write_atomic
from otcxr.runs import describe_environment

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "views.json"
ROWS = ((256, 224), (1024, 224), (512, 96))  # side of the images, side of the views
BATCH = 16
SCALE, RATIO, TURN = (0.3, 1.0), (0.8, 1.25), 10.0
OURS = ("otcxr host", "otcxr device")
PEERS = ("albumentations", "albumentations, area", "kornia")


def pictures(count: int, side: int) -> list[NDArray[np.uint8]]:
    """Smooth noise over all grey levels."""
    generator = np.random.default_rng(side)
    found = []
    for _ in range(count):
        noise = cv2.GaussianBlur(generator.standard_normal((side, side)).astype(np.float32), (0, 0), side / 64)
        found.append(np.round(255 * (noise - noise.min()) / (noise.max() - noise.min())).astype(np.uint8))
    return found


def albumentations_views(size: int, *, area: bool = False) -> Any:
    """Its classes for this recipe; with ``area`` it reduces by area averages, which its documentation offers."""
    a = albumentations
    return a.Compose(
        [
            a.RandomResizedCrop(
                (size, size), scale=SCALE, ratio=RATIO, interpolation=cv2.INTER_LINEAR,
                area_for_downscale="image" if area else None, p=1.0,
            ),
            a.Affine(rotate=(-TURN, TURN), interpolation=cv2.INTER_LINEAR, p=1.0),
            a.RandomGamma(gamma_limit=(70, 140), p=1.0),
            a.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.3, p=1.0),
            a.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.0), p=0.5),
            a.GaussNoise(std_range=(0.0, 0.03), p=1.0),
        ],
        seed=0,
    )  # fmt: skip


def kornia_views(size: int) -> Any:
    """Its classes for this recipe, batched."""
    k = augmentation
    return k.AugmentationSequential(
        k.RandomResizedCrop((size, size), scale=SCALE, ratio=RATIO, resample="bilinear"),
        k.RandomRotation(TURN, resample="bilinear", p=1.0),
        k.RandomGamma((0.7, 1.4), p=1.0),
        k.RandomContrast((0.7, 1.3), p=1.0),
        k.RandomBrightness((0.9, 1.1), p=1.0),
        k.RandomGaussianBlur((7, 7), (0.1, 1.0), p=0.5),
        k.RandomGaussianNoise(0.0, 0.015, p=1.0),
        data_keys=["input"],
    )


def competitors(images: list[NDArray[np.uint8]], size: int) -> dict[str, Callable[[int], None]]:
    """For each name a function that makes two views of every image, once."""
    grey = [GreyImage(pixels, None) for pixels in images]
    config = ViewsConfig(size=size, scale=SCALE, aspect=RATIO, rotation=TURN, window=0.0)
    shape: tuple[int, int] = images[0].shape
    batches = [range(start, min(start + BATCH, len(images))) for start in range(0, len(images), BATCH)]

    def drawn(index: int, epoch: int) -> tuple[DrawnView, ...]:
        return draw_views(shape, None, config, view_generator(0, epoch, index))

    def host(epoch: int) -> None:
        for batch in batches:
            collate_views([carry_out(grey[i], drawn(i, epoch)) for i in batch])

    def device(epoch: int) -> None:
        for batch in batches:
            device_views(collate_requests([request_views(grey[i], drawn(i, epoch)) for i in batch]))

    floats = [torch.from_numpy(np.stack([images[i] for i in batch]))[:, None].float() / 255 for batch in batches]
    plain, averaged, batched = albumentations_views(size), albumentations_views(size, area=True), kornia_views(size)

    def by_albumentations(pipeline: Any) -> Callable[[int], None]:
        def run(_: int) -> None:
            for pixels in images:
                pipeline(image=pixels)
                pipeline(image=pixels)

        return run

    def by_kornia(_: int) -> None:
        for part in floats:
            batched(part)
            batched(part)

    return dict(zip((*OURS, *PEERS), (host, device, by_albumentations(plain), by_albumentations(averaged), by_kornia),
                    strict=True))  # fmt: skip


def measure(side: int, size: int, count: int, rounds: int) -> dict[str, Any]:
    """Images a second of each competitor, and the ratio of ours to each peer, round by round."""
    runs = competitors(pictures(count, side), size)
    for run in runs.values():
        run(0)  # caches, first use
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            runs[name](number)
            speed[name].append(count / (time.process_time() - start))
    ratios = {
        ours: {peer: _spread([a / b for a, b in zip(speed[ours], speed[peer], strict=True)]) for peer in PEERS}
        for ours in OURS
    }
    return {"side": side, "size": size, "images": count, "rounds": rounds,
            "images_per_s": {name: _spread(values) for name, values in speed.items()}, "ratio": ratios}  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def aliasing(side: int, size: int) -> dict[str, float]:
    """How much of a zone plate's waves that are shorter than 1.67 pixels of the view is left in the view.

    The whole plate is reduced, without rotation. Root mean square about grey, as a share of that of the plate itself:
    waves of which a view cannot show the true frequency, so what is left is a wave that is not there.
    """
    y, x = np.mgrid[0:side, 0:side] + 0.5 - side / 2
    plate = np.round(127.5 + 127.5 * np.cos(math.pi * (x**2 + y**2) / side)).astype(np.uint8)
    whole = DrawnView(size, (1.0, 0, 0, 0, 1.0, 0), (0.0, 1.0), 1.0, 1.0, 0.0, 0.0, 0.0, 0, (0, 0, 0, 0))
    image = GreyImage(plate, None)
    crop = {"size": (size, size), "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "p": 1.0}
    crops = [albumentations.RandomResizedCrop(**crop, area_for_downscale=how) for how in (None, "image")]
    batch = torch.from_numpy(plate)[None, None].float() / 255
    views = {
        "otcxr host": carry_out(image, [whole]).views[0][0, 0].numpy(),
        "otcxr device": device_views(request_views(image, [whole])).views[0][0, 0].numpy(),
        "albumentations": crops[0](image=plate)["image"] / 255,
        "albumentations, area": crops[1](image=plate)["image"] / 255,
        "kornia": augmentation.RandomResizedCrop((size, size), scale=(1.0, 1.0), ratio=(1.0, 1.0))(batch)[0, 0].numpy(),
    }
    place = ((np.arange(size) + 0.5) / size - 0.5) * side / side  # local frequency along an axis: waves a pixel
    frequency = np.hypot(place[None], place[:, None])
    gone = (frequency * side / size > 0.6) & (frequency < 0.5)
    return {name: float(np.sqrt(((view[gone] - 0.5) ** 2).mean()) / math.sqrt(1 / 8)) for name, view in views.items()}


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    table = [
        "| image -> view | "
        + " | ".join((*OURS, *PEERS))
        + " | host / albumentations | host / kornia | device / kornia |",
        "|---" * (len(OURS) + len(PEERS) + 4) + "|",
    ]
    for row in rows:
        cells = [f"{row['images_per_s'][name]['median']:,.0f}" for name in (*OURS, *PEERS)]
        pairs = (OURS[0], PEERS[0]), (OURS[0], PEERS[2]), (OURS[1], PEERS[2])
        ratios = [row["ratio"][ours][peer] for ours, peer in pairs]
        cells += [f"**{r['median']:.2f}** [{r['low']:.2f}, {r['high']:.2f}]" for r in ratios]
        table.append(f"| {row['side']} -> {row['size']} px | " + " | ".join(cells) + " |")
    return table


def aliasing_table(found: dict[str, dict[str, float]]) -> list[str]:
    table = ["| zone plate | " + " | ".join((*OURS, *PEERS)) + " |", "|---" * (len(OURS) + len(PEERS) + 1) + "|"]
    for name, values in found.items():
        table.append(f"| {name} px | " + " | ".join(f"{values[who]:.2f}" for who in (*OURS, *PEERS)) + " |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="of each round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few images, two rounds: shows that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.rounds = 4, 2
    if arguments.quick and arguments.out == OUT:
        parser.error("--quick measures nothing worth keeping; give it another --out")
    warnings.simplefilter("ignore")  # the peers warn about their own dependencies
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows = []
    for side, size in ROWS:
        row = measure(side, size, arguments.images, arguments.rounds)
        rows.append(row)
        speeds = ", ".join(f"{name} {value['median']:,.0f}" for name, value in row["images_per_s"].items())
        print(f"{side} -> {size} px, images/s: {speeds}", flush=True)
    folded = {f"512 -> {size}": aliasing(512, size) for size in (300, 224, 96)}
    behind = [(ours, peer, row["side"], row["size"]) for row in rows for ours, peers in row["ratio"].items()
              for peer, ratio in peers.items() if ratio["median"] <= 1]  # fmt: skip
    about = {
        **describe_environment(), "machine": machine(), "threads": 1,
        "command": f"python benchmarks/bench_views.py --images {arguments.images} --rounds {arguments.rounds}",
        "peers": {"albumentations": albumentations.__version__, "kornia": kornia.__version__},
    }  # fmt: skip
    result = {**about, "batch": BATCH, "speed": rows, "aliasing": folded, "behind": behind}
    write_atomic(arguments.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    tables = speed_table(rows), aliasing_table(folded)
    print("\n".join(["", *tables[0], "", *tables[1], ""]))
    for ours, peer, side, size in behind:
        print(f"behind: {ours} is not faster than {peer} at {side} -> {size} px")
    if arguments.out == OUT:
        page = ROOT / "docs" / "views.md"
        where = f"{about['date']}, torch {about['versions']['torch']}, {about['machine']}, one thread."
        embed(page, "speed", [*tables[0], "", where])
        embed(page, "aliasing", tables[1])


if __name__ == "__main__":
    main()
