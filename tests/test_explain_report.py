"""Pictures and page: made from files, aligned with the pixels, safe against markup, complete and offline."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from otcxr.attribution import ProbedEncoder, heat_map
from otcxr.data.images import box_in_square, fit_square
from otcxr.data.records import Box
from otcxr.errors import DataError
from otcxr.explain import draw_pair
from otcxr.heatmaps import draw_heat_maps, explain_probe
from otcxr.nn.encoder import build_encoder, pool
from otcxr.report import write_report
from otcxr.runs import Run

CELLS = 4


def pair(shift=0):
    """A stored pair of identical views whose plan sends every position ``shift`` columns to the right."""
    n = CELLS * CELLS
    plan = np.zeros((n, n), np.float32)
    for i in range(n):
        plan[i, i // CELLS * CELLS + (i % CELLS + shift) % CELLS] = 1 / n
    view = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    identity = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    return {
        "view_s": view.astype(np.float16), "view_t": view.astype(np.float16),
        "geometry": np.stack((identity, identity)),
        "valid_s": np.ones((CELLS, CELLS), bool), "valid_t": np.ones((CELLS, CELLS), bool),
        "cost": 1 - np.eye(n, dtype=np.float32), "plan": plan, "a": np.full(n, 1 / n, np.float32),
        "b": np.full(n, 1 / n, np.float32), "first_centre": np.array(0.5),
        "name": np.array("image.png"), "boxes": np.zeros((0, 4)),
        "findings": np.array([], dtype=np.str_),
    }  # fmt: skip


@pytest.mark.parametrize(("shift", "share"), [(0, "100%"), (2, "0%"), (1, "75%")])
def test_the_picture_says_how_many_positions_are_matched(shift, share):
    figure, text = draw_pair(pair(shift))
    assert f"{share} of 16" in text
    assert len(figure.axes) >= 5


def test_pictures_of_pairs_that_share_nothing():
    arrays = pair()
    arrays["geometry"][1, 0, 2] = 5.0
    _, text = draw_pair(arrays)
    assert "none" in text


def probed(findings=2, seed=0):
    encoder = build_encoder("resnet18", width=4, stride=16, seed=seed).eval()
    generator = np.random.default_rng(seed)
    return encoder, generator.standard_normal((findings, 32)), generator.standard_normal(findings)


def test_probed_encoder_gives_the_probe_s_logits():
    encoder, weights, bias = probed()
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = pool(encoder(images)).detach().numpy() @ weights.T + bias
    assert np.allclose(ProbedEncoder(encoder, weights, bias)(images).detach().numpy(), expected, atol=1e-5)


def test_heat_map_is_the_class_activation_map_of_a_linear_probe():
    encoder, weights, bias = probed()
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    shown = heat_map(ProbedEncoder(encoder, weights, bias), images, 1)
    last = encoder(images)[-1].detach()
    cam = torch.einsum("c,bchw->bhw", torch.from_numpy(weights[1]).float(), last).clamp_min(0) / last[0, 0].numel()
    assert shown.shape == (2, 64, 64)
    # the network looks at pixels 0, 16, 32 and 48 (their centres); there the map is the class activation map itself
    assert torch.allclose(shown[:, ::16, ::16], cam, atol=1e-6)
    halfway = (cam[:, :, :-1] + cam[:, :, 1:]) / 2
    assert torch.allclose(shown[:, ::16, 8:56:16], halfway, atol=1e-6)
    assert float(shown.max()) > 0


@pytest.mark.parametrize(("size", "stride"), [(96, 16), (128, 32)])
def test_the_first_centre_is_where_the_network_looks(size, stride):
    """The centroid of what one position of the last map depends on, by gradient, far from the border."""
    encoder = build_encoder("resnet18", width=8, stride=stride, padding="replicate", seed=0).eval()
    cells = size // stride
    cell = cells // 2
    total = torch.zeros(size, size)
    for seed in range(6):
        images = torch.rand(4, 1, size, size, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        encoder(images)[-1][:, :, cell, cell].sum().backward()
        total += images.grad.abs().sum((0, 1))
    places = (torch.arange(size) + 0.5) / size
    seen = float((total.sum(0) * places).sum() / total.sum())
    assert abs(seen - (cell + encoder.first_centre) / cells) < 0.15 / cells
    assert abs(seen - (cell + 0.5) / cells) > 0.3 / cells


def test_boxes_stay_on_what_they_mark_in_a_non_square_image():
    image = torch.zeros(1, 60, 100)
    box = Box("Mass", x=70, y=10, width=20, height=30)
    image[0, 10:40, 70:90] = 1
    size = 50
    shown = fit_square(image, size)[0].numpy()
    x, y, width, height = (value * size for value in box_in_square(box, 60, 100))
    rows, columns = np.nonzero(shown > 0.5)
    assert (rows.min(), rows.max() + 1) == pytest.approx((y, y + height), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((x, x + width), abs=1)


def test_a_box_is_drawn_where_the_pixels_are():
    """Render the figure and look for the frame's colour around a planted white square."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = np.zeros((50, 50), np.float32)
    image[10:20, 30:45] = 1
    maps = {"encoder": np.zeros((1, 50, 50), np.float32)}
    figure = draw_heat_maps([image], maps, [[(0.6, 0.2, 0.3, 0.2)]], ["x"], "Mass")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    top = figure.axes[0].get_window_extent()
    height = pixels.shape[0]
    inset = 4  # off the white ground around the panel
    panel = pixels[
        int(height - top.y1) + inset : int(height - top.y0) - inset, int(top.x0) + inset : int(top.x1) - inset
    ]
    yellow = (panel[..., 0] > 200) & (panel[..., 1] > 190) & (panel[..., 2] < 120)
    white = panel.min(-1) > 230
    rows, columns = np.nonzero(yellow)
    inner_rows, inner_columns = np.nonzero(white)
    assert rows.min() <= inner_rows.min() <= inner_rows.max() <= rows.max()
    assert columns.min() <= inner_columns.min() <= inner_columns.max() <= columns.max()
    assert abs(int(rows.min()) - int(inner_rows.min())) < 6
    assert abs(int(columns.max()) - int(inner_columns.max())) < 6


