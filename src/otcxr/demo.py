"""The whole path on phantoms, small enough for two CPU cores and some minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from otcxr.console import Progress
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError
from otcxr.evaluation.results import evaluate_run
from otcxr.explain import explain_run
from otcxr.report import write_report
from otcxr.runs import Run
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

__all__ = ["demo_config", "run_demo"]


def demo_config(out: str | Path) -> PretrainConfig:
    """The demo's settings: phantoms at 96 px, a ResNet-18 a quarter as wide as usual.

    What is hard at this size is in docs/phantoms.md.
    """
    return PretrainConfig(
        data=DataConfig(source="phantom:2400,seed=1,size=96"),
        views=ViewsConfig(size=96),
        encoder=EncoderConfig(name="resnet18", width=16),
        train=TrainConfig(epochs=16, batch_size=64, learning_rate=2e-3, accelerator="cpu"),
        out=str(out),
    )


def run_demo(out: str | Path, progress: Progress) -> dict[str, Any]:
    """Pre-train, probe, explain, report. A demo that was stopped goes on where it was.

    Returns: The evaluation's numbers, with the page's path as "report".
    Raises: ConfigError: ``out`` holds a finished demo, or a run of other settings.
    """
    if (Run(out).path / "report.html").exists():
        raise ConfigError(f"{out} already holds a finished demo; open report.html there, or choose another --out")
    progress.say("1/4 pre-training on phantoms, without labels")
    run = pretrain(replace(demo_config(out), resume=True), progress)
    progress.say("2/4 probing the encoder, and a random one, with labels")
    evaluation = evaluate_run(run, "linear", progress=progress)
    progress.say("3/4 drawing transport plans and heat maps")
    explain_run(run, progress=progress)
    progress.say("4/4 writing the report")
    page = write_report([run], run.path / "report.html")
    return {**evaluation.result, "report": str(page)}
