"""Draw the pages of docs/phantoms.md: phantoms with their findings, and phantoms beside real radiographs.

    python benchmarks/draw_phantoms.py                                   docs/images/phantoms.png
    python benchmarks/draw_phantoms.py --real FOLDER                     docs/images/phantoms-and-real.png too

FOLDER holds PNG files of ChestX-ray14 (NIH Clinical Center); every n-th one is taken, so that nobody chooses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from otcxr.data.images import fit_square, load_image
from otcxr.data.phantom import FINDINGS, parse_phantom, planted, read_phantom

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# the colours of Okabe and Ito, told apart by all kinds of colour vision
COLOURS = dict(
    zip(FINDINGS, ("#F0E442", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#0072B2"), strict=True)
)


def show(axes: Axes, source: str, index: int, outlines: bool) -> None:
    record = read_phantom(source).records[index]
    axes.imshow(record.image.radiograph().image[0], cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    if not outlines:
        return
    words = []
    for found in planted(parse_phantom(source), index):
        mask = record.masks[found.finding].radiograph().image[0].numpy()
        axes.contour(mask, [0.5], colors=COLOURS[found.finding], linewidths=0.9)
        words.append(f"{found.finding} {found.severity:.2f}")
    text = "\n".join(", ".join(words[k : k + 2]) for k in range(0, len(words), 2)) or "nothing planted"
    axes.set_title(f"{record.view}: {text}", fontsize=6, loc="left", pad=2.5)


def save(figure: plt.Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=110, bbox_inches="tight", pad_inches=0.05, pil_kwargs={"optimize": True})
    plt.close(figure)
    print(f"wrote docs/images/{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of PNG files of ChestX-ray14")
    arguments = parser.parse_args()
    style = {"hspace": 0.2, "wspace": 0.03}
    figure, grid = plt.subplots(4, 6, figsize=(10.2, 7.2), gridspec_kw=style)
    for finding, pair in zip(FINDINGS, grid.reshape(-1, 2)[: len(FINDINGS)], strict=True):
        source = f"20,seed=3,size=224,prevalence=0,{finding.lower()}_prevalence=1"
        for axes, outlines in zip(pair, (False, True), strict=True):
            show(axes, source, 4, outlines)
    for index, axes in enumerate(grid.reshape(-1)[2 * len(FINDINGS) :]):
        show(axes, "40,seed=1,size=224", 15 + index, True)
    save(figure, "phantoms.png")
    if arguments.real:
        files = sorted(arguments.real.glob("*.png"))
        if not files:
            parser.error(f"{arguments.real} holds no PNG files")
        real = [fit_square(load_image(file), 224)[0] for file in files[:: max(len(files) // 12, 1)][:12]]
        figure, grid = plt.subplots(6, 6, figsize=(10.2, 10.4), gridspec_kw={"hspace": 0.02, "wspace": 0.02})
        phantoms = iter(range(24))
        for row, line in enumerate(grid):
            for column, axes in enumerate(line):
                if row % 3 == 2:
                    axes.imshow(np.asarray(real[row // 3 * 6 + column]), cmap="gray", vmin=0, vmax=1)
                    axes.set_axis_off()
                else:
                    show(axes, "40,seed=2,size=224", next(phantoms), False)
        save(figure, "phantoms-and-real.png")


if __name__ == "__main__":
    main()
