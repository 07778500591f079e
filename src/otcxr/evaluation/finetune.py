"""Fine-tuning: the whole encoder trained on labels, with a linear head.

    logits = head(mean of the last map),   loss = mean over assessed (image, finding) of the binary cross-entropy

The head starts as the linear probe of the encoder before (Kumar et al., ICLR 2022, arXiv:2202.10054: a random head
first distorts what was learned), so a fine-tuned encoder begins where its probe ends. AdamW, half a cosine after a
short warm-up, light views (crops of at least 80 % of the area, small turns, grey levels). Ten times the macro AUROC on
the validation images is looked at; the best state is kept, of equal ones the later. Steps, images and views are the
same for every encoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from otcxr.attribution import ProbedEncoder
from otcxr.console import Progress
from otcxr.data.dataset import ImageDataset, PixelCache
from otcxr.data.records import Record
from otcxr.data.view_spec import GreyImage, ViewsConfig, draw_views, view_generator
from otcxr.data.views import carry_out
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.labelled import Part
from otcxr.evaluation.metrics import auroc
from otcxr.optim import cosine_schedule, make_optimizer, set_learning_rate

__all__ = ["FinetuneConfig", "Finetuned", "finetune", "masked_cross_entropy", "predict_logits"]

_LOOKS = 10  # at the validation images
_WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class FinetuneConfig:
    """How an encoder is fine-tuned.

    Attributes:
        steps: Optimizer steps; 0 takes 20 passes over the labelled images, but at least 300.
        batch_size: Images a step; fewer where fewer are labelled.
        learning_rate: Peak, of encoder and head.
        weight_decay: Of matrices.
    """

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 2 or not self.learning_rate > 0 or self.weight_decay < 0:
            raise ConfigError(
                "finetune.steps and weight_decay must be >= 0, batch_size >= 2 and learning_rate > 0, received "
                f"{self.steps}, {self.weight_decay}, {self.batch_size}, {self.learning_rate}"
            )


class Finetuned(NamedTuple):
    """Result of fine-tuning.

    Attributes:
        model: The best state, in evaluation mode.
        step: Of which it is; the last one where validation could not tell.
        history: (step, macro AUROC on validation images or None).
    """

    model: ProbedEncoder
    step: int
    history: tuple[tuple[int, float | None], ...]


class _Views(Dataset[tuple[Tensor, Tensor]]):
    """Light views of whole images: what evaluation sees, a little changed. Item (round, index) depends on the seed."""

    def __init__(self, part: Part, size: int, pixels: PixelCache, seed: int) -> None:
        self._images, self._labels, self._seed = ImageDataset(part.records, size, pixels), part.labels, seed
        self._views = ViewsConfig(
            size=size, scale=(0.8, 1.0), aspect=(0.9, 1.1), rotation=7.0, window=0.25, gamma=(0.8, 1.25),
            contrast=(0.8, 1.2), brightness=0.05, blur=0.0, noise=0.01,
        )  # fmt: skip

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        turn, index = item
        pixels = (self._images[index][0].numpy() * 255).round().astype(np.uint8)
        drawn = draw_views(pixels.shape, None, self._views, view_generator(self._seed, turn, index))
        view = carry_out(GreyImage(pixels, None), drawn[:1]).views[0][0]
        return view, torch.from_numpy(self._labels[index]).float()


def finetune(
    start: ProbedEncoder,
    fit: Part,
    val: Part,
    config: FinetuneConfig,
    *,
    size: int,
    pixels: PixelCache,
    seed: int,
    progress: Progress,
    title: str = "fine-tuning",
) -> Finetuned:
    """Fine-tune a copy of a probed encoder.

    Args:
        start: Encoder and linear probe; not changed.
        fit: Labelled images.
        val: Images on which the step is chosen.
        config: Settings.
        size: Side in pixels to which images are reduced.
        pixels: Decoded images.
        seed: Of the order of images and of their views.
        progress, title: Where to show progress, and under what name.
    Raises: DataError: fewer than two labelled images.
    """
    if len(fit.records) < 2:
        raise DataError(f"fine-tuning needs at least two labelled images, received {len(fit.records)}; take a larger "
                        "share of the labels")  # fmt: skip
    device = next(start.parameters()).device
    model = copy.deepcopy(start).requires_grad_(True)
    batch = min(config.batch_size, len(fit.records))
    steps = config.steps or max(300, 20 * len(fit.records) // batch)
    optimizer = make_optimizer(model, "adamw", learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    views = _Views(fit, size, pixels, seed)
    looks = {round(steps * (k + 1) / _LOOKS) for k in range(_LOOKS)}
    best, history = (0, -1.0, {k: v.clone() for k, v in model.state_dict().items()}), []
    with progress.bar(title, steps, "steps") as bar:
        for step, chosen in enumerate(_order(len(fit.records), batch, steps, seed)):
            set_learning_rate(optimizer, config.learning_rate, cosine_schedule(step, int(_WARMUP * steps), steps))
            images, labels = (torch.stack(parts) for parts in zip(*(views[item] for item in chosen), strict=True))
            model.train()
            loss = masked_cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if step + 1 in looks:
                score = _macro(model, val, size, pixels)
                history.append((step + 1, score))
                if score is None or score >= best[1]:
                    best = (step + 1, -1.0 if score is None else score,
                            {k: v.detach().clone() for k, v in model.state_dict().items()})  # fmt: skip
            bar(step + 1, f"loss {float(loss.detach()):.3f}")
    model.load_state_dict(best[2])
    return Finetuned(model.requires_grad_(False).eval(), best[0], tuple(history))


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy (B, F) over what is assessed (labels not NaN); 0 where nothing is."""
    known = ~labels.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp_min(1)


@torch.no_grad()
def predict_logits(
    model: nn.Module, records: list[Record], size: int, pixels: PixelCache, batch_size: int = 64
) -> NDArray[np.float64]:
    """Logits (N, F) of whole images, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    loader = DataLoader(ImageDataset(records, size, pixels), batch_size=batch_size)
    return np.concatenate([model(images.to(device)).double().cpu().numpy() for images in loader])


def _order(images: int, batch: int, steps: int, seed: int) -> list[list[tuple[int, int]]]:
    """(round, index) of every step: each image once before any comes again."""
    rng = np.random.default_rng((seed, 2**20))
    out: list[list[tuple[int, int]]] = []
    waiting: list[tuple[int, int]] = []
    turn = 0
    while len(out) < steps:
        if len(waiting) < batch:
            waiting += [(turn, index) for index in rng.permutation(images).tolist()]
            turn += 1
        out.append(waiting[:batch])
        waiting = waiting[batch:]
    return out


def _macro(model: nn.Module, part: Part, size: int, pixels: PixelCache) -> float | None:
    """Mean AUROC over findings that have at least three positive and three negative images; None without any."""
    scores = predict_logits(model, part.records, size, pixels)
    values = [
        auroc(part.labels[:, f], scores[:, f])
        for f in range(scores.shape[1])
        if min((part.labels[:, f] == y).sum() for y in (0, 1)) >= 3
    ]
    return float(np.mean(values)) if values else None
