"""Segmentation transfer: can masks be read off an encoder's maps?

    token      a linear layer on every position of the last map, interpolated to pixels; the encoder is frozen
    frozen     a U-Net decoder on all maps; the encoder is frozen, its norms too
    finetune   the same with the encoder trained on

Every region (lungs, heart, a finding) is a channel of its own, as regions overlap. With logits z, masks y, known
channels only:

    token:   mean of BCE(z_i, share of the cell of position i that y covers) + penalty / 2 |w|^2      (L-BFGS)
    else:    BCE(z, y) + mean over channels of 1 - (2 sum p y + 1) / (sum p + sum y + 1),  p = sigmoid(z)   (AdamW)

where the Dice sums go over a whole batch, as most images show none of a lesion. The penalty, or the step, with the
least loss on the validation images is kept. A channel's bias starts at the logit of the share of pixels that it covers.
Its threshold is the one of 255, sixteenths of a logit apart, with the largest mean Dice over the validation images that
have the region, as it is measured; what that costs on the others, ``left_empty`` says.

Measured, for each test image and region:

    dice, iou, hausdorff    where the region is: an image without it says nothing here (counting an empty prediction for
                            an empty image as 1 gives an all-empty prediction 0.78 on SIIM-ACR)
    empties                 AUROC of the largest logit: images with the region against those without
    found, left_empty       share of the images with it where anything is called, and of those without where nothing is

The Hausdorff distance is the 95th percentile, in shares of the side of the square; a region that was missed altogether
counts as far as the image's diagonal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from otcxr.attribution import to_pixels
from otcxr.console import Progress
from otcxr.data.dataset import ImageDataset
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.labelled import LabelDraw, Material, Part
from otcxr.evaluation.overlap import dice, hausdorff_95, iou
from otcxr.evaluation.truth import Masks
from otcxr.nn.encoder import Encoder, initial_weights
from otcxr.nn.unet import UNet
from otcxr.optim import cosine_schedule, make_optimizer, set_learning_rate

__all__ = [
    "HEADS",
    "MEASURES",
    "SegmentConfig",
    "Segmentation",
    "Segmenter",
    "choose_threshold",
    "measure_image",
    "segment",
    "segmentation_loss",
]

HEADS = ("token", "frozen", "finetune")
MEASURES = ("dice", "iou", "hausdorff", "empties", "found", "left_empty")
_LOOKS = 10  # at the validation images
_WARMUP = 0.1  # share of the steps
_PENALTIES = (1e-4, 1e-3, 1e-2)  # of the token probe
_MOST_TOKENS = 200_000  # that the token probe is fitted on
_LEVELS, _STEP = 256, 1 / 16  # of the logit, from -8 to 8, for thresholds


@dataclass(frozen=True)
class SegmentConfig:
    """How heads for segmentation are trained.

    Attributes:
        regions: Which; empty takes all masks that the images to fit on have.
        steps: Optimizer steps of the U-Net.
        batch_size: Images a step.
        learning_rate: Peak, of decoder and encoder.
        weight_decay: Of matrices.
        width: Channels of the decoder's last block.
    """

    regions: tuple[str, ...] = ()
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    width: int = 16

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.width < 1:
            raise ConfigError("segment.steps and width must be at least 1 and batch_size at least 2, received "
                              f"{self.steps}, {self.width}, {self.batch_size}")  # fmt: skip
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ConfigError("segment.learning_rate must be > 0 and weight_decay >= 0, received "
                              f"{self.learning_rate}, {self.weight_decay}")  # fmt: skip


class Segmentation(NamedTuple):
    """Result of a head.

    Attributes:
        model: In evaluation mode.
        thresholds: (R,) on the logit.
        fitted: (R,) whether an image to fit on shows the region.
        tests: For each set of test images, by measure, (N, R); 0 where it is not measured.
        facts: What was chosen on the validation images, for JSON.
    """

    model: Segmenter
    thresholds: NDArray[np.float64]
    fitted: NDArray[np.bool_]
    tests: Mapping[str, Mapping[str, NDArray[np.float64]]]
    facts: Mapping[str, Any]


class Segmenter(nn.Module):
    """An encoder with a head: images (B, 1, S, S) in [0, 1] -> logits (B, R, S, S).

    Args:
        encoder: The encoder; it is copied.
        regions: R.
        head: One of ``HEADS``.
        width: Of the U-Net.
    """

    def __init__(self, encoder: Encoder, regions: int, head: str, width: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(head == "finetune")
        self.frozen = head != "finetune"
        self.head: nn.Module = (
            nn.Conv2d(encoder.channels[-1], regions, 1) if head == "token" else UNet(encoder.channels, regions, width)
        )

    def train(self, mode: bool = True) -> Segmenter:
        """As ``nn.Module.train``; the norms of a frozen encoder keep their statistics."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            maps = self.encoder(images)
        if isinstance(self.head, UNet):
            out: Tensor = self.head(maps, size)
            return out
        return to_pixels(self.head(maps[-1]), *size, self.encoder.first_centre)


