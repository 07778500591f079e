"""What packing and training would take: the arithmetic by hand, and that it is measured on what is there."""

import pytest

from conftest import encode_png
from otcxr.cli import main
from otcxr.errors import ConfigError, DataError
from otcxr.estimate import Estimate, estimate_training
from otcxr.packing import PackConfig, pack_collection
from otcxr.settings import config_from_plain
from test_images import smooth


def training(source, **more):
    return config_from_plain({
        "method": {"name": "simclr"}, "out": "", "data": {"source": source, **more.pop("data", {})},
        "views": {"size": 32}, "encoder": {"width": 8, "stride": 16},
        "train": {"epochs": 3, "batch_size": 4, "accelerator": "cpu", **more},
    })  # fmt: skip


def estimate(**more):
    data = more.pop("data", {})
    known = {
        "images": 1000, "tried": 32, "broken": 2, "decode_s": 0.02, "stored": 300_000.0, "view_s": 0.001,
        "cached": 0.25, "step_s": (0.1, 0.01), "memory": (1e9, 1e7), "free": 8e9, "device": "cpu",
        "config": training("folder:x", epochs=10, batch_size=100, data=data), "pack": PackConfig(workers=4), **more,
    }  # fmt: skip
    return Estimate(**known)


def test_the_arithmetic():
    found = estimate()
    assert found.pack_s == pytest.approx(1000 * 0.02 / 4)
    # a step of 100 takes 0.1 + 1 s, the views of it 0.1 s, decoding three quarters of it again 1.5 s
    assert found.training_s(packed=True) == pytest.approx(10 * 10 * (1.1 + 0.1))
    assert found.training_s(packed=False) == pytest.approx(10 * 10 * (1.1 + 0.1 + 1.5))
    assert found.largest_batch == int((0.8 * 8e9 - 1e9) / 1e7) == 540
    said = "\n".join(found.lines())
    for words in ("images    1,000; of 32 that were tried 2", "pack      5 s and 300 MB (20 ms", "training  2 min from",
                  "4 min without one: 75% of", "2.0 GB of 8.0 GB that are free", "up to about 540 images"):  # fmt: skip
        assert words in said, words
    assert "too much" not in said
    assert "2.0 GB of 2.0 GB that are free at train.batch_size 100: too much" in "\n".join(estimate(free=2e9).lines())


def test_loader_workers_prepare_beside_the_step():
    assert estimate(data={"workers": 2}).training_s(packed=True) == pytest.approx(100 * 1.1)
    assert estimate(data={"workers": 1}).training_s(packed=False) == pytest.approx(100 * 1.6)


def test_fewer_images_than_a_batch():
    assert "fewer images than train.batch_size 100" in estimate(images=50).lines()[-1]
    assert estimate(memory=(9e9, 1e7)).largest_batch == 0


def folder(root, count=10, broken=2):
    root.mkdir()
    for k in range(count):
        (root / f"{k}.png").write_bytes(encode_png(smooth(80, 64, k)) if k >= broken else b"no picture")
    return root


def test_it_is_measured(tmp_path):
    found = estimate_training(training(f"folder:{folder(tmp_path / 'in')}"), PackConfig(size=32), 8)
    assert (found.images, found.tried, found.broken) == (10, 8, 2)
    assert found.stored == 40 * 32
    assert found.decode_s > 0
    assert found.view_s > 0
    assert found.cached == 1.0
    assert found.step_s[0] + 4 * found.step_s[1] > 0
    assert 1e7 < found.memory[0] + 4 * found.memory[1] < found.free
    small = estimate_training(training(f"folder:{tmp_path / 'in'}", data={"cache_gb": 2e-5}), PackConfig(), 8)
    assert small.cached == pytest.approx(2e4 / (80 * 64 * 10), rel=1e-6)
    assert not (tmp_path / "runs").exists()


def test_a_pack_needs_no_packing(tmp_path):
    pack_collection(f"folder:{folder(tmp_path / 'in', broken=0)}", tmp_path / "out", PackConfig(size=32, workers=1))
    found = estimate_training(training(f"pack:{tmp_path / 'out'}"), PackConfig(), 4)
    assert (found.images, found.decode_s, found.cached) == (10, 0.0, 1.0)
    assert not any(line.startswith("pack") for line in found.lines())


def test_what_cannot_be_tried(tmp_path):
    source = f"folder:{folder(tmp_path / 'in', 5, broken=5)}"
    with pytest.raises(DataError, match="none of the 5 images"):
        estimate_training(training(source), PackConfig(), 9)
    with pytest.raises(ConfigError, match="at least 4"):
        estimate_training(training(source), PackConfig(), 3)


def test_the_verb(tmp_path, capsys):
    source = f"folder:{folder(tmp_path / 'in')}"
    more = ["--views.size", "32", "--encoder.width", "8", "--train.batch_size", "4", "--train.accelerator", "cpu"]
    assert main(["data", "estimate", source, *more, "--sample", "6", "--pack.size", "32"]) == 0
    said = capsys.readouterr().out
    assert "images    10; of 6 that were tried 2 cannot be read" in said
    assert "short side 32" in said
    assert main(["data", "estimate", "folder:/nowhere"]) == 1
    assert "no such folder" in capsys.readouterr().err
