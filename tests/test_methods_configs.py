"""The committed configurations: the command line takes each as it is, and published numbers are as published."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from otcxr.cli import main
from otcxr.config import flatten
from otcxr.loop import build_method
from otcxr.methods import METHODS
from otcxr.train import EncoderConfig, PretrainConfig, config_from_plain, config_to_plain

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = {
    file.relative_to(CONFIGS).with_suffix("").as_posix(): file
    for file in sorted(CONFIGS.rglob("*.yaml"))
    if "studies" not in file.relative_to(CONFIGS).parts
}
RIVALS = ["simclr", "densecl", "pcrlv2", "moco", "byol", "simsiam", "barlow", "vicreg", "vicregl", "dino"]

# method.* and views.* as published; and the learning rate for 256 images, with the rule that a rate follows the batch
PUBLISHED = {
    "simclr": ({"hidden": 2048, "outputs": 128, "temperature": 0.1, "scale": (0.08, 1.0)}, 0.3),
    "densecl": (
        {"hidden": 2048, "outputs": 128, "temperature": 0.2, "queue": 65536, "momentum": 0.999, "dense_weight": 0.5,
         "scale": (0.2, 1.0)},
        0.03,
    ),
    "pcrlv2": ({"decoder_width": 16, "scale": (0.3, 1.0), "local_count": 6, "local_scale": (0.05, 0.3)}, 0.04),
    "moco": (
        {"hidden": 2048, "outputs": 128, "temperature": 0.2, "queue": 65536, "momentum": 0.999, "scale": (0.2, 1.0)},
        0.03,
    ),
    "byol": ({"hidden": 4096, "outputs": 256, "momentum": 0.99, "scale": (0.08, 1.0)}, 0.3),
    "simsiam": ({"hidden": 2048, "outputs": 2048, "bottleneck": 512, "scale": (0.2, 1.0)}, 0.05),
    "barlow": ({"hidden": 8192, "outputs": 8192, "redundancy": 0.0051, "scale": (0.08, 1.0)}, 0.2),
    "vicreg": (
        {"hidden": 8192, "outputs": 8192, "invariance": 25.0, "variance": 25.0, "covariance": 1.0,
         "scale": (0.08, 1.0)},
        0.2,
    ),
    "vicregl": (
        {"hidden": 8192, "outputs": 8192, "local_hidden": 512, "local_outputs": 512, "global_weight": 0.75,
         "invariance": 25.0, "variance": 25.0, "covariance": 1.0, "scale": (0.08, 1.0), "local_count": 0},
        0.3,
    ),
    "dino": (
        {"hidden": 2048, "bottleneck": 256, "prototypes": 65536, "student_temperature": 0.1,
         "teacher_temperature": 0.04, "momentum": 0.996, "centre_momentum": 0.9, "scale": (0.14, 1.0),
         "local_count": 8, "local_scale": (0.05, 0.14)},
        0.03,
    ),
}  # fmt: skip
# optimizer, weight decay, epochs, epochs of warm-up, clip
TRAINING = {
    "simclr": ("lars", 1e-6, 200, 10, None),
    "densecl": ("sgd", 1e-4, 200, 0, None),
    "pcrlv2": ("sgd", 1e-4, 240, 0, None),
    "moco": ("sgd", 1e-4, 200, 0, None),
    "byol": ("lars", 1e-6, 200, 10, None),
    "simsiam": ("sgd", 1e-4, 100, 0, None),
    "barlow": ("lars", 1.5e-6, 1000, 10, None),
    "vicreg": ("lars", 1e-6, 100, 10, None),
    "vicregl": ("lars", 1e-6, 100, 10, None),
    "dino": ("sgd", 1e-4, 100, 10, 3.0),
}
each_file = pytest.mark.parametrize("name", FILES)
each_rival = pytest.mark.parametrize("name", RIVALS)


@cache
def read(name: str) -> PretrainConfig:
    """What a training would be told: the file through the command line's own parser."""
    import contextlib
    import io

    said = io.StringIO()
    words = ["--config", str(FILES[name]), "--data.source", "phantom:8,seed=1,size=32", "--print_config"]
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main(["pretrain", *words])
    assert stop.value.code == 0
    return config_from_plain(yaml.safe_load(said.getvalue()))


