"""How fast phantoms are rendered and how hard they are: writes docs/results/phantoms.json and its tables on the page.

    python benchmarks/bench_phantoms.py                  everything, some 60 minutes on one core
    python benchmarks/bench_phantoms.py --only rate      phantoms per second on one core, by size
    python benchmarks/bench_phantoms.py --only hardness  what is found without learning, and what is there
    python benchmarks/bench_phantoms.py --only hardness --set "224 px"

Hardness, as AUROC on the test patients of one set with 95 % intervals by patient bootstrap:

    table         logistic regression on mean, standard deviation, 16-bin histogram, view, sex, age: should find little
    thumbnail     logistic regression on 16 x 16 pixels: should not be enough
    supervised    a narrow ResNet-18 trained with all labels of the training patients: shows that the signal is there

Entries of other parts are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pages import embed, machine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from otcxr.data.phantom import FINDINGS, parse_phantom, read_phantom, render
from otcxr.evaluation.statistics import as_json, evaluate_scores
from otcxr.files import write_atomic
from otcxr.memory import keep_memory
from otcxr.nn.encoder import build_encoder
from otcxr.runs import describe_environment

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "phantoms.json"
PAGE = ROOT / "docs" / "phantoms.md"
SETS = {
    "default": "8000,seed=0,size=96",
    "large lesions": "8000,seed=0,size=96,lesion_size=2",
    "224 px": "6000,seed=0,size=224",
}
WAYS = ("table", "thumbnail", "supervised")


def rate(repeats: int) -> dict[str, Any]:
    """Phantoms per second of one core: median and range over blocks of 40."""
    out = {}
    for size in (96, 224, 512):
        config = parse_phantom(f"{40 * repeats + 1},seed=1,size={size}")
        render(config, 40 * repeats)
        rates = []
        for block in range(repeats):
            start = time.perf_counter()
            for index in range(40 * block, 40 * block + 40):
                render(config, index)
            rates.append(40 / (time.perf_counter() - start))
        out[str(size)] = {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
        print(f"{size} px: {statistics.median(rates):.0f} phantoms/s ({min(rates):.0f} to {max(rates):.0f})")
    return out


def regress(features: NDArray[Any], labels: NDArray[Any], train: NDArray[np.bool_], strength: float) -> NDArray[Any]:
    """Scores of the test images, (N, F), from one logistic regression for each finding."""
    columns = []
    for label in labels.T:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=3000))
        columns.append(model.fit(features[train], label[train]).decision_function(features[~train]))
    return np.stack(columns, axis=1)


def supervise(images: NDArray[np.float32], labels: NDArray[Any], train: NDArray[np.bool_], epochs: int) -> NDArray[Any]:
    """Scores of the test images from a narrow ResNet-18 trained on all labels; shifts and gamma as augmentation."""
    torch.manual_seed(0)
    stride = 16 if images.shape[1] <= 128 else 32
    encoder = build_encoder("resnet18", width=16, stride=stride, padding="replicate", seed=0)
    head = torch.nn.Linear(128, labels.shape[1])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    pixels, targets = torch.from_numpy(images[train])[:, None], torch.from_numpy(labels[train]).float()
    rng, batch = np.random.default_rng(0), 64
    steps = len(pixels) // batch * epochs
    done = 0
    for epoch in range(epochs):
        encoder.train()
        order = rng.permutation(len(pixels))
        total = 0.0
        for first in range(0, len(order) - batch + 1, batch):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done / steps))
            chosen = order[first : first + batch]
            dx, dy = rng.integers(-6, 7, 2) * images.shape[1] // 96
            views = torch.roll(pixels[chosen], (int(dy), int(dx)), (2, 3)) ** float(np.exp(rng.uniform(-0.3, 0.3)))
            logits = head(encoder(views)[-1].mean(dim=(2, 3)))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, done = total + float(loss.detach()), done + 1
        print(f"  epoch {epoch + 1}/{epochs}: loss {total / (len(order) // batch):.4f}", flush=True)
    encoder.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(images[~train])[:, None].split(256)
        return torch.cat([head(encoder(part)[-1].mean(dim=(2, 3))) for part in parts]).double().numpy()


def hardness(source: str, epochs: int) -> dict[str, Any]:
    records = list(read_phantom(source).records)
    images = np.stack([record.image.radiograph().image[0].numpy() for record in records])
    labels = np.array([[record.labels[finding] for finding in FINDINGS] for record in records])
    train = np.array([record.split != "test" for record in records])
    table = np.array([
        [image.mean(), image.std(), *np.histogram(image, 16, (0, 1))[0] / image.size,
         record.view == "AP", record.sex == "M", record.age]
        for record, image in zip(records, images, strict=True)
    ])  # fmt: skip
    thumbnails = np.stack([cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).ravel() for image in images])
    patients = [record.patient for record, inside in zip(records, train, strict=True) if not inside]
    ways = {
        "table": lambda: regress(table, labels, train, 1.0),
        "thumbnail": lambda: regress(thumbnails, labels, train, 0.01),
        "supervised": lambda: supervise(images, labels, train, epochs),
    }
    out: dict[str, Any] = {"source": f"phantom:{source}", "train": int(train.sum()), "test": int((~train).sum())}
    for name, way in ways.items():
        out[name] = as_json(evaluate_scores(labels[~train].astype(np.float64), way(), patients, FINDINGS))
        print(f"{source} {name}: {json.dumps(out[name]['macro'])[:200]}", flush=True)
    return out


def page(result: dict[str, Any]) -> None:
    made = result["environment"]
    if "rate" in result:
        lines = ["| size | phantoms per second and core |", "|---|---|"]
        for size, found in result["rate"].items():
            lines.append(f"| {size} px | {found['median']:.0f} ({found['least']:.0f} to {found['most']:.0f}) |")
        embed(PAGE, "phantom-rate", [*lines, "", f"Median and range of blocks of 40; {made['rate']}."])
    if "hardness" in result:
        lines = []
        for name, found in result["hardness"].items():
            lines += [f"`{found['source']}` ({name}; {found['train']} training and {found['test']} test images):", "",
                      "| finding | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]  # fmt: skip
            for finding in FINDINGS:
                lines.append(f"| {finding} | " + " | ".join(cell(found[w]["findings"][finding]) for w in WAYS) + " |")
            lines += ["| **macro** | " + " | ".join(cell(found[w]["macro"]) for w in WAYS) + " |", ""]
        lines.append(f"AUROC with 95 % intervals by patient bootstrap; {made['hardness']}.")
        embed(PAGE, "phantom-hardness", lines)


def cell(measured: dict[str, Any]) -> str:
    found = measured["auroc"]
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["rate", "hardness"])
    parser.add_argument("--set", choices=list(SETS), nargs="*", default=list(SETS), help="whose hardness")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_memory()  # as the command line does
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"environment": {}}
    environment = describe_environment()
    versions = environment["versions"]
    where = f"one core of {machine()}, numpy {versions['numpy']}, torch {versions['torch']}, {environment['date']}"
    for part in ("rate", "hardness"):
        if arguments.only in (None, part):
            result[part] = rate(arguments.repeats) if part == "rate" else {
                name: hardness(source, arguments.epochs) if name in arguments.set else result[part][name]
                for name, source in SETS.items() if name in arguments.set or name in result.get(part, {})
            }  # fmt: skip
            result["environment"][part] = where
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.out, json.dumps(result, indent=1) + "\n")
    if arguments.out == OUT:
        page(result)


if __name__ == "__main__":
    main()
