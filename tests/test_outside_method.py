"""Methods from outside: found by package.module:NAME, trained, continued and reported like the ones of the table."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oracles import variance_by_loops
from otcxr.cli import main
from otcxr.data.dataset import DataConfig
from otcxr.data.geometry import ViewBatch
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError
from otcxr.methods import METHODS, Method, SSLMethod, find_method
from otcxr.nn.encoder import build_encoder, load_encoder
from otcxr.runs import Run
from otcxr.settings import PretrainConfig, config_from_plain, config_to_plain
from otcxr.train import pretrain

ROOT = Path(__file__).parent.parent
SMALL = [
    "--views.size", "32", "--encoder.width", "4", "--train.batch_size", "8", "--train.epochs", "1",
    "--train.accelerator", "cpu", "--train.probes", "0", "--train.online_images", "0",
]  # fmt: skip
SOURCE = "phantom:32,seed=1,size=32"  # 16 of them to train on: 2 steps of 8

MINE = '''
"""A method that pulls pooled features of two views together and pushes their mean away from zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from my_pkg.parts import squared
from otcxr.methods import Method, SSLMethod, StepOutput
from otcxr.methods.base import encode_views
from otcxr.nn.encoder import pool


@dataclass(frozen=True)
class MineSettings:
    """Settings of Mine.

    Attributes:
        margin: How far from zero, in squares.
        slope: Of the penalty.
    """

    margin: int = 2
    slope: float = 0.5


class Mine(SSLMethod):
    seen = []  # (views, margin) of every step, in this process

    def __init__(self, encoder, settings: MineSettings):
        super().__init__(encoder, settings)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, batch, *, observe=False):
        first, second = (pool(maps) for maps in encode_views(self.encoder, batch.views)[:2])
        loss = squared(first - second) + self.settings.slope * (self.settings.margin - squared(first)).clamp_min(0)
        Mine.seen.append((len(batch.views), self.settings.margin))
        return StepOutput(loss, {"loss_twice": 2 * loss.detach()}, None)

    def after_step(self, progress):
        self.steps.add_(1)


