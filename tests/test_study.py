"""Studies: the file is checked, cells are made once, numbers are those of the statistics, pages are whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from otcxr.cli import main
from otcxr.config import flatten
from otcxr.data import open_collection
from otcxr.errors import CheckpointError, ConfigError, DataError
from otcxr.evaluation.estimates import BootstrapSettings
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.resampling import draw
from otcxr.evaluation.statistics import common_findings, compare_drawn, holm, pool_seeds, ranking_columns, tabulate
from otcxr.faults import Interrupted
from otcxr.nn.encoder import Architecture, build_encoder, encoder_digest, load_encoder
from otcxr.nn.imported import from_torchvision, read_weights
from otcxr.nn.resnet import ResNet
from otcxr.report import write_study_page
from otcxr.settings import LATER, config_to_plain, identity
from otcxr.study import read_study, run_study
from otcxr.study.cells import chosen_point, external_collection, pack, read_cell, unpack
from otcxr.study.markdown import write_markdown
from otcxr.study.results import collect
from otcxr.study.spec import Unit
from otcxr.train import pretrain

SOURCE = "phantom:220,seed=6,size=32"
PLAIN = {
    "name": "tiny",
    "text": "What it shows, and <b>what</b> it cannot.",
    "seeds": [0, 1],
    "reference": "simclr",
    "methods": ["simclr", {"method": "vicreg", "as": "vicreg-narrow", "settings": {"hidden": 16, "outputs": 8}}],
    "pretrain": {
        "data": {"source": "phantom:48,seed=7,size=32"},
        "views": {"size": 32},
        "encoder": {"width": 4},
        "train": {"epochs": 1, "batch_size": 8, "accelerator": "cpu", "probes": 0, "online_images": 0,
                  "health_every": 2},
    },
    "judge": {"source": SOURCE, "tasks": ["linear"], "settings": {"fractions": [0.3, 1.0], "resamples": 60}},
    "external": [{"name": "other", "source": "phantom:90,seed=9,size=32", "labels": {"Mass": ["Nodule", "Mass"]}}],
}  # fmt: skip


def write(path, **changes):
    path.write_text(yaml.safe_dump({**PLAIN, **changes}))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study that was run to its end, in this process."""
    folder = tmp_path_factory.mktemp("study")
    file = write(folder / "tiny.yaml")
    words = ["study", str(file), "--out", str(folder / "out"), "--runs", str(folder / "runs"), "--workers", "1"]
    assert main(words) == 0
    return folder, words


def cells(folder):
    return {path.name: path.read_bytes() for path in (folder / "out" / "cells").iterdir()}


