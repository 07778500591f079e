"""The command line: quick help, and every mistake in one line that names the fix."""

import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml

from otcxr import __version__
from otcxr.cli import COMMANDS, main

SMALL = [
    "--views.size", "32", "--encoder.width", "4", "--train.epochs", "1", "--train.batch_size", "8",
    "--train.accelerator", "cpu", "--train.probes", "1",
]  # fmt: skip


def run_line(words, capsys):
    """Exit code and the lines on standard error."""
    code = main(words)
    return code, capsys.readouterr().err.strip().splitlines()


def test_help_lists_every_command():
    """That it is quick, because it loads nothing heavy, is tested with the architecture."""
    done = subprocess.run([sys.executable, "-m", "otcxr", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"otcxr {__version__}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: otcxr" in capsys.readouterr().out


def test_print_config_is_what_config_accepts(tmp_path, capsys):
    words = ["pretrain", "--data.source", "phantom:48,seed=7,size=32", "--method", "otcxr-uniform", *SMALL]
    with pytest.raises(SystemExit):
        main([*words, "--method.epsilon", "0.1", "--print_config"])
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["method"]["name"] == "otcxr-uniform"
    assert printed["method"]["mass"] == "uniform"
    assert printed["method"]["epsilon"] == 0.1
    (tmp_path / "settings.yaml").write_text(text)
    assert main(["pretrain", "--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "run")]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["method"] == printed["method"]


def folder_of_pictures(path, broken=0):
    generator = np.random.default_rng(1)
    path.mkdir()
    for number in range(20):
        cv2.imwrite(str(path / f"{number:02d}.png"), generator.integers(0, 256, (40, 40), dtype=np.uint8))
    for number in range(broken):
        (path / f"{number:02d}.png").write_bytes(b"no picture")
    return path


BAD = {
    "no such folder": (["--data.source", "folder:{tmp}/nowhere"], "no such folder"),
    "empty folder": (["--data.source", "folder:{tmp}/empty"], "holds no radiograph"),
    "no such NIH folder": (["--data.source", "nih:{tmp}/nowhere"], "no such folder"),
    "NIH without table": (["--data.source", "nih:{tmp}/empty"], "Data_Entry_2017_v2020.csv is missing"),
    "table without column": (["--data.source", "folder:{tmp}/table"], "has no column 'patient'"),
    "too many broken": (["--data.source", "folder:{tmp}/broken"], "set data.max_skipped to"),
    "unknown reader": (["--data.source", "nhi:{tmp}/good"], "did you mean 'nih'"),
    "no reader": (["--data.source", "{tmp}/good"], "expected READER:ARGUMENT"),
    "unknown setting": (["--data.source", "folder:{tmp}/good", "--method.epsilom", "1"],
                        "unknown setting method.epsilom; did you mean 'epsilon'?"),
    "unknown group": (["--data.source", "folder:{tmp}/good", "--trian.epochs", "1"], "unknown setting trian.epochs"),
    "wrong type": (["--data.source", "folder:{tmp}/good", "--train.epochs", "many"], "train.epochs"),
    "impossible value": (["--data.source", "folder:{tmp}/good", "--train.epochs", "0"], "train.epochs"),
    "unknown method": (["--data.source", "folder:{tmp}/good", "--method", "simclar"], "did you mean 'simclr'"),
    "unknown encoder": (["--data.source", "folder:{tmp}/good", "--encoder.name", "resnet81"], "resnet18"),
    "unknown phantom setting": (["--data.source", "phantom:48,sede=1"], "did you mean 'seed'"),
    "no settings file": (["--config", "{tmp}/none.yaml", "--data.source", "phantom:8"], "cannot be read"),
    "settings file with unknown name": (["--config", "{tmp}/bad.yaml", "--data.source", "phantom:8"],
                                        "unknown setting views.siez in"),
    "settings file that is no text": (["--config", "{tmp}/binary.yaml", "--data.source", "phantom:8"], "is not UTF-8"),
    "method as plain text": (["--config", "{tmp}/plain.yaml", "--data.source", "phantom:8"],
                             "is a group of settings; write method.name"),
    "text for a list": (["--data.source", "phantom:8", "--views.scale", "big"], "write it as a list, such as [a, b]"),
    "negative seed": (["--data.source", "phantom:8", "--seed", "-1"], "seed must be >= 0"),
    "source missing": ([], "data.source"),
    "objective": (["--data.source", "phantom:8", "--method.objective", "plan"], "must be 'value' or 'sharp'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir()
    folder_of_pictures(tmp / "good")
    folder_of_pictures(tmp / "broken", broken=5)
    (folder_of_pictures(tmp / "table") / "labels.csv").write_text("image,person\n00.png,1\n")
    (tmp / "bad.yaml").write_text("views:\n  siez: 3\n")
    (tmp / "plain.yaml").write_text("method: simclr\n")
    (tmp / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    return tmp


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_that_names_the_fix(name, bad_inputs, tmp_path, capsys):
    words, expected = BAD[name]
    words = [word.replace("{tmp}", str(bad_inputs)) for word in words]
    before = ["pretrain", *SMALL] if "--train.epochs" not in words else ["pretrain"]
    code, lines = run_line([*before, *words, "--out", str(tmp_path / "run")], capsys)
    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("otcxr: ")
    assert expected in lines[0]
    assert not (tmp_path / "run").exists()  # a mistake leaves no trace


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["evaluate", "{tmp}/good"], "holds no run"),
        (["explain", "{tmp}/good"], "holds no run"),
        (["report", "{tmp}/good"], "holds no run"),
        (["data", "inspect", "folder:{tmp}/nowhere"], "no such folder"),
        (["data", "inspct", "x"], "did you mean 'data inspect'"),
    ],
)
def test_other_commands_too(words, expected, bad_inputs, capsys):
    code, lines = run_line([word.replace("{tmp}", str(bad_inputs)) for word in words], capsys)
    assert (code, len(lines)) == (1, 1)
    assert expected in lines[0]


def test_a_path_that_cannot_be_written_is_one_line(bad_inputs, tmp_path, capsys):
    (tmp_path / "file.txt").write_text("x")
    out = str(tmp_path / "file.txt" / "run")
    code, lines = run_line(["pretrain", "--data.source", f"folder:{bad_inputs}/good", *SMALL, "--out", out], capsys)
    assert (code, len(lines)) == (1, 1)
    assert "file.txt" in lines[0]
    words = ["data", "inspect", f"folder:{bad_inputs}/good", "--skipped", str(tmp_path / "file.txt" / "x.csv")]
    code, lines = run_line(words, capsys)
    assert (code, len(lines)) == (1, 1)


def test_heat_maps_of_an_earlier_encoder_are_refused(tmp_path, capsys):
    """Evaluate, train on, explain: the probe no longer belongs to the encoder."""
    run = str(tmp_path / "run")
    words = ["pretrain", "--data.source", "phantom:120,seed=5,size=32", "--out", run, *SMALL]
    assert main(words) == 0
    assert main(["evaluate", run, "--eval.resamples", "20"]) == 0
    from otcxr.nn.encoder import load_encoder
    from otcxr.runs import Run

    encoder = load_encoder(run)
    encoder.conv1.weight.data.mul_(1.01)
    Run(run).write_weights(encoder, encoder, {"input_size": 32, "source": "phantom:120,seed=5,size=32"})
    capsys.readouterr()
    code, lines = run_line(["explain", run], capsys)
    assert (code, len(lines)) == (1, 1)
    assert "earlier state of the encoder; run 'otcxr evaluate" in lines[0]
    assert main(["report", run]) == 0
    assert "earlier state" in (tmp_path / "run" / "report.html").read_text()


def test_a_gpu_where_none_is_and_another_architecture(tmp_path, capsys):
    import torch

    words = ["pretrain", "--data.source", "phantom:48,seed=7,size=32", "--out", str(tmp_path / "run"), *SMALL]
    if not torch.cuda.is_available():
        code, lines = run_line([*words, "--train.accelerator", "cuda"], capsys)
        assert (code, len(lines)) == (1, 1)
        assert "no usable GPU; use cpu or auto" in lines[0]
    assert main(words) == 0
    capsys.readouterr()
    code, lines = run_line([*words, "--encoder.name", "resnet34", "--resume", "true"], capsys)
    assert (code, len(lines)) == (1, 1)
    assert "encoder.name = resnet18, now it is resnet34" in lines[0]


def test_data_inspect_counts_and_lists(bad_inputs, tmp_path, capsys):
    out = tmp_path / "skipped.csv"
    assert main(["data", "inspect", f"folder:{bad_inputs}/broken", "--skipped", str(out)]) == 0
    text = capsys.readouterr().out
    assert "15 usable images, patients not stated" in text
    assert "5 skipped" in text
    assert len(out.read_text().splitlines()) == 6
    assert main(["data", "inspect", "phantom:30,seed=2,size=32"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"30 usable images, \d+ patients, 30 studies", text)
    assert "Nodule" in text


def test_labels_that_are_none_are_named(tmp_path, capsys, caplog):
    folder = folder_of_pictures(tmp_path / "pictures")
    (folder / "labels.csv").write_text("image,patient,Edema,Mass\n00.png,a,1,-1\n01.png,b,0,1\n")
    main(["data", "inspect", f"folder:{folder}"])
    assert "column 'Mass' is no finding: it holds '-1'" in caplog.text
    assert "Edema" in capsys.readouterr().out


def test_inspect_says_when_a_split_cuts_through_a_patient(tmp_path, capsys):
    folder = folder_of_pictures(tmp_path / "pictures")
    (folder / "labels.csv").write_text("image,patient,split\n00.png,a,train\n01.png,a,test\n")
    assert main(["data", "inspect", f"folder:{folder}"]) == 0
    assert "a split must not cut through a patient" in capsys.readouterr().out


def test_the_table_is_never_cut(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["pretrain", "--data.source", "phantom:200,seed=5,size=32", "--out", run, *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--eval.resamples", "50"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert re.search(r"Effusion +\d+/\d+ +0\.\d{3} \[\d\.\d\d, \d\.\d\d\]", text)


def test_the_whole_path_from_the_command_line(tmp_path, capsys):
    run = str(tmp_path / "run")
    source = "phantom:200,seed=5,size=32"
    assert main(["pretrain", "--data.source", source, "--out", run, *SMALL]) == 0
    assert main(["evaluate", run, "--eval.resamples", "50"]) == 0
    text = capsys.readouterr().out
    assert "AUROC, all test images (95% intervals by patient)" in text
    assert "Effusion" in text
    assert main(["explain", run]) == 0
    assert main(["report", run]) == 0
    result = json.loads((tmp_path / "run" / "evaluation" / "linear.json").read_text())
    assert set(result["within"]) == {"view=AP", "view=PA"}
    index = json.loads((tmp_path / "run" / "explain" / "index.json").read_text())
    assert {entry["kind"] for entry in index} == {"pair", "heat"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(index)
