"""The house: who may import whom, what stays light, and a few habits. Read from the sources with ``ast``."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import otcxr

ROOT = Path(otcxr.__file__).parent
HEAVY = ("torch", "lightning_fabric", "captum", "pydicom", "matplotlib", "cv2", "sklearn", "scipy", "numpy")

# Module -> what of otcxr it may import; "data" stands for the whole package. A new module is added here deliberately:
# the table is section 3 of the architecture, and everything else is an argument to have first.
STUDY = "study train settings matching faults evaluation attribution overlay nn data runs files charts report config "
STUDY += "console errors"
EVALUATION = "evaluation nn data optim runs files attribution config console errors"
LOOP = "methods nn data distributed faults health launch loggers online optim probes runs settings console errors"
PACKING = "packing data files report console errors version"
METHODS = "methods losses nn ot distributed data.geometry errors"
MAY_IMPORT = {
    # leaves: none imports another of them
    "version": "",
    "errors": "",
    "files": "errors",
    "memory": "",
    "console": "",
    "optim": "",
    "config": "errors",
    "ot": "ot",
    "ot.costs": "ot",
    "ot.divergence": "ot",
    "ot.gpu": "ot",
    "ot.kernels": "ot",
    "ot.native": "ot",
    "ot.portable": "ot",
    "ot.problem": "ot",
    "ot.ragged": "ot",
    "ot.simd": "ot",
    "ot.sinkhorn": "ot",
    "ot.transport": "ot",
    "nn": "",
    "nn.momentum": "nn",
    "nn.queue": "nn",
    "nn.unet": "nn errors",
    "nn.attention": "nn errors",
    "nn.encoder": "nn errors",
    "nn.heads": "nn errors",
    "nn.imported": "nn errors",
    "nn.resnet": "nn errors",
    "data": "data",
    "data.chexpert": "data errors",
    "data.dataset": "data errors files",
    "data.decode": "data errors",
    "data.dicom": "data errors",
    "data.folder": "data errors",
    "data.geometry": "",
    "data.identity": "data errors files",
    "data.images": "data errors",
    "data.masks": "data errors",
    "data.montgomery": "data errors",
    "data.nih": "data errors",
    "data.pack": "data errors",
    "data.phantom": "data errors",
    "data.phantom_anatomy": "data errors",
    "data.phantom_devices": "data errors",
    "data.phantom_findings": "data errors",
    "data.phantom_geometry": "data errors",
    "data.phantom_render": "data errors",
    "data.phantom_tubes": "data errors",
    "data.png": "errors",
    "data.records": "data errors",
    "data.rsna": "data errors",
    "data.siim": "data errors",
    "data.sources": "data errors",
    "data.tables": "data errors",
    "data.view_spec": "data errors",
    "data.views": "data errors",
    "data.vindr": "data errors",
    "data.views_device": "data",
    "data.views_host": "data",
    "estimate": "launch loop packing data settings optim console errors",
    # packs: written here, read by data.pack
    "packing": PACKING,
    "packing.burned": PACKING,
    "packing.collection": PACKING,
    "packing.frontal": PACKING,
    "packing.index": PACKING,
    "packing.page": PACKING,
    "packing.reduce": PACKING,
    "packing.store": PACKING,
    "packing.workers": PACKING,
    "distributed": "errors",
    "losses": "distributed",
    "attribution": "nn errors",
    # the folder of a run: the one channel between training, evaluation and report
    "runs": "errors version nn.encoder files",
    # training
    "methods": "methods config errors",
    "methods.base": METHODS,
    "methods.contrastive_ot": METHODS,
    "methods.otcxr": METHODS,
    "methods.barlow": METHODS,
    "methods.byol": METHODS,
    "methods.densecl": METHODS,
    "methods.dino": METHODS,
    "methods.moco": METHODS,
    "methods.pcrlv2": METHODS,
    "methods.simsiam": METHODS,
    "methods.vicregl": METHODS,
    "methods.simclr": METHODS,
    "methods.vicreg": METHODS,
    "health": "methods.base data.geometry ot",
    "probes": "methods.base data runs files errors",
    "settings": "methods data optim config errors",
    "faults": "errors memory",
    "launch": "distributed settings errors",
    "loggers": "config console errors",
    "loop": LOOP,
    "online": "evaluation nn data errors",
    "train": "loop nn ot data distributed faults launch online probes runs files settings config console errors",
    # judging a method, not an encoder: what it pairs
    "matching": "evaluation health loop methods.base nn data runs files settings console errors",
    "reproduce": "train settings runs files distributed config console errors",
    # judging: sees encoders, records and files, never a method
    "evaluation": EVALUATION,
    "evaluation.calibration": EVALUATION,
    "evaluation.classifier": EVALUATION,
    "evaluation.classify": EVALUATION,
    "evaluation.decisions": EVALUATION,
    "evaluation.delong": EVALUATION,
    "evaluation.features": EVALUATION,
    "evaluation.finetune": EVALUATION,
    "evaluation.labelled": EVALUATION,
    "evaluation.localize": EVALUATION,
    "evaluation.metrics": EVALUATION,
    "evaluation.overlap": EVALUATION,
    "evaluation.predictions": EVALUATION,
    "evaluation.protocols": EVALUATION,
    "evaluation.ratios": EVALUATION,
    "evaluation.regions": EVALUATION,
    "evaluation.resampling": EVALUATION,
    "evaluation.results": EVALUATION,
    "evaluation.estimates": EVALUATION,
    "evaluation.segment": EVALUATION,
    "evaluation.statistics": EVALUATION,
    "evaluation.subgroups": EVALUATION,
    "evaluation.tables": EVALUATION,
    "evaluation.tasks": EVALUATION,
    "evaluation.truth": EVALUATION,
    "explorer": "data.geometry runs files",
    "overlay": "",
    "dicom_out": "runs files errors version",
    "heatmaps": "nn data runs files attribution evaluation.overlap overlay dicom_out console errors",
    "explain": "explorer heatmaps data runs files config console errors",
    "preview": "data runs files console errors",
    "cards": "runs files errors version",
    "charts": "",
    # pages from files, never from models
    "report": "report",
    "report.words": "",
    "report.pages": "report version",
    "report.rows": "report",
    "report.evaluation": "report charts runs files config",
    "report.run": "report charts explorer runs files config errors version",
    "report.study": "report charts runs files config",
    # the front
    "": "version",
    "__main__": "cli",
    "cli": "commands errors memory version",
    "study": STUDY,
    "study.spec": STUDY,
    "study.cells": STUDY,
    "study.markdown": STUDY,
    "study.gallery": STUDY,
    "study.results": STUDY,
    "study.tasks": STUDY,
    "commands": "commands",
    "commands.terminal": "commands evaluation methods data settings report config console errors",
    "commands.judging": "commands attribution evaluation matching data report runs files config console errors",
    "commands.showing": "commands explain heatmaps report cards runs files config console errors",
    "commands.sources": "commands methods preview estimate settings packing data runs files config console errors",
    "commands.studies": "commands study config console errors",
    "commands.training": "commands train reproduce distributed methods demo data runs files config console errors",
    "demo": "train evaluation explain report data runs files config console errors",
}
NEVER_A_METHOD = (
    "evaluation",
    "explain",
    "heatmaps",
    "explorer",
    "attribution",
    "preview",
    "report",
    "nn",
    "ot",
    "data",
    "runs",
)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree(module):
    return ast.parse(MODULES[module].read_text())


def below(module, package):
    return module == package or module.startswith(f"{package}.")


def imported_names(nodes):
    """(module of otcxr, name or None) of every import among the nodes, ``importlib`` with a literal included."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from ((a.value, None) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def imports(module, nodes=None):
    """Modules of otcxr that a module names in an import, also inside functions and for types only."""
    out = set()
    for origin, name in imported_names(ast.walk(tree(module)) if nodes is None else nodes):
        if below(origin, "otcxr"):
            whole = f"{origin}.{name}".removeprefix("otcxr").lstrip(".")
            out.add(whole if name and whole in MODULES else origin.removeprefix("otcxr").lstrip("."))
    return out - {module}