@each_file
def test_the_command_line_takes_a_configuration_as_it_stands(name):
    """Nothing in the file is lost or changed on the way."""
    config = flatten(config_to_plain(read(name)))
    for setting, value in flatten(yaml.safe_load(FILES[name].read_text())).items():
        if setting != "data.source":
            assert config[setting] == value, setting


@each_file
def test_its_method_is_built(name):
    """With a narrow encoder, and heads and queues that are cut down: the published ones take gigabytes."""
    config = read(name)
    small = {"hidden": 16, "outputs": 8, "local_hidden": 16, "local_outputs": 8, "global_hidden": 16,
             "global_outputs": 8, "bottleneck": 8, "prototypes": 16, "queue": 16, "decoder_width": 1}  # fmt: skip
    known = {field.name for field in fields(config.settings)}
    settings = replace(config.settings, **{field: value for field, value in small.items() if field in known})
    config = replace(config, settings=settings, encoder=replace(config.encoder, width=4))
    method = build_method(config)
    assert type(method) is METHODS[config.method].build
    assert method.encoder.strides[-1] == config.encoder.stride
    assert all(p.numel() < 2**20 for p in method.parameters())
    assert torch.cat([p.detach().flatten() for p in method.parameters()]).isfinite().all()


def test_every_rival_has_a_published_configuration():
    assert sorted(name.removeprefix("published/") for name in FILES if "/" in name) == sorted(RIVALS)
    assert set(METHODS) == {*RIVALS, "contrastive-ot", *(name for name in METHODS if name.startswith("otcxr"))}


@each_rival
def test_published_numbers(name):
    config = read(f"published/{name}")
    numbers, rate = PUBLISHED[name]
    assert config.method == name
    for setting, value in numbers.items():
        assert getattr(config.settings if hasattr(config.settings, setting) else config.views, setting) == value
    train = config.train
    optimizer, weight_decay, epochs, warmup, clip = TRAINING[name]
    assert (train.optimizer, train.momentum, train.weight_decay) == (optimizer, 0.9, weight_decay)
    assert (train.epochs, train.clip) == (epochs, clip)
    assert train.warmup * epochs == pytest.approx(warmup)
    assert train.learning_rate == pytest.approx(rate * train.batch_size / 256)
    resnet = "resnet18" if name == "pcrlv2" else "resnet50"
    assert config.encoder == EncoderConfig(resnet, width=64, stride=32, padding="zeros")
    assert config.views.size == 224
    assert config.views.local_side == 96
    assert config.views.flip == 0.0  # laterality


@each_rival
def test_published_configurations_say_nothing_of_a_machine_or_a_source(name):
    plain = yaml.safe_load(FILES[f"published/{name}"].read_text())
    assert set(plain) == {"method", "views", "encoder", "train"}
    given = set(plain["method"]) - {"name"}
    assert given == {field.name for field in fields(METHODS[name].settings)}, "every setting of the method is said"
    assert set(plain["train"]) == {"optimizer", "batch_size", "learning_rate", "momentum", "weight_decay", "epochs",
                                   "warmup", "clip"}  # fmt: skip
    text = FILES[f"published/{name}"].read_text()
    assert f"otcxr pretrain --config configs/published/{name}.yaml --data.source" in text


def test_a_published_share_of_matches_is_20_of_49():
    matches = read("published/vicregl").settings.matches
    assert round(matches * 49) == 20


def test_the_published_hole_has_the_area_of_three_squares():
    views = read("published/pcrlv2").views
    assert views.cutout == 1.0
    assert views.cutout_area == (pytest.approx(3 * 32**2 / 224**2, abs=1e-4),) * 2