def test_heat_maps_without_a_probe_name_the_step_before(tmp_path):
    with pytest.raises(DataError, match="run 'otcxr evaluate"):
        explain_probe(Run(tmp_path), probed()[0], [], 64)


def small_run(path: Path, name="<b>bold</b> & co") -> Run:
    run = Run(path)
    run.path.mkdir(parents=True)
    run.write_config({"data": {"source": name, "split": "train"}, "method": {"name": "otcxr"}, "train": {"epochs": 3}})
    health = {"effective_rank": 3.0, "effective_rank_limit": 7.0, "spatial_diversity": 0.5, "hits": 0.4,
              "hits_nearest_neighbour": 0.3, "hits_chance": 0.2, "entropy_plan": 3.0, "entropy_mu": 2.0,
              "entropy_nu": 2.1, "entropy_independent": 4.1}  # fmt: skip
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "epoch": float(step), "loss": 3.0 / step, "transport": 0.5, "chance": 2.0,
                            "images_per_s": 100.0, "elapsed_s": 60.0 * step, "health": health,
                            "verdict": {"healthy": step > 1, "text": "no collapse seen: it learns"}})  # fmt: skip
    return run


def test_page_is_one_offline_file_with_every_section(tmp_path):
    run = small_run(tmp_path / "run")
    page = write_report([run], tmp_path / "page.html").read_text()
    for section in ("Data", "Training", "Health", "Evaluation", "Pictures", "Settings and provenance"):
        assert f"<h2>{section}</h2>" in page
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert "@import" not in page
    assert "<script" not in page
    assert "it learns" in page
    assert page.count("<svg") >= 5
    assert not list(tmp_path.rglob("*.tmp"))


