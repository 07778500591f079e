"""The whole path at its real size: slow, and the last word on whether the main job is done."""

import json
from pathlib import Path

import pytest

from otcxr.cli import main
from otcxr.console import SilentProgress
from otcxr.data.phantom import FINDINGS
from otcxr.demo import run_demo

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_beats_a_random_network_and_is_healthy(tmp_path):
    result = run_demo(tmp_path / "demo", SilentProgress())
    difference = result["difference"]["macro"]["auroc"]
    assert difference["low"] > 0, difference
    page = Path(result["report"]).read_text()
    assert "No collapse seen" in page
    assert len(page) < 15e6
    index = json.loads((tmp_path / "demo" / "explain" / "index.json").read_text())
    assert sum(entry["kind"] == "pair" for entry in index) == 8
    assert {entry["title"] for entry in index if entry["kind"] == "heat"} == set(FINDINGS)


@pytest.mark.slow
def test_real_radiographs_from_folder_to_report(tmp_path, shared_data):
    """One epoch: whether it runs and what it writes, not how good it is."""
    run = tmp_path / "run"
    source = f"nih:{shared_data / 'nih-mini'}"
    words = ["--config", str(ROOT / "configs" / "nih-mini.yaml"), "--data.source", source, "--train.epochs", "1"]
    assert main(["pretrain", *words, "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--eval.resamples", "200"]) == 0
    assert main(["explain", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    result = json.loads((run / "evaluation" / "linear.json").read_text())
    assert result["splits"]["fit"]["images"] + result["splits"]["val"]["images"] == 477  # there is no validation split
    assert result["splits"]["test"]["images"] == 284
    assert set(result["within"]) == {"view=AP", "view=PA"}
    assert result["findings"]["Pneumonia"]["auroc"]["value"] > 0.7
    assert result["findings"]["Hernia"]["auroc"]["value"] is None
    index = json.loads((run / "explain" / "index.json").read_text())
    pneumonia = next(entry for entry in index if entry["title"] == "Pneumonia")
    assert "expert boxes on 4" in pneumonia["text"]
    assert (run / "report.html").stat().st_size < 15e6
