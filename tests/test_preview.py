"""The preview: what training sees, as one picture; and the benchmark of views still runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from otcxr import preview
from otcxr.cli import main
from otcxr.data.dataset import PixelCache, ViewDataset
from otcxr.data.sources import open_collection
from otcxr.data.view_spec import DrawnView, ViewsConfig, draw_views, grey_image, view_generator
from otcxr.data.views import carry_out
from otcxr.errors import ConfigError, DataError
from otcxr.preview import Previewed, caption, draw_preview, preview_views

ROOT = Path(__file__).parent.parent
SOURCE = "phantom:12,seed=3,size=64"


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def tinted(path):
    """Pixels of the picture that are reddish purple, as only what is not valid is."""
    blue, green, red = (cv2.imread(str(path)) / 255).transpose(2, 0, 1)
    return int(((red - green > 0.15) & (blue - green > 0.05)).sum())


def test_the_command_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "deep" / "views.png"
    assert main(["data", "preview", SOURCE, "--out", str(out), "--images", "2", "--views.size", "48"]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    picture = cv2.imread(str(out))
    assert min(picture.shape[:2]) > 500
    assert [path.name for path in out.parent.iterdir()] == ["views.png"]
    assert main(["data", "preview", SOURCE, "--out", str(tmp_path), "--images", "1", "--views.local_count", "3"]) == 0
    assert (tmp_path / "preview.png").is_file()


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    assert preview_views(SOURCE, tmp_path / "new", ViewsConfig(size=32), images=1) == tmp_path / "new" / "preview.png"


def test_every_view_is_there_with_what_was_drawn(tmp_path):
    config = ViewsConfig(size=48, local_count=2, local_size=24, cutout=1.0)
    rows = []
    for record in open_collection(SOURCE).split("train").records[:3]:
        image = grey_image(record.image.radiograph())
        drawn = draw_views(image.pixels.shape, None, config, view_generator(0, 0, 0))
        rows.append(Previewed(record.name, image, drawn, carry_out(image, drawn)))
    figure = draw_preview(rows, "a title")
    assert len(figure.axes) == 3 * (1 + 4)
    words = " ".join(texts(figure)).replace("\n", " ")
    for row in rows:
        assert f"{row.name} 64 x 64 px" in words
    assert words.count("cut-out") == 12
    assert words.count("24 px") == 6
    assert "a title" in [text.get_text() for text in figure.texts]
    outlines = [patch for patch in figure.axes[0].patches if type(patch).__name__ == "Polygon"]
    assert len(outlines) == 2 * 4  # each on a black line
    corner = rows[0].drawn[0].matrix()[:, 2] * 64
    assert np.abs(outlines[0].get_xy()[0] - corner).max() < 1e-6


def test_captions_say_what_was_drawn():
    cos, sin = np.cos(np.radians(7.0)), np.sin(np.radians(7.0))
    affine = (-0.5 * cos, -0.5 * sin, 0.7, -0.5 * sin, 0.5 * cos, 0.1)
    drawn = DrawnView(96, affine, (0.02, 0.97), 0.91, 1.1, -0.05, 0.7, 0.012, 5, (0, 0, 3, 3))
    assert caption(drawn, (96, 96)) == [
        ["96 px", "25% of the area", "turned +7.0°", "mirrored"],
        ["gamma 0.91", "contrast 1.10", "brightness −0.05"],
        ["window 0.02 to 0.97", "blur 0.7 px", "noise 0.012", "cut-out"],
    ]
    plain = drawn._replace(window=(0.0, 1.0), blur=0.0, noise=0.0, cutout=(0, 0, 0, 0))
    assert caption(plain, (96, 96))[2] == []


@pytest.mark.parametrize("shape", [(200, 100), (150, 1500)])
def test_the_angle_of_a_caption_is_one_between_pixels(shape):
    for seed in range(20):
        config = ViewsConfig(size=32, rotation=30.0)
        for drawn in draw_views(shape, None, config, view_generator(seed, 0, 0)):
            angle = float(caption(drawn, shape)[0][2].split()[1].rstrip("°").replace("\N{MINUS SIGN}", "-"))
            assert abs(angle) <= 30.0
            # the upper border of the view, as it lies between the pixels of the image
            (x, _, _), (y, _, _) = drawn.matrix()[:2] * np.array([[shape[1]], [shape[0]]])
            assert angle == pytest.approx(np.degrees(np.arctan2(y, x)), abs=0.06)


@pytest.mark.parametrize("text", ["method:\n  name: dino\n", "views:\n  local_count: 6\n"])
def test_a_training_is_previewed_with_its_own_settings(text, tmp_path, monkeypatch):
    """Source, seed, split and views of the file; the views that its method is made for; then the command's own."""
    seen = []
    monkeypatch.setattr(preview, "draw_preview", lambda rows, title: seen.append((rows, title)) or Figure())
    file = tmp_path / "training.yaml"
    file.write_text(f"data:\n  source: {SOURCE}\n  split: val\ntrain:\n  epochs: 3\nseed: 4\nout: runs/x\n{text}")
    words = ["data", "preview", "--config", str(file), "--images", "2", "--out", str(tmp_path / "a.png")]
    assert main([*words, "--views.size", "64"]) == 0
    (rows, title), records = seen[0], open_collection(SOURCE).split("val").records
    assert [row.name for row in rows] == [record.name for record in records[:2]]
    assert [view.size for view in rows[0].drawn] == [64, 64, 32, 32, 32, 32, 32, 32]
    image, config = rows[0].image, ViewsConfig(size=64, local_count=6)
    expected = draw_views(image.pixels.shape, image.valid, config, view_generator(4, 0, 0))
    assert [view.affine for view in rows[0].drawn] == [view.affine for view in expected]
    assert "seed 4" in title
    assert main([*words[:4], "--method", "simclr", "--seed", "5", *words[4:]]) == 0
    assert "simclr, seed 5" in seen[1][1]