@cache
def reached(module):
    """Everything that a module imports directly, through others, or as the package around one of them."""
    out, waiting = set(), {module}
    while waiting:
        current = waiting.pop()
        out.add(current)
        packages = {current.rsplit(".", k)[0] for k in range(1, current.count(".") + 1)}
        waiting |= (imports(current) | packages) - out
    return frozenset(out)


def test_the_table_names_every_module():
    assert set(MAY_IMPORT) == set(MODULES), "say in MAY_IMPORT what a new module may import"


@each_module
def test_imports_go_one_way(module):
    allowed = MAY_IMPORT[module].split()
    strangers = sorted(m for m in imports(module) if not any(below(m, package) for package in allowed))
    assert strangers == [], f"otcxr.{module} may import {allowed or 'nothing of otcxr'}"


def test_the_reading_of_imports_sees_all_kinds():
    source = """
import otcxr.runs
from otcxr.evaluation import metrics, TASKS
from otcxr import errors
import torch
if TYPE_CHECKING:
    from otcxr.nn.encoder import Encoder
def f():
    from otcxr.methods import METHODS
    importlib.import_module("otcxr.train")
"""
    found = imports("no.module", ast.walk(ast.parse(source)))
    assert found == {"runs", "evaluation.metrics", "evaluation", "errors", "nn.encoder", "methods", "train"}
    assert "commands" in imports("cli")
    assert "nn.resnet" in imports("nn.encoder")  # inside a function
    assert {"methods", "methods.otcxr", "losses"} <= reached("train")


