"""Loggers beside metrics.jsonl: they hear everything, and their faults end nothing."""

import csv
import json
import sys
from dataclasses import replace

import pytest

from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError
from otcxr.loggers import Loggers, make_logger
from otcxr.report import write_report
from otcxr.settings import config_to_plain, identity
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

CONFIG = PretrainConfig(
    data=DataConfig("phantom:40,seed=5,size=32"), views=ViewsConfig(size=32), method="simclr",
    encoder=EncoderConfig(name="resnet18", width=4),
    train=TrainConfig(epochs=2, batch_size=8, accelerator="cpu", probes=0, online_images=0, log_every=1,
                      health_every=2),
)  # fmt: skip


class Heard:
    """Keeps what it is told; from the third line on it fails, if it is to."""

    def __init__(self, fails=False):
        self.fails, self.lines, self.settings, self.ended = fails, [], None, []

    def log_hyperparams(self, settings):
        self.settings = settings

    def log_metrics(self, numbers, step):
        if self.fails and len(self.lines) == 2:
            raise OSError("the server is gone")
        self.lines.append((step, numbers))

    def finalize(self, status):
        self.ended.append(status)


MADE = []


def heard(folder):
    MADE.append(Heard())
    return MADE[-1]


def failing(folder):
    MADE.append(Heard(fails=True))
    return MADE[-1]


class Says:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def bar(self, title, total, unit):
        from otcxr.console import SilentProgress

        return SilentProgress().bar(title, total, unit)


def test_every_number_goes_to_every_logger(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "heard_here", sys.modules[__name__])
    MADE.clear()
    progress = Says()
    train = replace(CONFIG.train, loggers=("csv", "heard_here:heard", "heard_here:failing"))
    run = pretrain(replace(CONFIG, train=train, out=str(tmp_path / "run")), progress)
    lines = run.read_metrics()
    trained = [line for line in lines if "loss" in line]
    whole, broken = MADE
    assert [step for step, _ in whole.lines] == [line["step"] for line in trained]
    for (_, numbers), line in zip(whole.lines, trained, strict=True):
        assert numbers["loss"] == line["loss"]
        if "health" in line:
            assert numbers["health/effective_rank"] == line["health"]["effective_rank"]
    assert whole.settings["train.batch_size"] == 8
    assert whole.ended == ["success"]
    assert len(broken.lines) == 2  # left out after that, and the training went on
    assert broken.ended == []
    assert sum("the server is gone" in text for text in progress.lines) == 1
    with (run.path / "logs" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx([line["loss"] for line in trained])


def test_loggers_change_no_number(tmp_path):
    plain = pretrain(replace(CONFIG, out=str(tmp_path / "plain")))
    logged = pretrain(replace(CONFIG, train=replace(CONFIG.train, loggers=("csv",)), out=str(tmp_path / "logged")))
    assert [line["loss"] for line in plain.read_metrics() if "loss" in line] == [
        line["loss"] for line in logged.read_metrics() if "loss" in line
    ]
    assert (plain.path / "encoder.safetensors").read_bytes() == (logged.path / "encoder.safetensors").read_bytes()
    assert not (plain.path / "logs").exists()
    with_one = config_to_plain(replace(CONFIG, train=replace(CONFIG.train, loggers=("csv",))))
    assert identity(with_one) == identity(config_to_plain(CONFIG))  # so a run may go on with another logger


@pytest.mark.parametrize(("name", "says"), [
    ("tensorbord", "did you mean 'tensorboard'"), ("no_such_module:x", "no_such_module"), ("json:nothing", "nothing"),
])  # fmt: skip
def test_loggers_that_are_none(tmp_path, name, says):
    with pytest.raises(ConfigError, match=says):
        Loggers([name], tmp_path, {}, Says())


def test_tensorboard_says_what_is_missing(tmp_path, monkeypatch):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            make_logger("tensorboard", tmp_path)
    else:
        assert make_logger("tensorboard", tmp_path).name == "tensorboard"


def test_the_twin_has_every_number_of_the_page(tmp_path):
    run = pretrain(replace(CONFIG, out=str(tmp_path / "run")))
    page = write_report([run], tmp_path / "report.html")
    twin = json.loads(page.with_suffix(".json").read_text())
    (one,) = twin["runs"]
    assert one["metrics"] == run.read_metrics()
    assert one["settings"] == run.read_config()
    assert one["evaluations"] == {}
