"""Pages in a real browser: nothing is loaded, nothing fails, pointing and keys work, numbers computed there are right.

Chromium is taken where the system has it. Where OTCXR_BROWSER is set, as in CI, its absence is a failure and no skip.
"""

import os
import re
import shutil
from importlib import resources

import numpy as np
import pytest
import torch

from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.explorer import explorer_data, true_cells
from otcxr.ot import sinkhorn
from otcxr.report import run as reporting
from otcxr.report import write_explorer_page, write_report
from otcxr.runs import Run
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
MARKUP = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        if os.environ.get("OTCXR_BROWSER"):
            pytest.fail("OTCXR_BROWSER is set, but there is no chromium on this machine")
        pytest.skip("there is no chromium on this machine; Debian's package 'chromium' is enough")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(PretrainConfig(
        data=DataConfig("phantom:60,seed=5,size=96,prevalence=0.5"), views=ViewsConfig(size=96),
        encoder=EncoderConfig(name="resnet18", width=8, stride=16), out=str(tmp_path_factory.mktemp("run") / "run"),
        train=TrainConfig(epochs=1, batch_size=16, accelerator="cpu", probes=2, online_images=0),
    ))  # fmt: skip


class Watched:
    """A page, with everything that it asked for and complained about."""

    def __init__(self, browser, path, **context):
        self.page = browser.new_context(**context).new_page()
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda line: self.complaints.append(line.text) if line.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.readyState === 'complete'")

    def clean(self):
        outside = [url for url in self.asked if not url.startswith(("file:", "data:"))]
        assert not outside
        assert len([url for url in self.asked if url.startswith("file:")]) == 1
        assert not self.complaints

    def explorer(self, code):
        return self.page.evaluate(f"() => {{ const e = document.querySelector('.explorer').explorer; return {code}; }}")

    def said(self):
        return self.page.inner_text("#transport-explorer [data-out=text]")

    def pixels(self, place):
        return self.page.evaluate("s => document.querySelector(s).toDataURL()", place)


@pytest.fixture(scope="module")
def shown(browser, run, tmp_path_factory):
    path = write_report([run], tmp_path_factory.mktemp("page") / "report.html")
    return Watched(browser, path, viewport={"width": 1280, "height": 900})


def test_the_report_asks_for_nothing_and_complains_of_nothing(shown):
    shown.clean()
    assert shown.page.locator("#transport-explorer").count() == 1
    assert shown.page.locator("#transport-explorer canvas").count() == 4


