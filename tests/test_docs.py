"""What the README says works: its Python runs, its commands and settings exist, its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from otcxr.cli import COMMANDS, main
from otcxr.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
OVERVIEW = ROOT / "docs" / "methods" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch):
    """With a folder of its own, small views and few epochs; nothing else is changed."""
    generator = np.random.default_rng(0)
    for name in "abcdefghij":
        cv2.imwrite(str(tmp_path / f"{name}.png"), generator.integers(0, 256, (64, 64), dtype=np.uint8))
    (code,) = blocks("python")
    for old, new in (("/data/mine", str(tmp_path)), ("size=224", "size=48"), ("epochs=100", "epochs=1, batch_size=4")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert tuple(scope["embedding"].shape) == (1, 512)


def test_the_example_of_the_transport_page_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ot.md").read_text(), flags=re.DOTALL)
    imports = [line for line in code.splitlines() if "import" in line]
    assert all("otcxr.ot " in line or line == "import torch" for line in imports), "the example needs otcxr.ot alone"
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["moved"].shape == (32, 49, 64)
    assert scope["ragged"].converged.all()
    assert (scope["soft"].sum((-1, -2)) < 0.9).all()
    assert (scope["apart"] > 0).all()
    assert (scope["sharpness"] < 2 * 3.9).all()


def test_the_commands_and_their_settings_exist(capsys):
    pages = "".join(
        (ROOT / "docs" / name).read_text() for name in ("training.md", "views.md", "evaluation.md", "studies.md")
    )
    text = "\n".join([*blocks("bash"), *re.findall(r"```bash\n(.*?)```", pages, flags=re.DOTALL)]).replace(
        "\\\n", " "
    )  # lines that go on
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    lines = [line[line.index("otcxr ") :] for line in lines if re.match(r"(srun |torchrun .*-m )?otcxr ", line)]
    assert len(lines) >= 12
    for line in lines:
        words = line.split()[1:]
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        assert name in COMMANDS, line
        options = [word for word in words if word.startswith("--")]
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in options), line


def test_the_page_of_views_names_every_setting_and_its_limits():
    import dataclasses

    from otcxr.data.view_spec import _LARGEST, _LIMITS, ViewsConfig

    page = (ROOT / "docs" / "views.md").read_text()
    for field in dataclasses.fields(ViewsConfig):
        assert f"`{field.name}" in page or f"views.{field.name}" in page or field.name in ("size", "clean"), field.name
    for name, limit in {**_LIMITS, **_LARGEST}.items():
        (row,) = [line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line]
        assert f"{limit.most:g}" in row, name
        assert limit.least == 0 or f"{limit.least:g}" in row, name
        default = getattr(ViewsConfig(), name)
        for value in default if isinstance(default, tuple) else (default,):
            assert f"{value:g}" in row, name


def settings_script():
    """``benchmarks/write_settings.py`` as a module."""
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "benchmarks" / "write_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_and_the_pages_say_what_the_code_says():
    assert settings_script().stale() == {}, "run python benchmarks/write_settings.py"
    assert {page.stem for page in METHOD_PAGES} == {*settings_script().pages(), "own", "README"}


def test_the_overview_of_methods_has_every_row_with_a_link_to_its_page():
    script = settings_script()
    linked = re.findall(r"^\| \[`([^`]+)`\]\(([^)#]+)", OVERVIEW.read_text(), flags=re.MULTILINE)
    assert linked == [(name, f"{script.page_name(row)}.md") for name, row in METHODS.items()]


def test_a_stale_page_and_one_without_marks_are_found(tmp_path):
    script = settings_script()
    for name, rows in script.pages().items():
        (tmp_path / f"{name}.md").write_text(f"# Page\n\n{script.BEGIN}{script.table(rows)}{script.END}\n\nMore.\n")
    assert script.stale(tmp_path) == {}
    text = (tmp_path / "moco.md").read_text()
    assert "| `method.queue` | `4096` | Negatives that are kept" in text
    (tmp_path / "moco.md").write_text(text.replace("`4096`", "`4095`"))
    assert script.stale(tmp_path) == {"moco": "the table is not that of the code"}
    assert script.updated(text.replace("`4096`", "`4095`"), ["moco"]) == text
    (tmp_path / "moco.md").write_text(text.replace(script.END, ""))
    (tmp_path / "byol.md").unlink()
    (tmp_path / "dino.md").write_text(text + text)
    found = script.stale(tmp_path)
    assert set(found) == {"moco", "byol", "dino"}
    assert "must stand there once each" in found["moco"]
    assert "must stand there once each" in found["dino"]
    assert found["byol"] == "there is no such page"


def test_the_tests_that_pages_name_exist():
    defined = {
        name for file in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for page in METHOD_PAGES:
        named = re.findall(r"`(test_\w+)`", page.read_text())
        assert named or page.stem == "own", page.name
        assert set(named) <= defined, f"{page.name}: {set(named) - defined}"


@pytest.mark.parametrize("page", [p for p in METHOD_PAGES if p.stem != "own"], ids=lambda page: page.stem)
def test_the_commands_of_the_pages_of_methods_are_taken(page, capsys, monkeypatch):
    """Each as it stands, up to where it would begin."""
    monkeypatch.chdir(ROOT)
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line.split(" #")[0].split()[1:] for line in text.splitlines() if line.startswith("otcxr pretrain ")]
    assert lines
    for words in lines:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0
        name = yaml.safe_load(capsys.readouterr().out)["method"]["name"]
        assert settings_script().page_name(METHODS[name]) == page.stem or page.stem == "README"


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"^make ([a-z-]+)", page, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_citation_is_readable_and_states_the_version():
    from otcxr import __version__

    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert facts["version"] == __version__
    assert facts["preferred-citation"]["year"] == 2025


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"]
    for need in [*project["dependencies"], *extras["dev"], *extras["bench"]]:
        name = re.split(r"[\[<>=]", need)[0].lower()
        assert name in pinned, name
    assert "torchvision" not in pinned
