"""Does a fine-tuned encoder find planted nodules without ever seeing a box? And with masks? Large nodules on phantoms.

    python benchmarks/localise_nodules.py             docs/results/nodules.json, table in docs/evaluation.md
    python benchmarks/localise_nodules.py --only heat the heat maps alone; what is there of the masks stays (or masks)
    python benchmarks/localise_nodules.py --quick     a small one, into --out

An encoder is pre-trained with OTCXR, fine-tuned on labels of images, and its heat maps are judged against the masks of
nodules, beside a centre prior, the average nodule, the same fine-tuning from random weights, and random weights with a
linear probe: what otcxr localize --head finetune does. Then a U-Net is fine-tuned on masks: otcxr evaluate --task
segment-finetune.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pages import embed, machine

from otcxr.console import RichProgress
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.evaluation.finetune import FinetuneConfig
from otcxr.evaluation.results import evaluate_run, localize_run
from otcxr.evaluation.segment import SegmentConfig
from otcxr.evaluation.tasks import EvaluateConfig
from otcxr.files import write_atomic
from otcxr.runs import Run, describe_environment
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "nodules.json"
PLANTED = "prevalence=0,nodule_prevalence=0.5,contrast=1.5,lesion_size=2"
SHOWN = {"pointing": "strongest place inside", "energy": "heat inside", "lung_energy": "heat in the lungs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("heat", "masks", ""), default="")
    parser.add_argument("--run", type=Path, default=Path("runs/nodules"))
    words = parser.parse_args()
    count, size, epochs, tuned, drawn = (150, 64, 1, 4, 4) if words.quick else (4000, 96, 8, 450, 800)
    progress = RichProgress()
    source = f"phantom:{count},seed=61,size={size},{PLANTED}"
    run = pretrain(PretrainConfig(
        data=DataConfig(source), views=ViewsConfig(size=size),
        encoder=EncoderConfig(name="resnet18", width=16, stride=16), out=str(words.run), resume=words.run.exists(),
        train=TrainConfig(epochs=epochs, batch_size=64, learning_rate=0.002, accelerator="cpu", online_images=0),
    ), progress)  # fmt: skip
    result: dict[str, Any] = json.loads(words.out.read_text()) if words.out.is_file() else {}
    result |= {"command": "python benchmarks/localise_nodules.py", "source": source, "machine": machine(),
               "environment": describe_environment()}  # fmt: skip
    for part, measure in (("heat", lambda: heat(run, tuned, progress)), ("masks", lambda: masks(run, drawn, progress))):
        if words.only in ("", part):
            begun = time.perf_counter()
            result[part] = {**measure(), "minutes": round((time.perf_counter() - begun) / 60, 1)}
            write_atomic(words.out, json.dumps(result, indent=1) + "\n")
    if words.out == OUT:
        write_tables(result, size, epochs)


def heat(run: Run, steps: int, progress: RichProgress) -> dict[str, Any]:
    """Heat maps of nodules against their masks."""
    tuning = FinetuneConfig(steps=steps, learning_rate=0.003)
    found = localize_run(
        run, config=EvaluateConfig(accelerator="cpu", finetune=tuning), progress=progress, head="finetune",
        kinds=["grad-cam", "integrated-gradients"],
    )  # fmt: skip
    return {
        "nodules": {kind: maps["findings"].get("Nodule") for kind, maps in found["maps"].items()},
        "average_from": found["average_from"].get("Nodule"), "settings": found["settings"],
        "encoder_digest": found["encoder_digest"],
    }  # fmt: skip


def masks(run: Run, steps: int, progress: RichProgress) -> dict[str, Any]:
    """A U-Net fine-tuned on masks."""
    segment = SegmentConfig(regions=("heart", "lungs", "Nodule"), steps=steps, width=8)
    config = EvaluateConfig(accelerator="cpu", fractions=(1.0,), seeds=1, within=(), segment=segment)
    drawn = evaluate_run(run, "segment-finetune", config=config, progress=progress).result
    return {
        "findings": drawn["findings"], "random": drawn["random"]["findings"],
        "difference": drawn["difference"]["findings"], "settings": drawn["settings"]["segment"],
        "test": {k: drawn["splits"]["test"][k] for k in ("images", "patients", "positives")},
    }  # fmt: skip


def write_tables(result: dict[str, Any], size: int, epochs: int) -> None:
    """Put both tables into the page."""
    environment, page = result["environment"], ROOT / "docs" / "evaluation.md"
    tables, steps = result["heat"]["nodules"], result["heat"]["settings"]["finetune"]["steps"]
    rows = {"encoder": "fine-tuned encoder", "centre": "centre prior", "average": "average nodule",
            "random": "fine-tuned from random weights", "randomised": "random weights, linear probe"}  # fmt: skip
    lines = [f"| | {' | '.join(f'{kind}: {name}' for kind in tables for name in SHOWN.values())} |"]
    lines.append("|---" * (1 + len(tables) * len(SHOWN)) + "|")
    for who, name in rows.items():
        cells = [_interval(table[who][measure]) for table in tables.values() for measure in SHOWN]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    images = next(iter(tables.values()))["images"]
    lines += ["", f"{images:,} test images with nodules of `{result['source']}`, ResNet-18 of width 16 at {size} px, "
              f"{epochs} epochs of OTCXR, {steps:,} steps of fine-tuning on labels of images, 95 % intervals over "
              f"patients; {result['machine']}, torch {environment['versions']['torch']}, "
              f"{environment['date']}."]  # fmt: skip
    embed(page, "nodules", lines)
    print("\n".join(lines))
    found = result["masks"]
    shown = {
        "dice": "Dice",
        "hausdorff": "Hausdorff 95 / side",
        "empties": "AUROC of empties",
        "left_empty": "left empty",
    }
    lines = [f"| | {' | '.join(shown.values())} | from random weights: Dice |", "|---" * (len(shown) + 2) + "|"]
    for region, row in found["findings"].items():
        cells = [_interval(row[name]) for name in shown]
        lines.append(f"| {region} | {' | '.join(cells)} | {_interval(found['random'][region]['dice'])} |")
    lines += ["", f"The same phantoms and encoder; a U-Net fine-tuned with the encoder for "
              f"{found['settings']['steps']:,} steps, judged on {found['test']['images']:,} images, "
              f"{found['test']['positives']['Nodule']:,} of them with nodules."]  # fmt: skip
    embed(page, "masks", lines)
    print("\n".join(lines))


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "not estimable"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    main()