@pytest.mark.parametrize("package", NEVER_A_METHOD)
def test_what_judges_an_encoder_never_reaches_a_method(package):
    """Also not through others: so a plain encoder without extra cost is a property of the imports."""
    for module in (m for m in MODULES if below(m, package)):
        training = ("methods", "settings", "train", "loop", "launch", "health", "probes", "losses", "distributed")
        found = sorted(m for m in reached(module) if any(below(m, t) for t in training))
        assert found == [], module


# back ends of the transport: loaded only where their compiler is (tests/test_ot.py and test_ot_native.py)
COMPILERS = {
    "ot.gpu": {"triton"},
    "ot.kernels": {"numba", "numpy"},
    "ot.native": {"numpy"},
    "ot.simd": {"numba", "llvmlite"},
}


@pytest.mark.parametrize("package", ["ot", "losses"])
def test_mathematics_stands_on_torch_alone(package):
    for module in (m for m in MODULES if below(m, package)):
        roots = {origin.split(".")[0] for origin, _ in imported_names(ast.walk(tree(module)))}
        assert roots - sys.stdlib_module_names <= {"torch", "otcxr"} | COMPILERS.get(module, set()), module


def test_nothing_imports_itself_in_a_circle_at_start():
    """Imports at the top of files form no circle (those inside functions and for types only may)."""
    graph = {module: imports(module, tree(module).body) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@each_module
def test_names(module):
    assert not {"utils", "util", "helpers", "helper", "misc", "common"} & set(module.split("."))
    assert ast.get_docstring(tree(module)), "every module says what it is"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__main__"])
def test_public_names_are_said_and_real(module):
    loaded = importlib.import_module(f"otcxr.{module}".rstrip("."))
    assert "__all__" in vars(loaded)
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    assert [name for name in loaded.__all__ if name.startswith("_") and name != "__version__"] == []


@each_module
def test_no_private_name_is_taken_from_another_module(module):
    taken = [
        f"{origin}.{name}"
        for origin, name in imported_names(ast.walk(tree(module)))
        if below(origin, "otcxr") and name and name.startswith("_") and name != "__version__"
    ]
    assert taken == []


@each_module
def test_the_library_never_prints(module):
    if module in ("cli", "console"):
        return
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


@each_module
def test_no_global_random_state(module):
    """Seeds belong to generators. Torch's own is seeded only where ``fork_rng`` puts it back afterwards."""
    generators = {"default_rng", "SeedSequence", "Generator", "fork_rng"}
    sources = ("np.random", "numpy.random", "torch.random", "random")
    used = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner in sources and node.attr not in generators) or "manual_seed" in node.attr:
                used.add(f"{owner}.{node.attr}")
    seeds = {"torch.manual_seed", "torch.default_generator.manual_seed"}
    if module == "loop":  # run by ``train`` inside ``fork_rng``: see tests/test_resume.py
        assert used <= seeds
        return
    assert used <= (seeds if module == "nn.encoder" and "fork_rng" in MODULES[module].read_text() else set())


# --- light at the start ----------------------------------------------------------------------------------------------


def loaded_after(code):
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport sys; print('LOADED', *sys.modules)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return set(out.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import otcxr, otcxr.cli",
        "from otcxr.cli import main; assert main(['--help']) == 0",
        "from otcxr.cli import main; assert main(['--version']) == 0",
        "from otcxr.cli import main; assert main(['pretrian']) == 1",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert loaded_after(code) & set(HEAVY) == set()


def test_the_module_is_the_command_line():
    out = subprocess.run([sys.executable, "-m", "otcxr", "--help"], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("usage: otcxr COMMAND")
    assert out.stderr == ""
    for command in ("pretrain", "evaluate", "match", "explain", "report", "demo"):
        assert f"\n  {command} " in out.stdout


def test_every_command_of_the_table_exists():
    from otcxr import commands
    from otcxr.cli import COMMANDS

    for function, text in COMMANDS.values():
        assert callable(getattr(commands, function))
        assert text
