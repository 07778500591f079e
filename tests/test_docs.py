"""What the README says works: its Python runs, its commands and settings exist, its links lead somewhere."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from otcxr.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
    training = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    text = "\n".join([*blocks("bash"), *training]).replace("\\\n", " ")  # lines that go on
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
    for need in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[\[<>=]", need)[0].lower()
        assert name in pinned, name
    assert "torchvision" not in pinned