def test_pointing_shows_where_the_mass_goes(shown, run):
    shown.page.reload()
    canvas = shown.page.locator('#transport-explorer canvas[data-view="0"]')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    pair = explorer_data(run)["pairs"][0]
    rows, columns = pair["grids"][0]
    seen = {}
    for index in (0, rows * columns // 2 + 1, rows * columns - 1):
        x = (index % columns + pair["first"]) / columns
        y = (index // columns + pair["first"]) / rows
        shown.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert shown.explorer("[e.state.side, e.state.index]") == [0, index]
        seen[index] = shown.said(), shown.pixels('#transport-explorer canvas[data-view="1"]')
        assert f"row {index // columns + 1}, column {index % columns + 1} of the first view" in seen[index][0]
    assert len({text for text, _ in seen.values()}) == 3
    assert len({pixels for _, pixels in seen.values()}) == 3
    # what is said is what the stored plan says
    with np.load(sorted((run.path / "pairs").glob("*.npz"))[0]) as stored:
        plan, true = stored["plan"][index], int(true_cells(stored)[index])
    goal = int(plan.argmax())
    if plan.sum() > 0:
        assert f"Most goes to row {goal // columns + 1}, column {goal % columns + 1}" in seen[index][0]
    assert ("It truly lies" in seen[index][0]) == (true >= 0 and plan.sum() > 0)
    assert not shown.complaints


def python_plan(pair, mode, epsilon, reach):
    cost, a, b = (torch.from_numpy(pair[name]).double()[None] for name in ("cost", "a", "b"))
    if mode == "uniform":
        a, b = (torch.from_numpy(pair[f"valid_{side}"]).double().view(1, -1) for side in "st")
        a, b = a / a.sum(), b / b.sum()
    out = sinkhorn(cost, a, b, epsilon=epsilon, reach=reach or None, tolerance=1e-9, max_iterations=100_000)
    return out.plan[0].numpy()


@pytest.mark.parametrize("mode", ["learned", "uniform"])
@pytest.mark.parametrize("place", [None, 0.35, 1.0])
@pytest.mark.parametrize("reach", [0.0, 0.3])
def test_the_plan_of_the_page_is_that_of_python(browser, run, tmp_path, mode, place, reach, monkeypatch):
    part = {**explorer_data(run), "reach": reach}
    monkeypatch.setattr(reporting, "explorer_data", lambda _: part)
    watched = Watched(browser, write_explorer_page(run, tmp_path / "explorer.html"))
    watched.page.check(f'#transport-explorer input[value="{mode}"]')
    if place is not None:
        watched.page.evaluate(
            """place => { const slider = document.querySelector('[data-control=epsilon]');
            slider.value = place; slider.dispatchEvent(new Event('input')); }""",
            place,
        )
        watched.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    epsilon = watched.explorer("e.state.epsilon")
    low, high = part["epsilons"]
    assert epsilon == pytest.approx(part["epsilon"] if place is None else low * (high / low) ** place)
    assert watched.explorer("e.state.mode") == mode
    got = np.array(watched.explorer("e.plan()"))
    with np.load(sorted((run.path / "pairs").glob("*.npz"))[0]) as stored:
        expected = python_plan(dict(stored), mode, epsilon, reach)
    count = len(expected)
    assert got.reshape(expected.shape) * count == pytest.approx(expected * count, abs=1e-4)
    assert "iterations" in watched.page.inner_text("[data-out=state]")
    assert "not converged" not in watched.page.inner_text("[data-out=state]")
    watched.clean()
    watched.page.close()


def test_the_stored_plan_is_the_one_computed_at_its_own_settings(browser, run, tmp_path):
    watched = Watched(browser, write_explorer_page(run, tmp_path / "explorer.html"))
    stored = np.array(watched.explorer("e.plan()"))
    watched.page.check('#transport-explorer input[value="learned"]')
    computed = np.array(watched.explorer("e.plan()"))
    assert computed * 36 == pytest.approx(stored * 36, abs=2e-3)  # training stops at its own, looser tolerance
    watched.page.close()


def test_keys_alone_are_enough(browser, run, tmp_path):
    watched = Watched(browser, write_explorer_page(run, tmp_path / "explorer.html"))
    page = watched.page
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "() => { const e = document.activeElement; return e.dataset.control || e.dataset.view || e.value || ''; }"
        ))  # fmt: skip
    assert {"pair", "layer", "stored", "epsilon", "0", "1"} <= set(reached)
    page.focus('canvas[data-view="0"]')
    start = watched.explorer("e.state.index")
    page.keyboard.press("ArrowRight")
    assert watched.explorer("e.state.index") == start + 1
    page.keyboard.press("ArrowUp")
    assert watched.explorer("e.state.index") == start + 1 - 6
    for _ in range(9):  # the border is an end
        page.keyboard.press("ArrowLeft")
    assert watched.explorer("e.state.index") % 6 == 0
    assert "column 1 of the first view" in watched.said()
    page.focus('canvas[data-view="1"]')
    page.keyboard.press("ArrowDown")
    assert "of the second view" in watched.said()
    watched.clean()
    page.close()


