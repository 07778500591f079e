"""The gallery of a study: the right images are chosen, and the page filters them."""

import json
import re

import numpy as np
import pytest
import yaml

from otcxr.cli import main
from otcxr.errors import ConfigError, DataError
from otcxr.study import read_study
from otcxr.study.cells import unpack
from otcxr.study.gallery import GROUPS, choose, groups_of, make_gallery
from test_browser import Watched, browser  # noqa: F401

STUDY = {
    "name": "tiny", "text": "Names may hold <b>markup</b>.", "seeds": [0], "reference": "otcxr",
    "methods": ["otcxr", "simclr", {"method": "vicreg", "as": "vicreg-narrow", "settings": {"hidden": 16}}],
    "pretrain": {
        "data": {"source": "phantom:48,seed=7,size=64"}, "views": {"size": 64}, "encoder": {"width": 8, "stride": 16},
        "train": {"epochs": 1, "batch_size": 8, "accelerator": "cpu", "probes": 0, "online_images": 0},
    },
    "judge": {"source": "phantom:200,seed=6,size=64,prevalence=0.5", "tasks": ["localize-linear"],
              "settings": {"fractions": [1.0], "resamples": 60}},
}  # fmt: skip


def test_groups_by_hand():
    """Four images, one finding: all miss; the reference alone; one rival alone; two rivals."""
    hits = {name: np.array(row, bool)[:, None] for name, row in {
        "ours": [0, 1, 0, 0, 1], "a": [0, 0, 1, 1, 1], "b": [0, 0, 0, 1, 0],
    }.items()}  # fmt: skip
    found = groups_of(hits, "ours")
    assert {group: np.flatnonzero(rows).tolist() for group, rows in found.items()} == {
        "all miss": [0], "only the reference": [1], "only a rival": [2]
    }  # fmt: skip
    assert set(found) == set(GROUPS)


def test_the_choice_depends_on_names_alone():
    rng = np.random.default_rng(0)
    hits = {name: rng.random((40, 2)) < 0.2 for name in ("ours", "a", "b")}
    shown = rng.random((40, 2)) < 0.7
    names = [f"image {k}" for k in range(40)]
    chosen = choose(hits, shown, "ours", names, 3)
    places = groups_of(hits, "ours")
    for group in GROUPS:
        for finding in (0, 1):
            rows = [one.row for one in chosen if (one.group, one.finding) == (group, finding)]
            possible = np.flatnonzero(shown[:, finding] & places[group][:, finding])
            assert len(rows) == min(3, len(possible))
            assert set(rows) <= set(possible.tolist())
    # another order of the images chooses the same ones
    turn = rng.permutation(40)
    other = choose({k: v[turn] for k, v in hits.items()}, shown[turn], "ours", [names[k] for k in turn], 3)
    assert [(names[one.row], one.finding, one.group) for one in chosen] == [
        (names[turn[one.row]], one.finding, one.group) for one in other
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "s.yaml").write_text(yaml.safe_dump(STUDY))
    words = [str(folder / "s.yaml"), "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    assert main(["study", *words, "--workers", "1"]) == 0
    assert main(["gallery", *words, "--each", "1"]) == 0
    return folder


def test_the_gallery_says_what_the_cells_say(made):
    found = json.loads((made / "out" / "gallery.json").read_text())
    assert found["methods"] == ["otcxr", "simclr", "vicreg-narrow", "random"]
    assert found["trained"] == found["methods"][:3]
    cells = {name: json.loads((made / "out" / "cells" / f"{name}-s0.localize-linear.json").read_text())
             for name in found["methods"]}  # fmt: skip
    findings = cells["otcxr"]["findings"]
    shown = unpack(cells["otcxr"]["regions"]["test"]) == 1
    assert found["pairs"] == shown.sum()
    hits = {name: unpack(cell["shares"]["1"]["tests"]["test"]["pointing"]) > 0.5 for name, cell in cells.items()}
    overlap = {name: unpack(cell["shares"]["1"]["tests"]["test"]["iou@0.25"]) for name, cell in cells.items()}
    study = read_study(made / "s.yaml")
    from otcxr.data import open_collection

    names = [record.name for record in open_collection(study.source).split("test").records]
    assert found["entries"]
    for entry in found["entries"]:
        row, f = names.index(entry["image"]), findings.index(entry["finding"])
        assert shown[row, f]
        for name, one in entry["methods"].items():  # maps that were drawn again are those of the cells
            assert one["hit"] == hits[name][row, f]
            assert (one["iou"] >= 0.25) == (overlap[name][row, f] == 1)
            assert one["picture"].startswith("data:image/jpeg;base64,")
        right = [name for name in found["trained"] if entry["methods"][name]["hit"]]
        assert {"all miss": right == [], "only the reference": right == ["otcxr"],
                "only a rival": len(right) == 1 and right != ["otcxr"]}[entry["group"]]  # fmt: skip


def test_the_page_filters(made, browser):  # noqa: F811
    page = made / "out" / "report.html"
    watched = Watched(browser, page, viewport={"width": 1200, "height": 800})
    shown = "() => [...document.querySelectorAll('.gallery article')].filter(a => !a.hidden).length"
    total = watched.page.evaluate(shown)
    assert total == len(json.loads((made / "out" / "gallery.json").read_text())["entries"])
    finding = watched.page.locator(".filters select[name=finding] option").nth(1).get_attribute("value")
    watched.page.select_option(".filters select[name=finding]", finding)
    some = watched.page.evaluate(shown)
    assert 0 < some < total
    assert watched.page.inner_text(".filters output") == f"{some} of {total} shown"
    heads = watched.page.locator(".gallery article:not([hidden]) h3").all_inner_texts()
    assert all(head.startswith(finding) for head in heads)
    watched.page.select_option(".filters select[name=finding]", "")
    assert watched.page.evaluate(shown) == total
    images = watched.page.locator(".gallery img")
    assert all(images.nth(k).get_attribute("alt") for k in range(images.count()))
    watched.clean()
    assert "<b>markup</b>" in watched.page.inner_text("main")
    watched.page.set_viewport_size({"width": 390, "height": 800})
    assert watched.page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    watched.page.close()


def test_without_trainings_or_task_the_fix_is_named(made, tmp_path):
    study = read_study(made / "s.yaml")
    with pytest.raises(DataError, match="is not in .* any more"):
        make_gallery(study, made / "out", tmp_path / "none", _Quiet())
    with pytest.raises(DataError, match="run the study first"):
        make_gallery(study, tmp_path / "empty", made / "runs", _Quiet())
    with pytest.raises(ConfigError, match="no seed 7; it has 0"):
        make_gallery(study, made / "out", made / "runs", _Quiet(), seed=7)
    (tmp_path / "t.yaml").write_text(re.sub("localize-linear", "linear", (made / "s.yaml").read_text()))
    with pytest.raises(DataError, match="add the task localize-linear"):
        make_gallery(read_study(tmp_path / "t.yaml"), made / "out", made / "runs", _Quiet())


def _Quiet():
    from otcxr.console import SilentProgress

    return SilentProgress()