def run_with(path: Path, lines) -> Run:
    run = Run(path)
    run.path.mkdir(parents=True)
    run.write_config({"data": {"source": "x", "split": "train"}, "method": {"name": "any"}, "train": {"epochs": 3}})
    for line in lines:
        run.append_metrics(line)
    return run


def step_line(step, **terms):
    return {"step": step, "epoch": step / 10, "loss": 3.0 / step, **terms, "gradient_norm": 1.0 + step,
            "learning_rate": 0.1, "images_per_s": 100.0, "elapsed_s": 60.0 * step}  # fmt: skip


def charts(page):
    """Of every chart on the page: its title and the dashed and solid curves in its SVG."""
    out = {}
    for title, svg in re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", page, re.DOTALL):
        lines = re.findall(r'<g id="line2d_\d+">\s*<path [^>]*clip-path[^>]*>', svg)
        dashed = sum("stroke-dasharray" in line for line in lines)
        out[title] = (len(lines) - dashed, dashed)
    return out


def test_chance_levels_are_dashed_in_the_chart_of_their_term(tmp_path):
    lines = [step_line(s, first=1.0, first_chance=2.0, second=0.5, lone_chance=0.1) for s in (1, 2, 3)]
    found = charts(write_report([run_with(tmp_path / "run", lines)], tmp_path / "page.html").read_text())
    assert found == {"loss": (1, 0), "first": (1, 1), "second": (1, 0), "lone chance": (1, 0), "gradient norm": (1, 0)}


def test_old_runs_name_the_chance_level_of_the_contrastive_loss_alone(tmp_path):
    old = [step_line(s, contrastive=3.0 / s, chance=2.0) for s in (1, 2)]
    new = [step_line(s, contrastive=3.0 / s, contrastive_chance=2.0) for s in (3, 4)]
    expected = {"loss": (1, 1), "contrastive": (1, 1), "gradient norm": (1, 0)}
    for name, lines in (("old", old), ("went on", old + new)):
        found = charts(write_report([run_with(tmp_path / name, lines)], tmp_path / "page.html").read_text())
        assert found == expected, name


def test_terms_that_come_or_go_and_values_that_are_no_numbers_break_nothing(tmp_path):
    lines = [step_line(1, early=1.0, note="text", nothing=None, several=[1, 2]), step_line(2, early=float("nan")),
             step_line(3, late=2.0), step_line(4, late=2.5)]  # fmt: skip
    found = charts(write_report([run_with(tmp_path / "run", lines)], tmp_path / "page.html").read_text())
    assert set(found) == {"loss", "early", "late", "gradient norm"}


def online(value, low=None, high=None):
    return {"knn": {"auroc": {"value": value, "low": low, "high": high}},
            "linear": {"auroc": {"value": 0.8125, "low": 0.75, "high": 0.875}},
            "findings": ["Mass", "<Nodule>"], "images_fit": 200, "images_judged": 150,
            "judged_on": "patients <held> out"}  # fmt: skip


def test_online_probes_are_a_panel_and_no_term(tmp_path):
    lines = [step_line(1), step_line(2), {"step": 2, "epoch": 0.2, "online": online(0.6, 0.5, 0.7)}, step_line(3),
             {**step_line(4), "online": online(0.65625, 0.5, 0.75)}, {"step": 5, "epoch": 0.5}]  # fmt: skip
    page = write_report([run_with(tmp_path / "run", lines)], tmp_path / "page.html").read_text()
    found = charts(page)
    assert found == {"loss": (1, 0), "gradient norm": (1, 0), "Macro AUROC": (2, 0)}
    assert "<h2>Online probe</h2>" in page
    text = " ".join(page.split())
    assert "fitted on 200 labelled images and judged on 150 others (patients &lt;held&gt; out)" in text
    assert "it is not the evaluation" in text
    assert "macro AUROC of 2 findings (Mass, &lt;Nodule&gt;)" in text
    assert "At step 4: nearest neighbours 0.656 [0.500, 0.750], linear 0.812 [0.750, 0.875]" in text
    assert "0.4 of 3 epochs" in text  # of the last line that has a loss