def test_another_pair_and_layer(browser, run, tmp_path):
    watched = Watched(browser, write_explorer_page(run, tmp_path / "explorer.html"))
    before = watched.pixels('canvas[data-view="1"]')
    names = [pair["name"] for pair in explorer_data(run)["pairs"]]
    assert watched.page.locator("[data-control=pair] option").all_inner_texts() == [
        f"{k}: {name}" for k, name in enumerate(names, start=1)
    ]
    seen = set()
    for option in watched.page.locator("[data-control=layer] option").all():
        watched.page.select_option("[data-control=layer]", option.get_attribute("value"))
        seen.add(watched.pixels('canvas[data-view="1"]'))
    assert len(seen) == watched.page.locator("[data-control=layer] option").count() >= 4  # heads among them
    watched.page.select_option("[data-control=pair]", "1")
    assert watched.explorer("e.state.pair") == 1
    assert watched.pixels('canvas[data-view="1"]') != before
    watched.clean()
    watched.page.close()


def test_names_with_markup_are_text(browser, run, tmp_path, monkeypatch):
    part = explorer_data(run)
    part["pairs"][0]["name"] = part["method"] = MARKUP
    part["transports"] = False
    monkeypatch.setattr(reporting, "explorer_data", lambda _: part)
    path = tmp_path / "page.html"
    watched = Watched(browser, write_explorer_page(replace_name(run), path))
    assert watched.page.title() == f"Transport explorer: {MARKUP}"
    assert watched.page.locator("[data-control=pair] option").first.inner_text() == f"1: {MARKUP}"
    assert "onerror" in watched.page.inner_text("main")
    watched.clean()
    watched.page.close()


def replace_name(run):
    class Named:
        path, name, read_config = run.path, MARKUP, run.read_config

    return Named()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, run, tmp_path, scheme):
    path = write_report([run], tmp_path / "report.html")
    watched = Watched(browser, path, viewport={"width": 390, "height": 800}, has_touch=True, color_scheme=scheme)
    page = watched.page
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    canvas = page.locator('#transport-explorer canvas[data-view="0"]')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.touchscreen.tap(box["x"] + 3, box["y"] + 3)
    assert watched.explorer("[e.state.side, e.state.index]") == [0, 0]
    watched.clean()
    page.close()


def test_printing_shows_what_is_folded(browser, run, tmp_path):
    watched = Watched(browser, write_report([run], tmp_path / "report.html"))
    shown = "() => [...document.querySelectorAll('details')].map(d => d.lastElementChild.checkVisibility())"
    assert set(watched.page.evaluate(shown)) == {False}
    watched.page.emulate_media(media="print")
    assert set(watched.page.evaluate(shown)) == {True}
    assert (
        watched.page.evaluate("() => getComputedStyle(document.querySelector('.explorer .controls')).display") == "none"
    )
    watched.page.close()


def test_every_picture_has_words(shown):
    for selector in ("img", "canvas", "figure[role=img]"):
        for place in shown.page.locator(selector).all():
            assert (place.get_attribute("alt") or place.get_attribute("aria-label") or "").strip()
    assert shown.page.get_attribute("html", "lang") == "en"
    assert shown.page.locator("h1").count() >= 1


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground():
    """WCAG 2 AA: a contrast of at least 4.5 for every colour of text on every ground, light and dark."""
    style = resources.files("otcxr").joinpath("templates", "_style.html").read_text()
    for block in re.findall(r":root \{([^}]*)\}", style):
        colours = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
            for name, value in re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block)
        }
        for text in ("text", "soft", "good", "bad", "accent"):
            for ground in ("ground", "card"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_a_typical_page_is_small(shown, run, tmp_path):
    assert write_report([run], tmp_path / "report.html").stat().st_size < 15e6


def test_a_method_that_pairs_nothing_has_no_explorer(tmp_path, run):
    bare = tmp_path / "bare"
    shutil.copytree(run.path, bare)
    shutil.rmtree(bare / "pairs")
    assert write_explorer_page(Run.open(bare), tmp_path / "none.html") is None
    assert "transport-explorer" not in write_report([Run.open(bare)], tmp_path / "report.html").read_text()
    assert not (tmp_path / "none.html").exists()
