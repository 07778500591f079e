"""What a method pairs on held-out images: does the plan find the same anatomy, and where do the masses lie?

Two views of one radiograph are drawn as in training; where each position of the first lies in the second is known from
their geometry. Nothing is fitted, and no label is needed: boxes and masks, where there are any, only say which
positions lie in lungs, heart and findings.

**Correspondence**, over positions that both views show, as shares within one cell (in x and in y) of the true one:

    plan               arg-max of the plan
    exact              the same, at the true cell itself
    nearest, by cost   the cheapest position by the method's own cost: what transport adds is the difference to it
    nearest, by map    the most similar position by cosine of the encoder's own last map: needs no method
    same place         the same cell of the grid: what a network scores that knows only where it is in the view
    chance             a valid position at random

**Focus**, of a region G with f_i in [0, 1] the part of token i's cell that lies in G, over views that show some of G:

    learned = sum_i a_i f_i / sum_i a_i        uniform = sum_i f_i / n over the n valid tokens

A share is a ratio of sums over images; its interval resamples patients (percentile bootstrap), differences are of the
same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as with_
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import read_pixels, refuse_too_many
from otcxr.data.geometry import ViewBatch, apply_affine, correspondence, token_centres, token_valid
from otcxr.data.masks import read_mask
from otcxr.data.records import Record, Skipped
from otcxr.data.sources import open_again
from otcxr.data.views import ViewsConfig, collate_views, make_views, view_generator
from otcxr.errors import CheckpointError, ConfigError, DataError
from otcxr.evaluation.estimates import BootstrapSettings
from otcxr.evaluation.protocols import device_of
from otcxr.evaluation.ratios import ratio
from otcxr.evaluation.resampling import patient_weights
from otcxr.health import correspondence_score
from otcxr.loop import build_method
from otcxr.methods.base import Match, SSLMethod
from otcxr.nn.encoder import Encoder, encoder_digest, load_state
from otcxr.runs import Run, describe_environment
from otcxr.settings import config_from_plain

__all__ = [
    "FOCUS",
    "MATCHED",
    "MatchingConfig",
    "PairScores",
    "choose_images",
    "cover",
    "load_method",
    "match_images",
    "measure_matching",
    "pair_scores",
]

_EPOCH = 2**31 + 1  # an epoch that no training reaches, and other views than those of the probe pairs
_FINE = 8  # points along each side of a token's cell, to see how much of it lies in a region
FOCUS = ("learned", "uniform")

# name in the result -> name in ``health.correspondence_score``, whether the cost is that of the encoder's map
MATCHED: dict[str, tuple[str, bool]] = {
    "plan": ("hits", False),
    "exact": ("exact", False),
    "nearest_by_cost": ("hits_nearest_neighbour", False),
    "nearest_by_map": ("hits_nearest_neighbour", True),
    "same_place": ("hits_same_cell", True),
    "chance": ("hits_chance", True),
}


@dataclass(frozen=True)
class MatchingConfig:
    """How pairs are drawn and measured.

    Attributes:
        images: Most images, chosen at random by ``seed``; 0 takes all.
        pairs: Pairs of views of each image.
        resamples: Bootstrap resamples of patients.
        level: Level of the intervals.
        accelerator: auto, cpu or cuda.
        max_skipped: Largest share of images that may be missing or broken.
        seed: Of the choice, the views and the resamples.
    """

    images: int = 400
    pairs: int = 2
    resamples: int = 2000
    level: float = 0.95
    accelerator: str = "auto"
    max_skipped: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 0 or self.pairs < 1 or self.seed < 0:
            raise ConfigError("images and seed must be >= 0 and pairs at least 1, received "
                              f"{self.images}, {self.seed}, {self.pairs}")  # fmt: skip
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"accelerator must be auto, cpu or cuda, received '{self.accelerator}'")
        BootstrapSettings(self.resamples, self.seed, self.level)


class PairScores(NamedTuple):
    """Sums over the pairs of one image.

    Attributes:
        known: Positions whose true place is known.
        hits: Name in ``MATCHED`` -> how many of them are paired rightly (expected number for chance).
        views: Region -> views that show some of it.
        focus: Region -> over those views, sums of the learned and the uniform share.
    """

    known: int
    hits: dict[str, float]
    views: dict[str, int]
    focus: dict[str, tuple[float, float]]


def measure_matching(
    run: Run, source: str = "", split: str = "test", config: MatchingConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure correspondence and focus of a run's method on held-out images; writes ``evaluation/matching.json``.

    Args:
        run: A run with at least one finished epoch.
        source: Images; empty takes those of the pre-training. Boxes and masks of its records are used if there are any.
        split: Split to look at; a source without splits is taken whole.
        config: Settings; None takes the defaults.
        progress: Where to show progress.
    Returns: What was written. ``correspondence`` has value, low, high of every entry of ``MATCHED`` that applies, and
        under ``differences`` those of the plan to the others; ``focus`` the same by region; an estimate that fewer than
        five patients support is None, with the reason beside it.
    Raises:
        DataError: no such split, or too many images cannot be read.
        CheckpointError: the run has no method yet, or not the one of its settings.
    """
    config, progress = config or MatchingConfig(), progress or SilentProgress()
    device = device_of(config.accelerator)
    settings = config_from_plain(run.read_config())
    method = load_method(run).to(device).eval()
    facts = run.read_json("encoder.json") or {}
    collection = open_again(source or settings.data.source)
    if collection.has_splits:
        collection = collection.split(split)
    records = choose_images(collection.records, config)
    scores, used, skipped = match_images(
        method.encoder, method.match, records, settings.views, config, collection.name, progress
    )
    result = {
        "task": "matching", "method": settings.method, "encoder_digest": encoder_digest(method.encoder),
        "collection": collection.name, "split": split, "images": len(used), "skipped": [list(s) for s in skipped],
        "patients": len({record.patient for record in used}), "pairs": config.pairs * len(used),
        "positions": sum(score.known for score in scores), "pretrained_on": facts.get("source"),
        **tables(scores, [record.patient for record in used], config),
        "settings": asdict(config), "environment": describe_environment(),
    }  # fmt: skip
    run.write_json("evaluation/matching.json", result)
    return result