CROWD = Method(Mine, MineSettings(margin=5), {"local_count": 3, "local_size": 16})
'''
OTHERS = """
from otcxr.methods import SSLMethod
from my_pkg.mine import Mine, MineSettings
from dataclasses import dataclass

@dataclass(frozen=True)
class Hungry:
    needed: int

class NoSettings(SSLMethod):
    def forward(self, batch, *, observe=False): ...

class WrongSettings(SSLMethod):
    def __init__(self, encoder, settings: dict): ...
    def forward(self, batch, *, observe=False): ...

class Unannotated(SSLMethod):
    def __init__(self, encoder, settings): ...
    def forward(self, batch, *, observe=False): ...

class NoDefault(SSLMethod):
    def __init__(self, encoder, settings: Hungry): ...
    def forward(self, batch, *, observe=False): ...

class NoMethod:
    pass

number = 3
"""


@pytest.fixture
def import_apart(monkeypatch):
    """What a test imports from a working directory is forgotten when it ends."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_pkg", "my_method"):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path, monkeypatch, import_apart):
    """A working directory that holds a package with a method, and runs."""
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("def squared(x):\n    return x.square().mean()\n")
    (package / "mine.py").write_text(MINE)
    (package / "others.py").write_text(OTHERS)
    (package / "lacking.py").write_text("import module_that_nobody_has\n")
    (package / "lacking_inside.py").write_text("import my_pkg.nowhere.deep\n")
    (package / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def examples(monkeypatch, import_apart):
    monkeypatch.chdir(ROOT / "examples")
    return ROOT / "examples"


def run_line(words, capsys):
    """Exit code and the lines on standard error."""
    code = main(words)
    return code, capsys.readouterr().err.strip().splitlines()


def saved(run):
    return yaml.safe_load((Path(run) / "config.yaml").read_text())


def printed(words, capsys):
    """The settings that a command would start with."""
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--data.source", SOURCE, *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# --- how it is found -------------------------------------------------------------------------------------------------


def test_a_class_is_found_with_the_defaults_of_its_settings(here):
    row = find_method("my_pkg.mine:Mine")
    assert isinstance(row, Method)
    assert issubclass(row.build, SSLMethod)
    assert (row.build.__name__, row.settings.margin, row.settings.slope) == ("Mine", 2, 0.5)
    assert dict(row.views) == {}


def test_a_row_is_found_as_it_is(here):
    row = find_method("my_pkg.mine:CROWD")
    assert row.build is find_method("my_pkg.mine:Mine").build
    assert row.settings.margin == 5
    assert dict(row.views) == {"local_count": 3, "local_size": 16}


def test_the_working_directory_comes_last_and_once(here):
    (here / "yaml.py").write_text("raise SystemExit('the wrong yaml')\n")
    for _ in range(3):
        find_method("my_pkg.mine:Mine")
    assert sys.path[-1] == str(here)
    assert sys.path.count(str(here)) == 1


def test_a_method_of_the_package_may_be_named_in_full():
    row = find_method("otcxr.methods.simclr:SimCLR")
    assert row.build is METHODS["simclr"].build
    assert row.settings == METHODS["simclr"].settings


NOT_FOUND = {
    "no_such_pkg.mine:Mine": "method 'no_such_pkg.mine:Mine': there is no module 'no_such_pkg'; install it, or start "
                             "from the folder that holds it",
    "my_pkg.nowhere:Mine": "method 'my_pkg.nowhere:Mine': there is no module 'my_pkg.nowhere'; install it, or start "
                           "from the folder that holds it",
    "my_pkg.mine:Mina": "method 'my_pkg.mine:Mina': my_pkg.mine has no Method or subclass of SSLMethod named 'Mina'",
    "my_pkg.mine:": "method 'my_pkg.mine:': my_pkg.mine has no Method or subclass of SSLMethod named ''",
    "my_pkg.others:NoMethod": "method 'my_pkg.others:NoMethod': my_pkg.others has no Method or subclass of SSLMethod "
                              "named 'NoMethod'",
    "my_pkg.others:number": "method 'my_pkg.others:number': my_pkg.others has no Method or subclass of SSLMethod "
                            "named 'number'",
    "my_pkg.others:Unannotated": "method 'my_pkg.others:Unannotated': annotate 'settings' of Unannotated.__init__ with "
                                 "its settings dataclass",
    "my_pkg.others:NoSettings": "method 'my_pkg.others:NoSettings': annotate 'settings' of NoSettings.__init__ with "
                                "its settings dataclass",
    "my_pkg.others:WrongSettings": "method 'my_pkg.others:WrongSettings': annotate 'settings' of "
                                   "WrongSettings.__init__ with its settings dataclass",
    "my_pkg.others:NoDefault": "method 'my_pkg.others:NoDefault': every field of Hungry needs a default (",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_method_is_said_in_one_line(name, here, capsys):
    with pytest.raises(ConfigError) as found:
        find_method(name)
    assert str(found.value).startswith(NOT_FOUND[name])
    assert "needed" in str(found.value) or not NOT_FOUND[name].endswith("(")  # which field it is
    code, lines = run_line(["pretrain", "--data.source", SOURCE, "--method", name], capsys)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"otcxr: {NOT_FOUND[name]}")


@pytest.mark.parametrize("name", [":Mine", ".mine:Mine", ":", "my_pkg/mine.py:Mine", "my_pkg..mine:Mine"])
def test_a_name_that_no_module_can_have_is_said_in_one_line(name, here, capsys):
    code, lines = run_line(["pretrain", "--data.source", SOURCE, "--method", name], capsys)
    assert code == 1
    assert lines == [f"otcxr: method '{name}': give a method from outside as package.module:Class"]


def test_a_module_that_lacks_another_one_says_which(here):
    """Not that the method is missing: its file is there."""
    for name, lacking in (("lacking", "module_that_nobody_has"), ("lacking_inside", "my_pkg.nowhere")):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{lacking}'"):
            find_method(f"my_pkg.{name}:Mine")
    with pytest.raises(ZeroDivisionError):
        find_method("my_pkg.broken:Mine")


@pytest.mark.parametrize(
    ("given", "near"), [("simclar", "simclr"), ("otcxr-uniforn", "otcxr-uniform"), ("pcrl", "pcrlv2")]
)
def test_an_unknown_name_names_the_nearest_and_the_way_in(given, near, capsys):
    text = f"unknown method '{given}'; did you mean '{near}'?; a method from outside is given as package.module:Class"
    with pytest.raises(ConfigError) as found:
        find_method(given)
    assert str(found.value) == text
    assert run_line(["pretrain", "--data.source", SOURCE, "--method", given], capsys) == (1, [f"otcxr: {text}"])


def test_a_name_like_no_other_names_all_of_them():
    with pytest.raises(ConfigError, match="unknown method 'zzzz'; known: ") as found:
        find_method("zzzz")
    assert all(name in str(found.value) for name in METHODS)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_of_a_method_from_outside_go_to_plain_values_and_back(here):
    config = PretrainConfig(DataConfig(source=SOURCE), method="my_pkg.mine:Mine", views=ViewsConfig(size=32))
    assert config.out == "runs/my_pkg.mine.Mine"
    assert config.settings.margin == 2
    plain = config_to_plain(config)
    assert plain["method"] == {"name": "my_pkg.mine:Mine", "margin": 2, "slope": 0.5}
    assert config_from_plain(plain) == config
    with pytest.raises(ConfigError, match="unknown setting margim; did you mean 'margin'?"):
        config_from_plain({**plain, "method": {"name": "my_pkg.mine:Mine", "margim": 1}})
    with pytest.raises(
        ConfigError, match="method 'my_pkg.mine:Mine' needs settings of type MineSettings, received Sim"
    ):
        PretrainConfig(config.data, method="my_pkg.mine:Mine", settings=METHODS["simclr"].settings)


def test_settings_of_a_row_are_its_own(here):
    plain = {"data": {"source": SOURCE}, "method": {"name": "my_pkg.mine:CROWD", "slope": 1.0}}
    config = config_from_plain(plain)
    assert (config.settings.margin, config.settings.slope) == (5, 1.0)
    assert (config.views.local_count, config.views.local_size) == (3, 16)
    assert config_from_plain({**plain, "views": {"local_count": 1}}).views.local_count == 1


def test_help_shows_the_options_of_a_method_from_outside(here, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--method", "my_pkg.mine:CROWD", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--method.margin MARGIN How far from zero, in squares. (type: int, default: 5)" in text
    assert "--method.epsilon" not in text


def test_an_unknown_option_names_the_nearest(here, capsys):
    words = ["pretrain", "--data.source", SOURCE, "--method", "my_pkg.mine:Mine", "--method.margim", "3"]
    assert run_line(words, capsys) == (1, ["otcxr: unknown setting method.margim; did you mean 'margin'?"])


@pytest.mark.parametrize(
    ("method", "count"), [("dino", 6), ("pcrlv2", 6), ("my_pkg.mine:CROWD", 3), ("otcxr", 0), ("vicregl", 0)]
)
def test_local_views_are_the_methods_own_unless_said(method, count, here, capsys):
    assert printed(["--method", method], capsys)["views"]["local_count"] == count
    for chosen in (0, 2):
        views = printed(["--method", method, "--views.local_count", str(chosen)], capsys)["views"]
        assert views["local_count"] == chosen
    (here / "some.yaml").write_text(f"method:\n  name: {method}\nviews:\n  size: 48\n")
    views = printed(["--config", "some.yaml"], capsys)["views"]
    assert (views["local_count"], views["size"]) == (count, 48)
    (here / "some.yaml").write_text(f"method:\n  name: {method}\nviews:\n  local_count: 4\n")
    assert printed(["--config", "some.yaml"], capsys)["views"]["local_count"] == 4
    assert printed(["--config", "some.yaml", "--views.local_count", "0"], capsys)["views"]["local_count"] == 0
    plain = {"data": {"source": SOURCE}, "method": {"name": method}}
    assert config_from_plain(plain).views.local_count == count


def test_other_views_that_a_method_changes():
    assert config_from_plain({"data": {"source": SOURCE}, "method": {"name": "pcrlv2"}}).views.cutout == 0.5
    assert config_from_plain({"data": {"source": SOURCE}, "method": {"name": "dino"}}).views.cutout == 0.0


# --- a training ------------------------------------------------------------------------------------------------------


def outcome(run):
    return {name: value.tolist() for name, value in load_encoder(run).state_dict().items()}


def test_a_method_from_outside_trains_goes_on_and_is_reported(here, capsys):
    words = ["pretrain", "--data.source", SOURCE, "--method", "my_pkg.mine:Mine", "--method.margin", "3", *SMALL]
    assert main([*words, "--out", "whole"]) == 0
    mine = find_method("my_pkg.mine:Mine").build
    assert mine.seen == [(2, 3)] * 2
    plain = saved("whole")
    assert plain["method"] == {"name": "my_pkg.mine:Mine", "margin": 3, "slope": 0.5}
    lines = Run.open("whole").read_metrics()
    assert lines[-1]["loss_twice"] == pytest.approx(2 * lines[-1]["loss"])
    assert int(Run.open("whole").read_checkpoint()["method"]["steps"]) == 2
    untrained = build_encoder("resnet18", width=4, stride=16, padding="replicate", seed=0).state_dict()
    assert any(value != untrained[name].tolist() for name, value in outcome("whole").items())

    # the same in two pieces, the second one with nothing said but the folder
    mine.seen.clear()
    pretrain(config_from_plain({**plain, "out": "pieces"}), stop_after=1)
    assert main(["pretrain", "--resume", "true", "--out", "pieces"]) == 0
    assert mine.seen == [(2, 3)] * 2
    assert outcome("pieces") == outcome("whole")
    assert saved("pieces")["method"] == plain["method"]

    assert main(["pretrain", "--resume", "true", "--out", "pieces"]) == 0  # finished already
    assert mine.seen == [(2, 3)] * 2
    code, errors = run_line(["pretrain", "--resume", "true", "--out", "pieces", "--method.margin", "4"], capsys)
    assert code == 1
    assert "method.margin = 3" in errors[0]

    assert main(["report", "whole", "pieces"]) == 0
    page = (here / "whole" / "report.html").read_text()
    assert "my_pkg.mine:Mine" in page
    assert "method.margin" in page


def test_a_run_goes_on_with_the_views_it_was_started_with(here):
    """Neither the method's nor the package's defaults come back."""
    words = ["--data.source", SOURCE, "--method", "my_pkg.mine:CROWD", "--views.local_count", "1", *SMALL]
    assert main(["pretrain", *words, "--out", "whole"]) == 0
    mine = find_method("my_pkg.mine:CROWD").build
    assert mine.seen == [(3, 5)] * 2
    mine.seen.clear()
    pretrain(config_from_plain({**saved("whole"), "out": "run"}), stop_after=1)
    before = saved("run")
    assert main(["pretrain", "--resume", "true", "--out", "run"]) == 0
    assert mine.seen == [(3, 5)] * 2
    assert saved("run")["views"] == before["views"]
    assert outcome("run") == outcome("whole")


@pytest.mark.parametrize("method", ["dino", "pcrlv2"])
def test_a_run_with_local_views_switched_off_goes_on_without(method, here, capsys):
    words = ["--data.source", SOURCE, "--method", method, "--views.local_count", "0", *SMALL]
    plain = printed([*words, "--out", "run"], capsys)
    pretrain(config_from_plain(plain), stop_after=1)
    assert saved("run")["views"]["local_count"] == 0
    assert saved("run")["views"]["clean"] == (method == "pcrlv2")
    assert main(["pretrain", "--resume", "true", "--out", "run"]) == 0
    assert saved("run")["views"]["local_count"] == 0
    assert Run.open("run").read_metrics()[-1]["step"] == 2
    code, lines = run_line(["pretrain", "--resume", "true", "--out", "run", "--views.local_count", "6"], capsys)
    assert code == 1
    assert "views.local_count = 0" in lines[0]


# --- the example and its page ----------------------------------------------------------------------------------------


def two_views(seed=0):
    pixels = torch.rand(2, 6, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    geometry = torch.eye(3)[:2].expand(2, 6, 2, 3)
    return ViewBatch(tuple(pixels), geometry, tuple(torch.ones_like(p, dtype=torch.bool) for p in pixels))


def test_the_example_computes_what_it_says(examples):
    row = find_method("my_method:Spread")
    encoder = build_encoder("resnet18", width=4, stride=16, seed=0).eval()
    method = row.build(encoder, type(row.settings)(outputs=5, weight=3.0)).eval()
    batch = two_views()
    out = method(batch, observe=True)
    with torch.no_grad():
        first, second = (method.head(encoder(v)[-1].mean((-2, -1))).double().numpy() for v in batch.views)
    apart = sum((x - y) ** 2 for x, y in zip(first.ravel(), second.ravel(), strict=True)) / first.size
    narrow = (variance_by_loops(first) + variance_by_loops(second)) / 2
    assert narrow > 0.1
    assert out.loss.item() == pytest.approx(apart + 3 * narrow, rel=1e-4)
    assert out.observed.pooled.shape == (12, 32)
    out.loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in method.train().parameters())


def test_the_example_is_short():
    assert len((ROOT / "examples" / "my_method.py").read_text().splitlines()) < 60
    assert len((ROOT / "docs" / "methods" / "own.md").read_text().splitlines()) <= 40


def test_the_commands_of_the_page_work_from_the_folder_of_examples(examples, tmp_path):
    """As they stand, but for a smaller source and network, and another folder for the run."""
    page = (ROOT / "docs" / "methods" / "own.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.strip().splitlines()]
    assert [words[:2] for words in commands] == [["otcxr", "pretrain"], ["otcxr", "report"]]
    run = commands[0][commands[0].index("--out") + 1]
    for words in commands:
        assert run in words
        smaller = [str(tmp_path / "run") if word == run else word for word in words[1:]]
        if words[1] == "pretrain":
            assert any(word.startswith("phantom:256") for word in smaller)
            smaller = [SOURCE if word.startswith("phantom:256") else word for word in smaller] + SMALL
        assert main(smaller) == 0
    assert saved(tmp_path / "run")["method"] == {"name": "my_method:Spread", "outputs": 256, "weight": 2.0}
    assert (tmp_path / "run" / "report.html").is_file()
    health = [line["health"] for line in Run.open(tmp_path / "run").read_metrics() if "health" in line]
    assert health
    assert health[0]["effective_rank"] > 1
    json.dumps(health)


def test_the_other_row_of_the_example_has_its_own_defaults(examples, capsys):
    plain = printed(["--method", "my_method:GENTLE"], capsys)
    assert plain["method"]["weight"] == 0.1
    assert plain["views"]["rotation"] == 5.0
    assert printed(["--method", "my_method:Spread"], capsys)["method"]["weight"] == 1.0


def test_what_the_page_names_exists():
    from otcxr.methods import base

    page = (ROOT / "docs" / "methods" / "own.md").read_text()
    for name in ("SSLMethod", "StepOutput", "Method"):
        assert name in page
        assert hasattr(base, name)
    for name in re.findall(r"`batch\.(\w+)`", page):
        assert name in ViewBatch._fields
    assert set(re.findall(r"`batch\.(\w+)`", page)) == set(ViewBatch._fields)
    assert {"needs_clean", "after_step"} <= set(dir(SSLMethod))
    assert "`needs_clean = True`" in page
    assert "`after_step(progress)`" in page


@pytest.mark.parametrize(("name", "count"), [("dino", 6), ("pcrlv2", 6), ("simclr", 0)])
def test_settings_made_in_python_have_the_views_of_the_methods_row_too(name, count):
    views = PretrainConfig(DataConfig(SOURCE), name).views
    assert views.local_count == count
    assert views.clean == (name == "pcrlv2")
    assert PretrainConfig(DataConfig(SOURCE), name, views=ViewsConfig(size=32)).views.local_count == 0
