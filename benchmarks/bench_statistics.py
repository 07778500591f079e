"""How fast the statistics are: intervals over resampled patients, beside scikit-learn called once for every resample.

    python benchmarks/bench_statistics.py             docs/results/statistics.json, table in docs/evaluation.md
    python benchmarks/bench_statistics.py --quick     a small table, into --out

25,000 images of 8,000 patients, 14 findings of different prevalence, 1,000 resamples, one thread. scikit-learn is
measured on some resamples (``sample_weight``) in the same run and multiplied; both give the same numbers, which is
checked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from pages import embed, machine
from sklearn.metrics import average_precision_score, roc_auc_score

from otcxr.evaluation.calibration import sigmoid
from otcxr.evaluation.metrics import auroc, average_precision
from otcxr.evaluation.statistics import (
    BootstrapSettings,
    calibration_columns,
    decision_columns,
    draw,
    patient_weights,
    ranking_columns,
    tabulate,
)
from otcxr.files import write_atomic
from otcxr.runs import describe_environment

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "statistics.json"


def data(images: int, patients: int, findings: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, F), probabilities (N, F) and patients (N,), images of a patient alike."""
    rng = np.random.default_rng(0)
    of = np.sort(rng.integers(patients, size=images))
    shares = np.geomspace(0.01, 0.3, findings)
    labels = (rng.random((patients, findings)) < shares)[of].astype(float)
    flipped = rng.random(labels.shape) < 0.02
    labels = np.where(flipped, 1 - labels, labels)
    scores = labels + rng.normal(size=(patients, findings))[of] + rng.normal(size=labels.shape) - 2
    return labels, sigmoid(scores), of


def timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    images, people, findings, resamples, shown = (
        (2_000, 700, 3, 50, 5) if words.quick else (25_000, 8_000, 14, 1_000, 10)
    )
    labels, p, patients = data(images, people, findings)
    names = [f"finding {f + 1}" for f in range(findings)]
    settings = BootstrapSettings(resamples)
    ranking, decisions = ranking_columns(p), decision_columns(p, np.full(findings, 0.3))
    groups = {
        "AUROC": {"auroc": ranking["auroc"]},
        "AUROC, average precision": {name: ranking[name] for name in ("auroc", "average_precision")},
        "all 3 of the ranking": ranking,
        "all 13 measures": ranking | decisions | calibration_columns(p),
    }
    rows = {}
    for name, columns in groups.items():
        seconds, table = timed(lambda c=columns: tabulate(draw(labels, c, patients, names, settings)))
        rows[name] = {"seconds": seconds, "measures": len(columns)}
        print(f"{name}: {seconds:.1f} s", flush=True)
    weights = patient_weights(patients, resamples, 0)
    peers = {}
    for name, peer, ours in (("auroc", roc_auc_score, auroc), ("average_precision", average_precision_score,
                                                               average_precision)):  # fmt: skip
        found, spent = [], 0.0
        for f in range(findings):
            seconds, values = timed(
                lambda f=f, peer=peer: [peer(labels[:, f], p[:, f], sample_weight=w) for w in weights[:shown]]
            )
            spent += seconds
            found.append(np.abs(np.array(values) - ours(labels[:, f], p[:, f], weights[:shown])).max())
        peers[name] = {"seconds": spent * resamples / shown, "largest_difference": float(max(found))}
        print(f"scikit-learn {name}: {peers[name]['seconds']:.0f} s (from {shown} resamples)", flush=True)
    environment = describe_environment()
    result = {
        "command": "python benchmarks/bench_statistics.py",
        "images": images, "patients": int(np.unique(patients).size), "findings": findings, "resamples": resamples,
        "otcxr": rows, "scikit-learn": {"resamples_measured": shown, **peers},
        "ratio": {
            "auroc": peers["auroc"]["seconds"] / rows["AUROC"]["seconds"],
            "auroc and average precision": (peers["auroc"]["seconds"] + peers["average_precision"]["seconds"])
            / rows["AUROC, average precision"]["seconds"],
        },
        "machine": machine(), "environment": environment,
    }  # fmt: skip
    write_atomic(words.out, json.dumps(result, indent=1) + "\n")
    if words.out != OUT:
        return
    ratio = result["ratio"]
    table = ["| what | seconds | scikit-learn, one by one | ratio |", "|---|---|---|---|"]
    for name, row in rows.items():
        peer = {
            "AUROC": ("auroc", peers["auroc"]["seconds"]),
            "AUROC, average precision": (
                "auroc and average precision",
                peers["auroc"]["seconds"] + peers["average_precision"]["seconds"],
            ),
        }.get(name)
        table.append(f"| {name} | {row['seconds']:.1f} | {f'{peer[1]:.0f}' if peer else ''} | "
                     f"{f'{ratio[peer[0]]:.0f}' if peer else ''} |")  # fmt: skip
    table += ["", f"{resamples:,} resamples of {result['patients']:,} patients, {images:,} images, {findings} "
              f"findings; one thread of {result['machine']}, numpy {environment['versions']['numpy']}, "
              f"{environment['date']}. "
              f"scikit-learn from {shown} resamples; largest difference "
              f"{max(v['largest_difference'] for v in peers.values()):.0e}."]  # fmt: skip
    embed(ROOT / "docs" / "evaluation.md", "statistics", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