def choose_images(records: Sequence[Record], config: MatchingConfig) -> list[Record]:
    """The images that are looked at: all, or as many as the settings say, drawn by their seed."""
    order = np.random.default_rng((config.seed, 9)).permutation(len(records))
    return [records[i] for i in sorted(order[: config.images or None].tolist())]


def match_images(
    encoder: Encoder, match: Callable[[ViewBatch], Match | None], records: Sequence[Record], views: ViewsConfig,
    config: MatchingConfig, name: str, progress: Progress,
) -> tuple[list[PairScores], list[Record], list[Skipped]]:  # fmt: skip
    """Score pairs of views of images.

    Args:
        encoder: In evaluation mode.
        match: A method's, on the encoder's device; None of it for an encoder without one.
        records: Images.
        views: How they are drawn; two whole views, however many local ones were trained on.
        config: Settings.
        name: Of the collection, for messages.
        progress: Where to show progress.
    Returns: Scores, the images that they are of, and what could not be read.
    Raises: DataError: too many images cannot be read.
    """
    device = next(encoder.parameters()).device
    views = with_(views, local_count=0, clean=False)
    scores: list[PairScores] = []
    used: list[Record] = []
    skipped: list[Skipped] = []
    with progress.bar("pairs of views", len(records), "images") as bar, torch.inference_mode():
        for number, record in enumerate(records):
            try:
                radiograph = read_pixels(record.image)
                pairs = collate_views([
                    make_views(radiograph, views, view_generator(config.seed, _EPOCH + k, int(number)))
                    for k in range(config.pairs)
                ])  # fmt: skip
                scores.append(pair_scores(encoder, match, pairs, regions_of(record), device))
                used.append(record)
            except DataError as error:
                skipped.append(Skipped(record.name, str(error), record.split))
            bar(number + 1)
    refuse_too_many(skipped, len(records), config.max_skipped, name, anything=bool(used))
    return scores, used, skipped