DENSE = {
    "name": "dense", "seeds": [0, 1], "reference": "otcxr", "methods": ["otcxr", "simclr"],
    "pretrain": {**PLAIN["pretrain"], "views": {"size": 48}, "encoder": {"width": 8, "stride": 16},
                 "data": {"source": "phantom:48,seed=7,size=48"}},
    "judge": {
        "source": "phantom:160,seed=6,size=48,prevalence=0.5",
        "tasks": ["linear", "segment-token", "localize-linear", "correspondence", "focus"],
        "settings": {"fractions": [0.5, 1.0], "resamples": 60}, "segment": {"regions": ["lungs", "Mass"]},
        "matching": {"images": 20, "pairs": 1},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A study of the tasks that ask where things are."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "dense.yaml").write_text(yaml.safe_dump(DENSE))
    words = ["study", str(folder / "dense.yaml"), "--out", str(folder / "out"), "--runs", str(folder / "runs"),
             "--workers", "1"]  # fmt: skip
    assert main(words) == 0
    return folder


# --- the file --------------------------------------------------------------------------------------------------------


def test_rows_take_what_differs_and_share_the_rest(tmp_path):
    study = read_study(write(tmp_path / "s.yaml"))
    assert [row.name for row in study.rows] == ["simclr", "vicreg-narrow", "random"]
    first, second, random = (row.config for row in study.rows)
    assert random is None
    assert (second.settings.hidden, second.settings.outputs) == (16, 8)
    assert first.encoder == second.encoder
    assert first.train == second.train
    assert study.evaluate.size == 32
    assert [unit.name for unit in study.units()] == [
        "simclr-s0", "random-s0", "vicreg-narrow-s0", "simclr-s1", "random-s1", "vicreg-narrow-s1",
    ]  # fmt: skip
    assert study.config(study.units()[3], {}).seed == 1
    assert study.points() == []


def test_every_seed_may_have_images_of_its_own(tmp_path):
    pretrain = {**PLAIN["pretrain"], "data": {"source": "phantom:48,seed=7{seed},size=32"}}
    study = read_study(write(tmp_path / "s.yaml", pretrain=pretrain))
    sources = {unit.seed: study.config(unit, {}).data.source for unit in study.units() if unit.row == "simclr"}
    assert sources == {0: "phantom:48,seed=70,size=32", 1: "phantom:48,seed=71,size=32"}
    with pytest.raises(
        ConfigError, match=r"judge\.source is phantom:48,seed=7\{seed\},size=32: all trainings are judged"
    ):
        read_study(write(tmp_path / "s.yaml", pretrain=pretrain, judge={}))


def test_images_that_another_training_has_read_change_nothing(tmp_path):
    """The images of a study are read once for all of its trainings; a single training reads them itself."""
    pretrain_ = {**PLAIN["pretrain"], "data": {"source": "phantom:48,seed={seed},size=32"}}
    file = write(tmp_path / "s.yaml", pretrain=pretrain_, methods=["simclr", "vicreg"], external=[])
    assert run_study(file, tmp_path / "out", runs=tmp_path / "runs", workers=1) == []
    study = read_study(file)
    for unit in study.units():
        config = study.config(unit, {})
        if config is not None:
            run = pretrain(replace(config, out=str(tmp_path / "alone" / unit.name)))
            cell = json.loads((tmp_path / "out" / "cells" / f"{unit.name}.train.json").read_text())
            assert cell["encoder_digest"] == encoder_digest(load_encoder(run.path)), unit


def test_a_method_keeps_its_own_views_unless_the_study_says_otherwise(tmp_path):
    rows = ["dino", {"method": "dino", "as": "b", "views": {"local_count": 2}}]
    study = read_study(write(tmp_path / "s.yaml", methods=rows, reference="b"))
    assert [row.config.views.local_count for row in study.rows[:2]] == [6, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": ["otcxr"]}, "unknown setting method in the study file; did you mean 'methods'"),
        ({"methods": []}, "lacks 'methods'"),
        ({"pretrain": {}}, "lacks 'pretrain'"),
        ({"methods": ["otcx"]}, "unknown method 'otcx'; did you mean 'otcxr'"),
        ({"methods": ["simclr", "simclr"]}, "two rows named 'simclr'"),
        ({"methods": [{"as": "x"}]}, "has no method"),
        ({"methods": [{"method": "simclr", "setings": {}}]}, "unknown setting methods.setings"),
        ({"methods": [{"method": "simclr", "settings": {"temprature": 1}}]}, "unknown setting temprature"),
        ({"reference": "simcl"}, "reference is 'simcl'; did you mean 'simclr'"),
        ({"seeds": [0, 0]}, "seeds must be different"),
        ({"judge": {"tasks": ["liner"]}}, "unknown task 'liner'"),
        ({"judge": {"sorce": "x"}}, "unknown setting judge.sorce"),
        ({"judge": {"settings": {"fraction": 1}}}, "unknown setting fraction"),
        ({"pretrain": {**PLAIN["pretrain"], "seed": 3}}, "pretrain.seed is decided by the rows and seeds"),
        ({"tuning": {"grid": {"train.learning_rat": [1]}}}, "received 'train.learning_rat'; did you mean"),
        ({"tuning": {"grid": {"train.learning_rate": [-1.0]}}}, "learning_rate"),
        ({"external": [{"source": "x"}]}, "lacks 'name'"),
        ({"external": [{"name": "test", "source": "x"}]}, "the name 'test' is taken"),
        ({"external": [{"name": "x", "source": "y"}] * 2}, "the name 'x' is taken"),
        ({"judge": {"settings": {"seeds": 2}}}, "judge.settings.seeds has no effect in a study"),
        ({"judge": {"settings": {"rule": "largest F1"}}}, "judge.settings.rule has no effect in a study"),
        ({"judge": {"settings": {"recalibration": "platt"}}}, "judge.settings.recalibration has no effect in a study"),
        ({"imagenet": "resnet18.pth"}, "imagenet needs pretrain.encoder.width 64"),
    ],
)
def test_mistakes_in_the_file_name_the_fix(changes, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        read_study(write(tmp_path / "s.yaml", **changes))


def test_a_file_that_is_none(tmp_path):
    for text, says in (("a: [", "is not YAML"), ("- a", "must hold 'name: value' lines")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_study(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")


# --- cells -----------------------------------------------------------------------------------------------------------


def test_every_cell_is_there_and_nothing_half_written(made):
    folder, _ = made
    names = {f"{row}-s{seed}.{kind}.json" for row in ("simclr", "vicreg-narrow", "random") for seed in (0, 1)
             for kind in ("train", "linear")}  # fmt: skip
    assert set(cells(folder)) == names
    assert {path.name for path in (folder / "out").iterdir()} == {
        "README.md", "cells", "efficiency-linear.svg", "report.html", "results.json", "study.yaml"
    }  # fmt: skip
    assert not list(folder.rglob("*.tmp"))


def test_a_second_run_makes_nothing_and_a_missing_cell_comes_back_the_same(made, tmp_path):
    folder, words = made
    before = cells(folder)
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.copytree(folder / "runs", tmp_path / "runs")
    words = [w.replace(str(folder / "out"), str(tmp_path / "out")).replace(str(folder / "runs"), str(tmp_path / "runs"))
             for w in words]  # fmt: skip
    assert main(words) == 0
    assert cells(tmp_path) == before
    for name in ("vicreg-narrow-s1.linear.json", "simclr-s0.train.json", "random-s1.linear.json"):
        (tmp_path / "out" / "cells" / name).unlink()
    shutil.rmtree(tmp_path / "runs")  # the trainings are gone too: they are done again
    assert main(words) == 0
    after = cells(tmp_path)
    for name, old in before.items():
        one, other = json.loads(old), json.loads(after[name])
        for cell in (one, other):
            for key in ("elapsed_s", "images_per_s", "environment"):
                cell.pop(key, None)
            for line in ("first", "last"):
                for key in ("elapsed_s", "images_per_s"):
                    cell.get(line, {}).pop(key, None)
        assert one == other, name


def test_two_processes_make_the_same_cells(made, tmp_path):
    folder, words = made
    study = words[1]
    failed = run_study(study, tmp_path / "out", runs=tmp_path / "runs", workers=2, only=["simclr", "random"])
    assert failed == []
    before, after = cells(folder), cells(tmp_path)
    assert set(after) == {name for name in before if not name.startswith("vicreg")}
    for name in after:
        if name.endswith(".linear.json"):
            one, other = json.loads(before[name]), json.loads(after[name])
            assert one["shares"] == other["shares"]
            assert one["encoder_digest"] == other["encoder_digest"]


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """However that ended: what is killed must not train on unseen."""
    file = write(tmp_path / "s.yaml", pretrain={**PLAIN["pretrain"], "train": {**PLAIN["pretrain"]["train"],
                                                                                 "epochs": 5000}})  # fmt: skip
    words = [sys.executable, "-m", "otcxr", "study", str(file), "--out", str(tmp_path / "out"), "--runs",
             str(tmp_path / "runs"), "--only", "simclr,vicreg-narrow"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while len(list((tmp_path / "runs").glob("*/metrics.jsonl"))) < 2:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        started = [int(child) for child in children(process.pid)]
        assert len(started) >= 2
    finally:
        process.kill()
        process.wait(30)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}/stat").exists() for child in started):
        assert time.monotonic() < until
        time.sleep(0.1)


def children(pid):
    """Processes that a process has started, where the system tells."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if not listed.exists():
        pytest.skip("this system does not tell which processes belong to which")
    return listed.read_text().split()


def test_cells_of_other_settings_are_refused(made, tmp_path, capsys):
    folder = made[0]
    shutil.copytree(folder / "out", tmp_path / "out")
    other = write(
        tmp_path / "tiny.yaml", judge={**PLAIN["judge"], "settings": {"fractions": [0.5, 1.0], "resamples": 60}}
    )
    assert main(["study", str(other), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "was made with other settings than the study has now" in capsys.readouterr().err
    # what does not touch the cells may change: more resamples, another text, another reference
    free = write(tmp_path / "tiny.yaml", text="new", reference="random",
                 judge={**PLAIN["judge"], "settings": {**PLAIN["judge"]["settings"], "resamples": 30}})  # fmt: skip
    assert main(["study", str(free), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["study"]["reference"] == "random"


def test_a_unit_that_fails_is_a_line_and_the_others_go_on(tmp_path, capsys):
    bad = {"method": "vicreg", "train": {"batch_size": 64}}  # more than there are images
    file = write(tmp_path / "s.yaml", methods=["simclr", bad], seeds=[0], external=[])
    words = ["study", str(file), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--workers", "1"]
    assert main(words) == 1
    out = capsys.readouterr().out.replace("\n", " ")
    assert "failed: vicreg-s0: phantom:48,seed=7,size=32 has" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == ["vicreg-s0"]
    assert set(results["tasks"]["linear"]["1"]["test"]["rows"]) == {"simclr", "random"}
    assert "Not finished" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no row 'nobody'"):
        run_study(file, tmp_path / "out", only=["nobody"])


def test_a_fault_of_the_program_takes_no_other_unit_with_it(tmp_path, monkeypatch):
    from otcxr.study import cells

    def broken(config, progress, pixels):
        if config.method == "vicreg":
            raise RuntimeError("out of something\nand more")
        return pretrain(config, progress, pixels=pixels)

    pretrain = cells.pretrain
    monkeypatch.setattr(cells, "pretrain", broken)
    file = write(tmp_path / "s.yaml", seeds=[0], external=[], tuning={"grid": {"train.learning_rate": [1e-5, 3e-3]}})
    failed = run_study(file, tmp_path / "out", runs=tmp_path / "runs", workers=1)
    log = tmp_path / "out" / "failed"
    assert failed == [f"vicreg-narrow-tune{k}: RuntimeError: out of something; see {log / f'vicreg-narrow-tune{k}.txt'}"
                      for k in (0, 1)]  # fmt: skip
    assert "Traceback" in (log / "vicreg-narrow-tune0.txt").read_text()
    made = {path.name for path in (tmp_path / "out" / "cells").iterdir()}
    assert {"simclr-s0.linear.json", "random-s0.linear.json"} <= made
    assert not any(name.startswith("vicreg-narrow-s") for name in made)
    monkeypatch.undo()
    assert run_study(file, tmp_path / "out", runs=tmp_path / "runs", workers=1, only=["vicreg-narrow"]) == []
    assert (tmp_path / "out" / "cells" / "vicreg-narrow-s0.linear.json").is_file()


def test_who_stops_a_training_stops_the_study(tmp_path, monkeypatch):
    """A signal reaches the training that is at work: nothing half-trained is judged, and no other unit begins."""
    from otcxr.study import cells as module

    begun = []

    def stopped(config, progress, pixels):
        begun.append(config.method)
        raise Interrupted("stopped after step 1 of 6; --resume true continues")

    monkeypatch.setattr(module, "pretrain", stopped)
    with pytest.raises(Interrupted):
        run_study(write(tmp_path / "s.yaml"), tmp_path / "out", runs=tmp_path / "runs", workers=1)
    assert len(begun) == 1
    assert not list((tmp_path / "out").rglob("*.json"))


def test_cells_of_other_images_are_not_compared(made, tmp_path):
    folder = made[0]
    shutil.copytree(folder / "out", tmp_path / "out")
    study = read_study(folder / "tiny.yaml")
    assert collect(study, tmp_path / "out")["missing"] == []
    path = tmp_path / "out" / "cells" / "vicreg-narrow-s1.linear.json"
    cell = json.loads(path.read_text())
    cell["images"]["test"] = "0" * 16
    path.write_text(json.dumps(cell))
    with pytest.raises(DataError, match="vicreg-narrow, seed 1, were made with different images"):
        collect(study, tmp_path / "out")


def test_tuning_takes_the_best_point_on_validation_patients_for_every_row(tmp_path):
    grid = {"train.learning_rate": [1e-5, 3e-3]}
    file = write(tmp_path / "s.yaml", seeds=[0], external=[], tuning={"grid": grid}, methods=["simclr"])
    assert run_study(file, tmp_path / "out", runs=tmp_path / "runs", workers=1) == []
    study = read_study(file)
    tuned = [json.loads((tmp_path / "out" / "cells" / f"simclr-tune{k}.tune.json").read_text()) for k in (0, 1)]
    assert [cell["point"] for cell in tuned] == study.points()
    best = int(np.argmax([cell["validation_auroc"] for cell in tuned]))
    assert chosen_point(study, tmp_path / "out", "simclr") == study.points()[best]
    assert chosen_point(study, tmp_path / "out", "random") == {}
    cell = json.loads((tmp_path / "out" / "cells" / "simclr-s0.train.json").read_text())
    assert cell["settings"]["train"]["learning_rate"] == study.points()[best]["train.learning_rate"]
    assert len(list((tmp_path / "runs").iterdir())) == 2  # the best point is not trained again
    assert (
        study.points()[best]["train.learning_rate"]
        == collect(study, tmp_path / "out")["rows"]["simclr"][0]["tuned"]["train.learning_rate"]
    )


def test_scores_go_through_json():
    scores = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_array_equal(unpack(json.loads(json.dumps(pack(scores)))), scores)
    assert unpack(pack(np.zeros((0, 3)))).shape == (0, 3)


# --- another collection ----------------------------------------------------------------------------------------------


def test_labels_are_harmonised():
    collection = open_collection("phantom:3,seed=1,size=32")
    given = [{"Mass": 1, "Nodule": 0, "Edema": 1}, {"Mass": 0, "Nodule": 0}, {"Mass": 0, "Edema": 0}]
    records = [r._replace(labels=labels) for r, labels in zip(collection.records, given, strict=True)]
    other = collection._replace(records=records, findings=("Mass", "Nodule", "Edema"))
    made = external_collection(other, {"Lesion": ("Mass", "Nodule"), "Swelling": ("Edema",)})
    assert made.findings == ("Lesion", "Swelling")
    assert [dict(r.labels) for r in made.records] == [{"Lesion": 1, "Swelling": 1}, {"Lesion": 0}, {"Swelling": 0}]
    assert external_collection(other, {}).findings == other.findings
    with pytest.raises(ConfigError, match="has no finding 'Hernia'"):
        external_collection(other, {"Lesion": ("Hernia",)})


def test_what_failed_is_said_where_nothing_could_be_made_at_all(tmp_path, capsys):
    """The tables of nothing are an error of their own, which must not be all that is heard."""
    file = write(tmp_path / "odd.yaml", seeds=[0], pretrain={**PLAIN["pretrain"], "encoder": {"stride": 8}})
    words = ["study", str(file), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--workers", "1"]
    assert main(words) != 0
    told = capsys.readouterr()
    for row in ("simclr", "vicreg-narrow", "random"):
        assert f"failed: {row}-s0: encoder.stride must be 16 or 32, received 8" in (told.out + told.err)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_statistics_on_the_cells(made):
    folder, _ = made
    study = read_study(folder / "tiny.yaml")
    results = json.loads((folder / "out" / "results.json").read_text())
    test = open_collection(SOURCE).split("test").records
    labels = np.array([[float(r.labels[f]) for f in results["findings"]] for r in test])
    patients = [r.patient for r in test]

    def scores(row):
        found = [json.loads((folder / "out" / "cells" / f"{row}-s{seed}.linear.json").read_text()) for seed in (0, 1)]
        return np.stack([unpack(cell["shares"]["1"]["tests"]["test"]["score"]) for cell in found])

    table = results["tasks"]["linear"]["1"]["test"]
    settings = BootstrapSettings(60, study.evaluate.seed)
    names = ("simclr", "vicreg-narrow", "random")
    drawn = {n: draw(labels, ranking_columns(scores(n)), patients, results["findings"], settings) for n in names}
    over, values = table["mean_over"], {n: one.values for n, one in drawn.items()}
    pools = {"simclr": ["vicreg-narrow"], "vicreg-narrow": ["simclr"], "random": ["simclr", "vicreg-narrow"]}
    for row in names:  # how far seeds move a row is told by the other trained rows, too
        expected = tabulate(drawn[row], pool_seeds(values[row], [values[n] for n in pools[row]]), over)
        shown = table["rows"][row]
        for one in expected.findings:
            same(shown["findings"][one.finding]["auroc"], one.measures["auroc"])
        same(shown["macro"]["auroc"], expected.macro.measures["auroc"])
        assert shown["macro"]["findings"] == over
    p = []
    for row, others in (("vicreg-narrow", []), ("random", ["vicreg-narrow"])):
        apart = {name: values[row][name] - values["simclr"][name] for name in values[row]}
        pool = pool_seeds(apart, [values[n] for n in others], of_differences=True)
        gap = compare_drawn(drawn[row], drawn["simclr"], pool=pool, over=over).macro.measures["auroc"].difference
        shown = table["to_reference"][row]["macro"]["auroc"]
        same(shown, gap.estimate)
        assert shown["p_value"] == pytest.approx(gap.p_value)
        assert (shown["detectable"] is None) == (gap.estimate.seed_freedom == 1)
        if gap.detectable is not None:
            assert shown["detectable"] == pytest.approx(gap.detectable)
        p.append(gap.p_value)
    corrected = [table["to_reference"][row]["macro"]["auroc"]["p_holm"] for row in ("vicreg-narrow", "random")]
    assert corrected == pytest.approx(holm(p))
    assert set(table["to_reference"]) == {"vicreg-narrow", "random"}
    assert set(table["to_random"]) == {"simclr", "vicreg-narrow"}
    elsewhere = results["tasks"]["linear"]["1"]["other"]
    assert elsewhere["rows"]["simclr"]["findings"]["Nodule"]["n"] == 0  # it was merged into Mass
    assert results["images"]["other"]["images"] == 90
    views = [r.view for r in test]
    assert {"view=AP", "view=PA"} == set(table["within"])
    part = table["within"]["view=AP"]["rows"]["simclr"]["findings"]["Edema"]
    rows = np.array(views) == "AP"
    f = results["findings"].index("Edema")
    assert part["n"] == rows.sum()
    if part["auroc"]["value"] is not None:
        assert part["auroc"]["value"] == pytest.approx(
            np.mean([auroc(labels[rows, f], s[rows, f]) for s in scores("simclr")])
        )


def same(shown, estimate):
    """The part of an estimate that a study keeps."""
    assert (shown["value"], shown["low"], shown["high"]) == pytest.approx(estimate[:3], nan_ok=True)
    assert shown["note"] == estimate.note
    assert shown["seed_freedom"] == estimate.seed_freedom


@pytest.mark.parametrize("marked", [True, False])
def test_a_page_says_what_its_marks_mean_where_it_has_them(made, tmp_path, marked):
    results = json.loads((made[0] / "out" / "results.json").read_text())
    for shares in results["tasks"].values():
        for tests in shares.values():
            for table in tests.values():
                for group in (table, *table["within"].values()):
                    for rows in (group["rows"], group["to_reference"], group["to_random"]):
                        for row in rows.values():
                            for part in (row["macro"], *row["findings"].values()):
                                for one in part.values():
                                    if isinstance(one, dict) and "seed_freedom" in one:
                                        one |= {"seed_freedom": 3, "caution": ""}
    if marked:
        table = results["tasks"]["linear"]["1"]["test"]
        table["rows"]["simclr"]["macro"]["auroc"] |= {"value": 0.7, "low": 0.0, "high": 1.0, "seed_freedom": 1}
    write_study_page(results, tmp_path / "report.html")
    for text in (write_markdown(results)["README.md"], (tmp_path / "report.html").read_text()):
        assert ("0.700 [0.000, 1.000] ‡" in text) == marked
        assert ("‡ one degree of freedom" in text) == marked
        assert "†" not in text


def test_dense_tasks_are_in_the_same_tables(dense):
    results = json.loads((dense / "out" / "results.json").read_text())
    assert results["missing"] == []
    tasks = results["tasks"]
    assert list(tasks) == DENSE["judge"]["tasks"]
    segmented = tasks["segment-token"]["1"]["test"]
    assert list(segmented["rows"]["otcxr"]["findings"]) == ["lungs", "Mass"]
    # the number of a table is the mean over seeds of what its cells hold, over images that show the region
    whole = [json.loads((dense / "out" / "cells" / f"otcxr-s{s}.segment-token.json").read_text()) for s in (0, 1)]
    shown = unpack(whole[0]["regions"]["test"])[:, 1] == 1
    by_hand = np.mean([unpack(cell["shares"]["1"]["tests"]["test"]["dice"])[shown, 1].mean() for cell in whole])
    assert segmented["rows"]["otcxr"]["findings"]["Mass"]["dice"]["value"] == pytest.approx(by_hand, abs=1e-6)
    gap = segmented["to_random"]["simclr"]["macro"]["dice"]
    rows = segmented["rows"]
    assert gap["value"] == pytest.approx(
        rows["simclr"]["macro"]["dice"]["value"] - rows["random"]["macro"]["dice"]["value"], abs=2e-7
    )  # every number of the file has seven digits
    located = tasks["localize-linear"]["1"]["test"]["rows"]["otcxr"]
    assert {"pointing", "energy", "lung_energy", "iou@0.25"} <= set(located["macro"])
    # OTCXR has a plan, the others only their maps; the same pairs for all
    pairs = tasks["correspondence"]["1"]["test"]
    assert results["judged_on"]["correspondence"]["test"]["images"] == 20
    assert {"plan", "nearest_by_cost", "nearest_by_map"} <= set(pairs["rows"]["otcxr"]["macro"])
    assert "plan" not in pairs["rows"]["simclr"]["macro"]
    assert "plan_gain" not in pairs["rows"]["simclr"]["macro"]
    own = {name: found["value"] for name, found in pairs["rows"]["otcxr"]["macro"].items() if isinstance(found, dict)}
    assert own["plan_gain"] == pytest.approx(own["plan"] - own["nearest_by_map"], abs=2e-7)
    gain = pairs["rows"]["otcxr"]["macro"]["plan_gain"]
    assert -1 <= gain["low"] <= gain["value"] <= gain["high"] <= 1
    chance = [row["macro"]["chance"]["value"] for row in pairs["rows"].values()]
    assert chance == pytest.approx([chance[0]] * 3)
    assert set(pairs["to_reference"]["simclr"]["macro"]) & {"nearest_by_map", "plan"} == {"nearest_by_map"}
    focus = tasks["focus"]["1"]["test"]["rows"]
    assert {"learned", "uniform"} <= set(focus["otcxr"]["macro"])
    assert "learned" not in focus["simclr"]["macro"]
    page, text = (dense / "out" / "report.html").read_text(), (dense / "out" / "README.md").read_text()
    for shown_as in ("Segmentation, linear probe of tokens", "Correspondence", "Focus of masses", "nearest by map"):
        assert shown_as in page
        assert shown_as in text


def test_seeds_are_pooled_over_rows_that_vary_alike():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(1, 1, 400))
    values = 3 + 2 * common + 0.5 * rng.normal(size=(12, 4, 400))
    values += rng.normal(size=(12, 4, 1))
    rows = [{"auroc": row} for row in values]
    pool = pool_seeds(rows[0], rows[1:])
    assert set(pool.freedom["auroc"]) <= {12 * 399, 399}
    np.testing.assert_allclose(pool.deviation["auroc"], np.sqrt(4 + 0.25), rtol=0.1)
    gap = {"auroc": values[0] - values[1]}
    paired = pool_seeds(gap, rows[2:], of_differences=True)
    assert set(paired.freedom["auroc"]) <= {10 * 399, 399}
    np.testing.assert_allclose(paired.deviation["auroc"], np.sqrt(2) * 0.5, rtol=0.1)  # what is common cancels
    assert paired.macro["auroc"] == pytest.approx(np.sqrt(2) * 0.5 / 2, rel=0.1)  # a mean of four findings
    alone = pool_seeds(gap, rows[2:3], of_differences=True)  # one other row has no difference
    np.testing.assert_allclose(alone.deviation["auroc"], gap["auroc"].std(axis=1, ddof=1))
    assert alone.freedom["auroc"] == [399] * 4
    wild = {"auroc": values[0] + 20 * rng.normal(size=(4, 400))}
    own = pool_seeds(wild, rows[1:])
    np.testing.assert_allclose(own.deviation["auroc"], wild["auroc"].std(axis=1, ddof=1))
    assert own.freedom["auroc"] == [399] * 4
    values[3, 2] = np.nan  # a finding that one row does not have
    fewer = pool_seeds(rows[0], rows[1:])
    assert fewer.freedom["auroc"][2] in (11 * 399, 399)
    assert np.isnan(pool_seeds(rows[3], rows[:3]).deviation["auroc"][2])
    assert np.isfinite(pool_seeds(rows[0], rows[1:]).macro["auroc"])
    one = [{"auroc": row[:, :1]} for row in values]
    single = pool_seeds(one[0], one[1:])  # one seed says nothing of seeds
    assert np.isnan(single.deviation["auroc"]).all()
    assert np.isnan(single.macro["auroc"])


@pytest.mark.parametrize(("noisy", "most"), [(None, 0.07), (0, 0.13), (5, 0.05)])
def test_pooled_differences_keep_their_level(noisy, most):
    """Two seeds, eight rows, no true difference; perhaps one row that varies ten times as much."""
    rng = np.random.default_rng(1)
    spread = np.full(8, 0.03)
    if noisy is not None:
        spread[noisy] = 0.3
    wrong, repeats = 0, 3000
    for _ in range(repeats):
        x = 0.3 * rng.normal(size=(1, 2)) + spread[:, None] * rng.normal(size=(8, 2))
        rows = [{"auroc": row[None]} for row in x]
        pool = pool_seeds({"auroc": (x[0] - x[1])[None]}, rows[2:], of_differences=True)
        reach = stats.t.ppf(0.975, pool.freedom["auroc"][0]) * pool.deviation["auroc"][0] / np.sqrt(2)
        wrong += abs(x[0].mean() - x[1].mean()) > reach
    assert wrong / repeats < most


def test_means_are_over_the_same_findings_at_every_share():
    assert common_findings({"1": [0, 1, 2, 3], "0.1": [0, 1, 3], "0.01": [2]}) == {
        "1": [0, 1, 3], "0.1": [0, 1, 3], "0.01": []
    }  # fmt: skip
    assert common_findings({"1": [2], "0.1": []}) == {"1": [2], "0.1": []}
    assert common_findings({"1": [], "0.1": []}) == {"1": [], "0.1": []}


def test_pages_hold_every_row_and_show_markup_as_text(made):
    folder, words = made
    page = (folder / "out" / "report.html").read_text()
    text = (folder / "out" / "README.md").read_text()
    for row in ("simclr", "vicreg-narrow", "random"):
        assert f"<td>{row}</td>" in page
        assert f"| `{row}` |" in text
    assert "<b>what</b>" not in page
    assert "&lt;b&gt;what&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert "<script" not in page
    assert "![Label efficiency](efficiency-linear.svg)" in text
    before = text
    (folder / "out" / "README.md").unlink()
    assert main([*words, "--table", "true"]) == 0
    assert (folder / "out" / "README.md").read_text() == before


def test_a_curve_needs_means_at_two_shares(made, tmp_path):
    results = json.loads((made[0] / "out" / "results.json").read_text())
    for table in results["tasks"]["linear"]["0.3"].values():
        for row in table["rows"].values():
            row["macro"]["auroc"] |= {"value": None, "low": None, "high": None, "note": "not estimable"}
    files = write_markdown(results)
    write_study_page(results, tmp_path / "report.html")
    assert set(files) == {"README.md"}
    assert "Label efficiency" not in files["README.md"] + (tmp_path / "report.html").read_text()


def test_results_without_cells_are_refused(tmp_path):
    study = read_study(write(tmp_path / "s.yaml"))
    with pytest.raises(DataError, match="holds no finished cell"):
        collect(study, tmp_path / "out")
    tuned = replace(study, grid={"train.learning_rate": (0.001, 0.002)})
    with pytest.raises(DataError, match="has to be tuned before"):
        chosen_point(tuned, tmp_path / "out", "simclr")


# --- weights of other tools ------------------------------------------------------------------------------------------


class Colours(ResNet):
    """What torchvision computes: the same network with a stem for colours, each standardised by its own numbers."""

    def forward(self, images):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = self.conv1((images - mean) / std)
        return (self.relu(self.bn1(x)),)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_weights_see_grey_as_equal_colours(name):
    torch.manual_seed(0)
    peer = Colours(Architecture(name, 3, 64, 32)).eval()
    peer.bn1.running_mean.normal_()
    peer.bn1.running_var.uniform_(0.5, 2)
    state = {**peer.state_dict(), "fc.weight": torch.zeros(1000, 5), "fc.bias": torch.zeros(1000)}
    ours = from_torchvision(state, name)
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        found, expected = ours(grey)[0], peer(grey.expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-4, rtol=1e-4)
    assert ours.layer4[0].conv1.weight.equal(peer.layer4[0].conv1.weight)


def test_other_weights_are_refused_by_name(tmp_path):
    state = build_encoder("resnet18", seed=0).state_dict()
    with pytest.raises(CheckpointError, match=r"stem \(64, 3, 7, 7\), found \(64, 1, 7, 7\)"):
        from_torchvision(state, "resnet18")
    with pytest.raises(CheckpointError, match="there are no weights"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "a.pth").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="no readable weights"):
        read_weights(tmp_path / "a.pth")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no plain table of tensors"):
        read_weights(tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pth")
    assert read_weights(tmp_path / "c.pth").keys() == state.keys()


def test_imagenet_is_a_row_where_weights_are_given(tmp_path):
    peer = Colours(Architecture("resnet18", 3, 64, 16)).eval()
    torch.save(peer.state_dict(), tmp_path / "resnet18.pth")
    pretrain = {**PLAIN["pretrain"], "encoder": {"width": 64}}
    file = write(
        tmp_path / "s.yaml", imagenet=str(tmp_path / "resnet18.pth"), seeds=[0], external=[], pretrain=pretrain
    )
    assert [row.name for row in read_study(file).rows] == ["simclr", "vicreg-narrow", "imagenet", "random"]
    assert run_study(file, tmp_path / "out", runs=tmp_path / "runs", workers=1, only=["imagenet"]) == []
    assert {p.name for p in (tmp_path / "out" / "cells").iterdir()} == {
        "imagenet-s0.train.json",
        "imagenet-s0.linear.json",
    }


# --- the studies that are committed ----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
UNFINISHED: set[str] = set()  # rules of a study are committed before its numbers
# settings of methods that studies from before them do not tell, at what they were like without
EARLIER = {"method.overlap_weight": 0.0, "method.place": 0.0, "method.place_radius": 1.0,
           "method.global_pool": "uniform", **LATER}  # fmt: skip
OLDER = ("dense", "methods", "nih-boxes", "nih-mini")  # settings came since: their digests are those of then
FINISHED = [file for file in FILES if file.stem not in UNFINISHED]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "studies" / "exploration").glob("*.yaml")),
                         ids=lambda file: file.stem)  # fmt: skip
def test_a_step_of_the_exploration_can_be_done_again_and_has_its_numbers(file):
    study = read_study(file)
    summary = json.loads((ROOT / "docs" / "results" / "studies" / f"{study.name}.json").read_text())
    assert study.name == file.stem == summary["study"]
    assert set(summary["rows"]) == {row.name for row in study.rows}
    assert summary["reference"] == study.reference
    notebook = (ROOT / "docs" / "results" / "exploration.md").read_text()
    for name, row in summary["rows"].items():
        told = row["linear"]["1"]["auroc"]
        assert f"| `{name}` | {told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}] |" in notebook


@pytest.mark.parametrize("name", sorted(UNFINISHED))
def test_cells_of_a_study_under_way_are_of_its_file_and_tell_nothing_yet(name):
    study, out = read_study(ROOT / "configs" / "studies" / f"{name}.yaml"), ROOT / "docs" / "results" / "studies" / name
    assert not (out / "results.json").exists(), "it has ended: take it out of UNFINISHED"
    kept = {path.name for path in (out / "cells").glob("*")}
    known = {f"{unit.name}.tune.json" for unit in study.tuning_units()}
    tuned = [row.name for row in study.rows if {f"{row.name}-tune{k}.tune.json" for k in (0, 1)} <= kept]
    for unit in study.units():
        known |= {f"{unit.name}.{task}.json" for task in ("train", *study.tasks)}
        if unit.row in tuned or study.row(unit.row).config is None:
            chosen = chosen_point(study, out, unit.row)
            for task in study.tasks:
                read_cell(study, unit, out, task, chosen)  # refuses those of other settings
    assert kept <= known


@pytest.mark.parametrize("file", FINISHED, ids=lambda file: file.stem)
def test_a_committed_study_is_whole_and_its_tables_say_what_its_numbers_say(file):
    study, out = read_study(file), ROOT / "docs" / "results" / "studies" / file.stem
    assert study.name == file.stem
    assert (out / "study.yaml").read_text() == file.read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["missing"] == []
    wanted = {f"{unit.name}.{task}.json" for unit in study.units() for task in ("train", *study.tasks)}
    wanted |= {f"{unit.name}.tune.json" for unit in study.tuning_units()}
    assert {path.name for path in (out / "cells").iterdir()} == wanted
    for name, text in write_markdown(results).items():
        assert (out / name).read_text() == text, f"otcxr study {file.name} --table true"


@pytest.mark.parametrize("file", FINISHED, ids=lambda file: file.stem)
def test_a_committed_study_would_train_today_what_it_trained_then(file):
    """Defaults that moved since are said in its file; settings that came since may stand at what does nothing."""
    study, out = read_study(file), ROOT / "docs" / "results" / "studies" / file.stem
    for unit in study.units():
        config = study.config(unit, chosen_point(study, out, unit.row))
        if config is None:
            continue
        then = flatten(json.loads((out / "cells" / f"{unit.name}.train.json").read_text())["settings"])
        now = flatten(config_to_plain(config))
        moved = {key for key, value in then.items() if key not in ("out", "resume") and now.get(key) != value}
        assert not moved, unit.name
        came = {key: now[key] for key in now.keys() - then.keys() if key.startswith("method.")}
        assert all(came[key] == EARLIER[key] for key in came), came


def test_the_second_study_trains_the_rows_of_the_first_as_they_were_tuned():
    """Seeds and their phantoms apart; it has no tuning of its own, so its file repeats what the first one chose."""
    first, second = (read_study(ROOT / "configs" / "studies" / f"{n}.yaml") for n in ("headline", "headline-labels"))
    out = ROOT / "docs" / "results" / "studies" / "headline"
    trained = [row.name for row in second.rows if row.config is not None]
    assert {"otcxr", "simclr", "vicregl"} <= set(trained)
    assert not set(first.seeds) & set(second.seeds)
    for name in trained:
        chosen = chosen_point(first, out, name)
        was = flatten(config_to_plain(first.config(Unit(name, first.seeds[0]), chosen)))
        now = flatten(config_to_plain(second.config(Unit(name, second.seeds[0]), {})))
        assert {key for key in was if was[key] != now[key]} == {"seed", "data.source"}, name


@pytest.mark.parametrize(("name", "value"), LATER.items())
def test_a_setting_that_came_later_counts_only_where_it_does_something(name, value):
    plain = config_to_plain(read_study(ROOT / "configs" / "studies" / "headline.yaml").rows[0].config)
    group, key = name.split(".")
    assert plain[group][key] == value
    before = {k: {n: v for n, v in part.items() if n != key} if k == group else part for k, part in plain.items()}
    assert identity(before) == identity(plain)
    assert identity({**plain, group: plain[group] | {key: 0.5}}) != identity(plain)


@pytest.mark.parametrize("file", [file for file in FINISHED if file.stem not in OLDER], ids=lambda file: file.stem)
def test_cells_of_a_committed_study_are_known_as_its_own(file):
    """So that a cell that is removed, or lost, can be made again beside those that are there."""
    study, out = read_study(file), ROOT / "docs" / "results" / "studies" / file.stem
    for unit in study.units():
        chosen = chosen_point(study, out, unit.row)
        for task in study.tasks:
            assert read_cell(study, unit, out, task, chosen) is not None, (unit.name, task)


@pytest.mark.parametrize("file", FINISHED, ids=lambda file: file.stem)
def test_a_number_of_a_committed_study_is_that_of_its_cell(file):
    """The point estimate of one row, from the scores of its cells and the labels of a source that is always there."""
    study, out = read_study(file), ROOT / "docs" / "results" / "studies" / file.stem
    if not study.source.startswith("phantom:"):
        pytest.skip(f"{study.source} is not part of the repository")
    results = json.loads((out / "results.json").read_text())
    records = open_collection(study.source).split(study.test).records
    cells = [json.loads((out / "cells" / f"{study.reference}-s{seed}.linear.json").read_text()) for seed in study.seeds]
    scores = [unpack(cell["shares"]["1"]["tests"][study.test]["score"]) for cell in cells]
    for f, finding in enumerate(results["findings"]):
        labels = np.array([record.labels[finding] for record in records], dtype=float)
        said = results["tasks"]["linear"]["1"][study.test]["rows"][study.reference]["findings"][finding]["auroc"]
        assert said["value"] == pytest.approx(np.mean([auroc(labels, of[:, f]) for of in scores]), abs=1e-6)