def test_online_probes_that_cannot_be_estimated(tmp_path):
    partial = {"knn": {"auroc": {"value": None, "low": None, "high": None}}, "findings": []}
    lines = [{"step": 7, "epoch": 0.7, "online": online(0.5)}]
    page = write_report([run_with(tmp_path / "one", lines)], tmp_path / "page.html").read_text()
    assert "At step 7: nearest neighbours 0.500, linear 0.812 [0.750, 0.875]" in " ".join(page.split())
    assert "Macro AUROC" not in charts(page)  # one point is no curve
    assert "No curves yet" in page
    lines = [{"step": s, "epoch": 0.7, "online": partial} for s in (1, 2)]
    page = write_report([run_with(tmp_path / "none", lines)], tmp_path / "page.html").read_text()
    assert "nearest neighbours not estimable" in page
    careful = online(0.5)
    careful["linear"]["auroc"]["caution"] = "few"
    page = write_report([run_with(tmp_path / "few", [{"step": 1, "epoch": 0.1, "online": careful}])],
                        tmp_path / "page.html").read_text()  # fmt: skip
    assert "0.875] †. † linear: few.</p>" in " ".join(page.split())
    for value in (None, {}):
        line = {"step": 1, "epoch": 0.1, "online": value}
        page = write_report([run_with(tmp_path / str(value), [line])], tmp_path / "page.html").read_text()
        assert "Online probe" not in page


def test_health_panels_show_what_was_measured(tmp_path):
    health = {"effective_rank": 3.0, "effective_rank_limit": 7.0, "effective_rank_tokens": 30.0,
              "effective_rank_tokens_limit": 511.0, "embedding_std": 0.1, "embedding_std_reference": 0.125,
              "embedding_length_std": 0.2, "correlation": 0.3, "correlation_chance": 0.1, "spatial_diversity": 0.5,
              "entropy_plan": 4.0, "entropy_mu": 3.4, "entropy_nu": 3.5, "entropy_independent": 6.9,
              "entropy_one_to_one": 3.5}  # fmt: skip
    scores = {"hits": 0.4, "exact": 0.1, "hits_by_mass": 0.4, "hits_nearest_neighbour": 0.3, "hits_chance": 0.2}
    plain = {name: value for name, value in health.items() if "entropy" not in name}
    lines = [step_line(s) | {"health": h} for s, h in ((1, health), (2, health | scores), (3, health))]
    page = write_report([run_with(tmp_path / "transport", lines)], tmp_path / "page.html").read_text()
    common = {
        "loss": (1, 0), "gradient norm": (1, 0), "Effective rank of pooled embeddings": (1, 1),
        "Effective rank of tokens": (1, 1), "Spread of normalised embeddings": (1, 1),
        "Correlation between dimensions": (1, 1), "Share of token variance within images": (1, 0),
    }  # fmt: skip
    assert charts(page).keys() == common.keys() | {
        "Correspondence", "Correspondence, more strictly", "Entropy of masses and plan, nats"
    }  # fmt: skip
    assert charts(page)["Entropy of masses and plan, nats"] == (3, 2)
    page = write_report([run_with(tmp_path / "other", [step_line(s) | {"health": plain} for s in (1, 2)])],
                        tmp_path / "page.html").read_text()  # fmt: skip
    assert charts(page) == common


def test_names_with_markup_are_shown_as_text(tmp_path):
    page = write_report([small_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in page


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.write_config({"data": {"source": "x", "split": "train"}, "method": {"name": "simclr"}, "train": {"epochs": 3}})
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "No curves yet" in page
    assert "Not evaluated yet" in page


def test_several_runs_share_a_page(tmp_path):
    runs = [small_run(tmp_path / name) for name in ("first", "second")]
    page = write_report(runs, tmp_path / "page.html").read_text()
    assert 'href="#run-2"' in page
    assert "first" in page
    assert "second" in page
    with pytest.raises(DataError, match="no runs"):
        write_report([], tmp_path / "none.html")