def segment(
    encoder: Encoder, material: Material, draw: LabelDraw, config: SegmentConfig, head: str, progress: Progress
) -> Segmentation:
    """Train a head on the masks of a draw and measure it on all test images.

    Args:
        encoder: The encoder; not changed.
        material: Of ``regions.segmented``.
        draw: Images whose masks are spent.
        config: Settings.
        head: One of ``HEADS``.
        progress: Where to show progress.
    Raises: DataError: fewer than two images to fit on.
    """
    assert material.masks is not None
    fit, val = material.fit.take(draw.fit), material.val.take(draw.val)
    if len(fit.records) < 2:
        raise DataError(f"segmentation needs at least two images to fit on, received {len(fit.records)}; take a larger "
                        "share of the labels")  # fmt: skip
    device = next(encoder.parameters()).device
    with initial_weights(draw.seed):
        model = Segmenter(encoder, len(material.findings), head, config.width).to(device)
    source = _Source(material, material.masks, device)
    train = _fit_tokens if head == "token" else _fit_decoder
    facts = train(model, fit, val, source, config, draw.seed, progress)
    model.requires_grad_(False).eval()
    thresholds = _thresholds(model, val, source, config.batch_size)
    tests = {
        name: _measure(model, part, source, thresholds, config.batch_size, progress)
        for name, part in material.tests.items()
    }
    facts |= {"thresholds": dict(zip(material.findings, thresholds.tolist(), strict=True))}
    return Segmentation(model, thresholds, (fit.labels == 1).any(0), tests, facts)