def load_method(run: Run) -> SSLMethod:
    """Build the method of a run's settings and load what it has learned, in single precision.

    Raises: CheckpointError: nothing is saved yet, or it belongs to other settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = run.path / "method.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; it is written at the end of the first epoch")
    facts = run.read_json("environment.json") or {}
    method = build_method(config_from_plain(run.read_config()), facts.get("images"))  # a queue may follow their number
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); otcxr pretrain --resume true writes it anew") from error
    load_state(method, state, str(path))
    return method.float()


def pair_scores(
    encoder: Encoder, match: Callable[[ViewBatch], Match | None], batch: ViewBatch,
    regions: Mapping[str, NDArray[np.bool_]], device: torch.device,
) -> PairScores:  # fmt: skip
    """Score the pairs of one image; see the module for what is counted.

    Args:
        encoder: In evaluation mode.
        match: What the method pairs, None where it pairs nothing.
        batch: Two views of B pairs of one image.
        regions: Name -> mask (H, W) of the image.
        device: Where both are.
    """
    moved = batch._replace(
        views=tuple(view.to(device) for view in batch.views),
        geometry=batch.geometry.to(device), valid=tuple(valid.to(device) for valid in batch.valid),
    )  # fmt: skip
    maps = [encoder(view)[-1] for view in moved.views[:2]]
    grids = [(int(m.shape[-2]), int(m.shape[-1])) for m in maps]
    present = [token_valid(valid, *grid) for valid, grid in zip(moved.valid, grids, strict=False)]
    first = encoder.first_centre
    true = correspondence(moved.geometry[0], moved.geometry[1], present[0], present[1], grids[0], grids[1], first)
    tokens = [F.normalize(m.flatten(2).transpose(1, 2).float(), dim=-1) for m in maps]
    even = [p / p.sum(-1, keepdim=True).clamp_min(1) for p in present]
    cost = 1.0 - tokens[0] @ tokens[1].transpose(1, 2)
    plain = Match(cost, even[0], even[1], even[0][:, :, None] * even[1][:, None, :], None)
    paired = match(moved)
    known = int(true.known.sum())
    of_map = correspondence_score(plain, true, grids[1])
    of_method = correspondence_score(paired, true, grids[1]) if paired is not None else {}
    hits = {
        name: known * found[key] if known else 0.0
        for name, (key, by_map) in MATCHED.items()
        for found in [of_map if by_map else of_method]
        if key in found or (not known and (by_map or paired is not None))
    }
    seen: dict[str, int] = {}
    focus: dict[str, tuple[float, float]] = {}
    for name, mask in regions.items():
        count, learned, uniform = 0, 0.0, 0.0
        for side in (0, 1):
            inside = cover(mask, batch.geometry[side], grids[side], first).to(device)
            even_share = (even[side] * inside).sum(-1)
            shown = even_share > 0
            count += int(shown.sum())
            uniform += float(even_share[shown].sum())
            if paired is not None:
                mass = (paired.a, paired.b)[side].float()
                share = (mass * inside).sum(-1) / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)
                learned += float(share[shown].sum())
        seen[name] = count
        focus[name] = (learned if paired is not None else float("nan"), uniform)
    return PairScores(known, hits, seen, focus)


def cover(mask: NDArray[np.bool_], geometry: Tensor, grid: tuple[int, int], first: float = 0.5) -> Tensor:
    """Which part of each token's cell lies in a region: (B, n) in [0, 1], on the host.

    Args:
        mask: (H, W) of the source image.
        geometry: (B, 2, 3) maps from view to source.
        grid: (height, width) of the tokens.
        first: Centre of the first token in cells, see ``geometry.token_centres``.
    """
    height, width = grid
    steps = (torch.arange(_FINE) + 0.5) / _FINE - 0.5
    offsets = torch.stack(torch.meshgrid(steps / width, steps / height, indexing="xy"), -1).reshape(-1, 2)
    points = token_centres(height, width, first=first)[:, None, :] + offsets  # (n, points, 2)
    mapped = apply_affine(geometry.cpu().float(), points.reshape(1, -1, 2).expand(len(geometry), -1, -1))
    rows, columns = mask.shape
    x = (mapped[..., 0] * columns).floor().long()
    y = (mapped[..., 1] * rows).floor().long()
    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    hit = torch.from_numpy(np.ascontiguousarray(mask))[y.clamp(0, rows - 1), x.clamp(0, columns - 1)] & inside
    part: Tensor = hit.view(len(geometry), height * width, -1).float().mean(-1)
    return part


def regions_of(record: Record) -> dict[str, NDArray[np.bool_]]:
    """Lungs, heart and findings of a record: its masks, and boxes of findings without one, as (H, W) of the image.

    Raises: DataError: a mask cannot be read.
    """
    out = {name: read_mask(image) for name, image in record.masks.items()}
    boxes = [box for box in record.boxes if box.finding not in out]
    if boxes:
        shape = read_pixels(record.image).image.shape[-2:]
        for box in boxes:
            mask = out.setdefault(box.finding, np.zeros(shape, dtype=np.bool_))
            mask[max(0, round(box.y)) : max(0, round(box.y + box.height)),
                 max(0, round(box.x)) : max(0, round(box.x + box.width))] = True  # fmt: skip
    return {name: np.asarray(mask, dtype=np.bool_) for name, mask in out.items() if mask.any()}


def tables(scores: Sequence[PairScores], patients: Sequence[str], config: MatchingConfig) -> dict[str, Any]:
    """Sums of images to shares with intervals, see ``measure_matching``."""
    weights = patient_weights(list(patients), config.resamples, config.seed).astype(np.float64)
    people = np.asarray(patients)

    def share(top: NDArray[np.float64], below: NDArray[np.float64]) -> dict[str, Any]:
        return ratio(top, below, people, weights, config.level)[0]

    known = np.array([float(s.known) for s in scores])
    counted = {n: np.array([s.hits[n] for s in scores]) for n in MATCHED if all(n in s.hits for s in scores)}
    found: dict[str, Any] = {name: share(top, known) for name, top in counted.items()}
    if "plan" in counted:
        found["differences"] = {
            name: share(counted["plan"] - counted[name], known)
            for name in ("nearest_by_cost", "nearest_by_map", "same_place", "chance") if name in counted
        }  # fmt: skip
    focus: dict[str, Any] = {}
    for name in sorted({n for s in scores for n in s.views}):
        views = np.array([float(s.views.get(name, 0)) for s in scores])
        learned, uniform = (np.array([s.focus.get(name, (0.0, 0.0))[k] for s in scores]) for k in (0, 1))
        focus[name] = {"images": int((views > 0).sum()), "uniform": share(uniform, views)}
        if "plan" in counted:
            focus[name] |= {"learned": share(learned, views), "difference": share(learned - uniform, views)}
    return {"correspondence": found, "focus": focus}