@pytest.mark.parametrize("config", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_previewed(config, tmp_path):
    out = tmp_path / "a.png"
    small = ["--views.size", "32", "--images", "1", "--out", str(out)]
    assert main(["data", "preview", SOURCE, "--config", str(config), *small]) == 0
    assert out.stat().st_size > 5000


def test_a_file_name_is_no_mathematics(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a$x_{$b.png"), np.random.default_rng(0).integers(20, 230, (40, 50), dtype=np.uint8))
    preview_views(f"folder:{folder}", tmp_path / "a.png", ViewsConfig(size=32))
    assert (tmp_path / "a.png").exists()


def test_what_is_not_valid_is_tinted(tmp_path):
    (tmp_path / "images").mkdir()  # of files: a phantom's collimation is not valid either
    grey = np.random.default_rng(0).integers(60, 200, (64, 64)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "one.png"), cv2.GaussianBlur(grey, (0, 0), 3))
    source = f"folder:{tmp_path / 'images'}"
    settings = {"size": 64, "scale": (1.0, 1.0), "aspect": (1.0, 1.0), "noise": 0.0}
    clear = preview_views(source, tmp_path / "clear.png", ViewsConfig(**settings, rotation=0.0), images=1)
    turned = preview_views(source, tmp_path / "turned.png", ViewsConfig(**settings, rotation=30.0), images=1)
    cut = ViewsConfig(**settings, rotation=0.0, cutout=1.0, cutout_area=(0.25, 0.25))
    assert tinted(preview_views(source, tmp_path / "cut.png", cut, images=1)) > 10_000
    assert tinted(turned) > tinted(clear) + 1000
    assert tinted(clear) < 500  # the legend


def test_it_shows_the_views_of_the_training(tmp_path, monkeypatch):
    """The same numbers as the loader's first epoch, on either executor."""
    kept = []
    monkeypatch.setattr(preview, "draw_preview", lambda rows, title: kept.append(rows) or draw_preview(rows, title))
    records = open_collection(SOURCE).split("train").records
    for executor in ("host", "device"):
        config = ViewsConfig(size=32, executor=executor)
        preview_views(SOURCE, tmp_path / "a.png", config, images=3, seed=5)
        dataset = ViewDataset(records, range(3), ViewsConfig(size=32), 5, PixelCache(1.0, bits=8))
        for index, row in enumerate(kept[-1]):
            batch = dataset[(0, index)].batch
            assert np.array_equal(row.batch.geometry.numpy(), batch.geometry.numpy())
            assert (row.batch.views[0] - batch.views[0]).abs().mean() < (1e-9 if executor == "host" else 0.5 / 255)


def test_unreadable_images_are_passed_over_and_said(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not a picture")
    pixels = np.random.default_rng(0).integers(20, 230, (40, 50), dtype=np.uint8)
    cv2.imwrite(str(folder / "b.png"), pixels)
    assert main(["data", "preview", f"folder:{folder}", "--out", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "passed over a.png" in said
    (folder / "b.png").unlink()
    with pytest.raises(
        DataError, match="no radiograph that can be read; list what is wrong: otcxr data inspect folder:"
    ):
        preview_views(f"folder:{folder}", tmp_path / "q.png", ViewsConfig())
    assert not (tmp_path / "q.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "picture.jpg"], "--out must end in .png or name a folder, received picture.jpg; write picture.png"),
        (["--images", "0"], "--images must be at least 1 and --seed at least 0, received 0 and 0"),
        (["--seed", "-1"], "received 4 and -1"),
        (["--views.rotation", "60"], "views.rotation must be in [0, 30]"),
        (["--views.hue", "0.1"], "unknown setting views.hue"),
        (["--split", "trian"], "no record in split 'trian'"),
    ],
)
def test_mistakes_are_one_line(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "preview", SOURCE, *words]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        preview_views(SOURCE, tmp_path / "x.svg", ViewsConfig())


@pytest.mark.slow
def test_the_benchmark_of_views_runs(tmp_path):
    pytest.importorskip("albumentations", reason="albumentations comes with the extra bench", exc_type=ImportError)
    pytest.importorskip("kornia", reason="kornia comes with the extra bench", exc_type=ImportError)
    out = tmp_path / "views.json"
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_views.py"), "--quick", "--out", str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(row["side"], row["size"]) for row in result["speed"]] == [(256, 224), (1024, 224), (512, 96)]
    for values in result["aliasing"].values():
        assert values["otcxr host"] < 0.5 * values["kornia"]


def test_the_committed_benchmark_says_what_the_page_says():
    """Numbers of the page are those of the JSON, and ours are ahead in every row."""
    result = json.loads((ROOT / "docs" / "results" / "views.json").read_text())
    page = (ROOT / "docs" / "views.md").read_text()
    for row in result["speed"]:
        cells = " | ".join(f"{value['median']:,.0f}" for value in row["images_per_s"].values())
        assert cells in page
        for peer in ("albumentations", "albumentations, area", "kornia"):
            assert row["ratio"]["otcxr host"][peer]["median"] > 1
        assert row["ratio"]["otcxr device"]["kornia"]["median"] > 1
    for values in result["aliasing"].values():
        assert values["otcxr host"] <= values["albumentations, area"] + 0.02