def segmentation_loss(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy and soft Dice over a batch, of known channels only; see the module's text.

    Args:
        logits, masks: (B, R, H, W).
        known: (B, R) bool: whether it is known where the region is, or that there is none.
    Returns: A scalar; 0 where nothing is known.
    """
    weight = known[:, :, None, None].to(logits.dtype)
    pixels = logits.shape[-2] * logits.shape[-1]
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    p = logits.sigmoid() * weight
    both, sums = (p * masks).sum((0, 2, 3)), (p + masks * weight).sum((0, 2, 3))
    some = known.any(0).to(logits.dtype)
    overlap = ((1 - (2 * both + 1) / (sums + 1)) * some).sum() / some.sum().clamp_min(1)
    return (entropy * weight).sum() / (pixels * weight.sum()).clamp_min(1) + overlap


def choose_threshold(inside: NDArray[np.floating[Any]], outside: NDArray[np.floating[Any]]) -> float:
    """The threshold with the largest mean Dice.

    Args:
        inside, outside: (N, 256) of each image the numbers of pixels in and out of the region by logit: number k holds
            those of [-8 + k / 16, -8 + (k + 1) / 16), the first and the last all beyond.
    Returns: A logit; what reaches it is called. Of equally good ones the lowest; 0 without an image with the region.
    """
    shown = inside.sum(1) > 0
    if not shown.any():
        return 0.0
    true, false = (np.cumsum(counts[shown, ::-1], axis=1)[:, ::-1][:, 1:] for counts in (inside, outside))
    found = 2 * true / (true + false + inside[shown].sum(1, keepdims=True))
    return float((np.argmax(found.mean(0)) + 1 - _LEVELS // 2) * _STEP)


def measure_image(logits: NDArray[np.floating[Any]], threshold: float, truth: NDArray[np.bool_]) -> dict[str, float]:
    """All ``MEASURES`` of one image and region; those of where are 0 where the region is not.

    Args:
        logits: (H, W).
        threshold: On the logit.
        truth: (H, W), perhaps empty.
    """
    found = logits >= threshold
    out = dict.fromkeys(MEASURES, 0.0)
    if truth.any():
        out |= {"dice": dice(found, truth), "iou": iou(found, truth),
                "hausdorff": hausdorff_95(found, truth) / max(truth.shape)}  # fmt: skip
    called = float(found.any())
    return out | {"empties": float(logits.max()), "found": called, "left_empty": 1 - called}


class _Source:
    """Images and masks of a part, on a device."""

    def __init__(self, material: Material, masks: Masks, device: torch.device) -> None:
        self.regions, self.masks, self.pixels, self.device = material.findings, masks, material.pixels, device

    def truth(self, part: Part, rows: list[int]) -> NDArray[np.bool_]:
        """(B, R, S, S); empty where the label does not say that the region is there: the mask may be unreadable."""
        out = np.zeros((len(rows), len(self.regions), self.masks.size, self.masks.size), dtype=np.bool_)
        for i, row in enumerate(rows):
            for r in np.flatnonzero(part.labels[row] == 1).tolist():
                out[i, r] = self.masks(part.records[row], self.regions[r])
        return out

    def shares(self, part: Part) -> NDArray[np.float64]:
        """(R,) which share of the pixels each region covers, over the images where it is known; 0 without any."""
        total = np.zeros(len(self.regions))
        for row, record in enumerate(part.records):
            for r in np.flatnonzero(part.labels[row] == 1).tolist():
                total[r] += self.masks(record, self.regions[r]).mean()
        return np.asarray(total / np.maximum(1, (~np.isnan(part.labels)).sum(0)))

    def batch(self, part: Part, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 1, S, S), masks (B, R, S, S), whether they are known (B, R)."""
        images = ImageDataset(part.records, self.masks.size, self.pixels)
        known = torch.from_numpy(~np.isnan(part.labels[rows]))
        return (torch.stack([images[i] for i in rows]).to(self.device),
                torch.from_numpy(self.truth(part, rows)).float().to(self.device), known.to(self.device))  # fmt: skip

    def logits(self, model: Segmenter, part: Part, batch_size: int) -> Any:
        """Batches of (rows, logits (B, R, S, S) on the host)."""
        loader = DataLoader(ImageDataset(part.records, self.masks.size, self.pixels), batch_size=batch_size)
        start = 0
        with torch.inference_mode():
            for images in loader:
                rows = list(range(start, start + len(images)))
                yield rows, model(images.to(self.device)).float().cpu().numpy()
                start += len(images)


def _fit_decoder(
    model: Segmenter, fit: Part, val: Part, source: _Source, config: SegmentConfig, seed: int, progress: Progress
) -> dict[str, Any]:
    optimizer = make_optimizer(model, "adamw", learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    batch = min(config.batch_size, len(fit.records))
    assert isinstance(model.head, UNet)
    assert model.head.last.bias is not None
    share = torch.from_numpy(source.shares(fit)).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        model.head.last.bias.copy_(share.logit())
    looks = {max(1, round(config.steps * (k + 1) / _LOOKS)) for k in range(_LOOKS)}
    waiting: list[int] = []
    best, history = (0, math.inf, {k: v.clone() for k, v in model.state_dict().items()}), []
    with progress.bar("segmentation", config.steps, "steps") as bar:
        for step in range(config.steps):
            if len(waiting) < batch:  # each image once before any comes again
                waiting += torch.randperm(len(fit.records), generator=generator).tolist()
            rows, waiting = waiting[:batch], waiting[batch:]
            images, masks, known = source.batch(fit, rows)
            images, masks = _changed(images, masks, generator)
            set_learning_rate(
                optimizer, config.learning_rate, cosine_schedule(step, int(_WARMUP * config.steps), config.steps)
            )
            model.train()
            loss = segmentation_loss(model(images), masks, known)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if step + 1 in looks:
                score = _validation_loss(model.eval(), val, source, config.batch_size)
                history.append((step + 1, score))
                if score is None or score <= best[1]:
                    best = (step + 1, math.inf if score is None else score,
                            {k: v.detach().clone() for k, v in model.state_dict().items()})  # fmt: skip
            bar(step + 1, f"loss {float(loss.detach()):.3f}")
    model.load_state_dict(best[2])
    return {"step": best[0], "validation": [list(look) for look in history]}


def _changed(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Light changes, of images and masks alike: turned by up to 7 degrees, shifted by up to 5 %, 90 to 110 % of the
    size; grey levels x -> (c x)^g with g in [0.8, 1.25] and c in [0.8, 1.2]. What comes in from outside is black."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, size = uniform(-7, 7) * math.pi / 180, uniform(0.9, 1.1)
    cosine, sine = angle.cos() / size, angle.sin() / size
    rows = (cosine, -sine, uniform(-0.1, 0.1), sine, cosine, uniform(-0.1, 0.1))  # of [-1, 1], which is the whole side
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), [count, 1, *images.shape[-2:]], align_corners=False)
    grid = grid.to(images.device)
    gamma, contrast = uniform(math.log(0.8), math.log(1.25)).exp(), uniform(0.8, 1.2)
    moved = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    gamma, contrast = (factor.view(-1, 1, 1, 1).to(images.device) for factor in (gamma, contrast))
    grey = (moved * contrast).clamp(0, 1) ** gamma
    return grey, F.grid_sample(masks, grid, mode="nearest", align_corners=False)


def _validation_loss(model: Segmenter, val: Part, source: _Source, batch_size: int) -> float | None:
    """The loss over all validation images, the Dice of their pixels together; None where nothing is known."""
    known = ~np.isnan(val.labels)
    if not known.any():
        return None
    entropy, count = 0.0, 0.0
    both, sums = np.zeros(known.shape[1]), np.zeros(known.shape[1])
    for rows, logits in source.logits(model, val, batch_size):
        masks, weight = source.truth(val, rows), known[rows][:, :, None, None].astype(np.float64)
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        entropy += float(((np.logaddexp(0, logits) - logits * masks) * weight).sum())
        count += float(weight.sum()) * logits.shape[-2] * logits.shape[-1]
        both += (p * masks * weight).sum((0, 2, 3))
        sums += ((p + masks) * weight).sum((0, 2, 3))
    some = known.any(0)
    return entropy / count + float((1 - (2 * both + 1) / (sums + 1))[some].mean())


def _fit_tokens(
    model: Segmenter, fit: Part, val: Part, source: _Source, config: SegmentConfig, seed: int, progress: Progress
) -> dict[str, Any]:
    x, y, known = _tokens(model, fit, source, config.batch_size, seed)
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / deviation
    seen, target, there = _tokens(model, val, source, config.batch_size, seed)
    seen = (seen - mean) / deviation
    assert isinstance(model.head, nn.Conv2d)
    best: tuple[float, float, Tensor, Tensor] | None = None
    history = []
    with progress.bar("token probe", len(_PENALTIES), "penalties") as bar:
        for number, penalty in enumerate(_PENALTIES):
            weight, bias = _logistic(x, y, known, penalty)
            score = float(_entropy(seen @ weight.T + bias, target, there)) if there.any() else math.inf
            history.append([penalty, None if math.isinf(score) else score])
            if best is None or score < best[0]:
                best = score, penalty, weight, bias
            bar(number + 1)
    assert best is not None
    _, penalty, weight, bias = best
    scaled = weight / deviation
    with torch.no_grad():
        model.head.weight.copy_(scaled[:, :, None, None])
        assert model.head.bias is not None
        model.head.bias.copy_(bias - scaled @ mean)
    return {"penalty": penalty, "validation": history}


@torch.no_grad()
def _tokens(model: Segmenter, part: Part, source: _Source, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the last map (T, C), the share of each one's cell that is covered (T, R), and whether known (T, R).

    At most 200,000 positions: then of images drawn at random.
    """
    order = np.random.default_rng((seed, 3)).permutation(len(part.records)).tolist()
    model.eval()
    xs, ys, ks, total = [], [], [], 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        images, masks, known = source.batch(part, rows)
        last = model.encoder(images)[-1].float()
        cells = _covered(masks, int(last.shape[-2]), int(last.shape[-1]), model.encoder.first_centre)
        xs.append(last.flatten(2).transpose(1, 2).flatten(0, 1))
        ys.append(cells.flatten(2).transpose(1, 2).flatten(0, 1))
        ks.append(known[:, None].expand(-1, last.shape[-2] * last.shape[-1], -1).flatten(0, 1))
        total += len(xs[-1])
        if total >= _MOST_TOKENS:
            break
    return torch.cat(xs), torch.cat(ys), torch.cat(ks)


def _covered(masks: Tensor, height: int, width: int, first: float) -> Tensor:
    """Share of each cell of a grid that lies in a mask, (B, R, height, width); cells are centred where tokens look."""
    down = round((first - 0.5) * masks.shape[-2] / height)
    right = round((first - 0.5) * masks.shape[-1] / width)
    # a cell begins so many pixels after its multiple of the step; what lies beyond the border is not in the region
    shifted = F.pad(masks, (-right, right, -down, down))
    return F.adaptive_avg_pool2d(shifted, (height, width))


def _entropy(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * known
    return (loss.sum(0) / known.sum(0).clamp_min(1)).sum()


def _logistic(x: Tensor, y: Tensor, known: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (R, C) and biases (R,) of the least penalised entropy; convex, so the start does not matter."""
    weight = torch.zeros(y.shape[1], x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(y.shape[1], device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> float:
        solver.zero_grad()
        with torch.enable_grad():
            loss = _entropy(x @ weight.T + bias, y, known) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _thresholds(model: Segmenter, val: Part, source: _Source, batch_size: int) -> NDArray[np.float64]:
    counts: list[tuple[list[NDArray[np.intp]], list[NDArray[np.intp]]]] = [([], []) for _ in source.regions]
    for rows, logits in source.logits(model, val, batch_size):
        level = np.clip(np.floor(logits / _STEP).astype(np.intp) + _LEVELS // 2, 0, _LEVELS - 1)
        truth = source.truth(val, rows)
        for i, row in enumerate(rows):
            for r in np.flatnonzero(val.labels[row] == 1).tolist():
                for side, chosen in enumerate((truth[i, r], ~truth[i, r])):
                    counts[r][side].append(np.bincount(level[i, r][chosen], minlength=_LEVELS))
    return np.array([
        choose_threshold(*(np.array(side, dtype=np.float64).reshape(-1, _LEVELS) for side in own)) for own in counts
    ])  # fmt: skip


def _measure(
    model: Segmenter, part: Part, source: _Source, thresholds: NDArray[np.float64], batch_size: int, progress: Progress
) -> dict[str, NDArray[np.float64]]:
    out = {name: np.zeros(part.labels.shape) for name in MEASURES}
    with progress.bar("measuring", len(part.records), "images") as bar:
        for rows, logits in source.logits(model, part, batch_size):
            truth = source.truth(part, rows)
            for i, row in enumerate(rows):
                for r in np.flatnonzero(~np.isnan(part.labels[row])).tolist():
                    for name, value in measure_image(logits[i, r], float(thresholds[r]), truth[i, r]).items():
                        out[name][row, r] = value
            bar(rows[-1] + 1)
    return out
