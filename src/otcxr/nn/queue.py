"""A queue of earlier embeddings, for contrast with more images than a batch holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["KeyQueue", "queue_length"]


class KeyQueue(nn.Module):
    """The last embeddings of a momentum copy, (length, d), each of length 1; random ones at the start.

    What is held during a step is not negative to itself: ``hold`` keeps it aside, and ``advance``, after the step of
    the optimizer, writes it over the oldest. So a step that was accumulated in parts changes the queue once, and a
    checkpoint between two steps is complete.

    Args:
        length: Number of embeddings. It need not be a multiple of the batch: the queue wraps around.
        outputs: d.
    Source: He et al., CVPR 2020 (MoCo), arXiv:1911.05722, section 3.1.
    """

    vectors: Tensor
    place: Tensor

    def __init__(self, length: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("vectors", nn.functional.normalize(torch.randn(length, outputs), dim=-1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self._held: list[Tensor] = []

    @torch.no_grad()
    def hold(self, keys: Tensor) -> None:
        """Keep aside the keys (N, d) of this step, those of all processes, in training only."""
        if self.training:
            self._held.append(nn.functional.normalize(keys.detach().to(self.vectors.dtype), dim=-1))

    @torch.no_grad()
    def advance(self) -> None:
        """Write what is held over the oldest embeddings; of more keys than the queue is long, the last ones."""
        if not self._held:
            return
        keys = torch.cat(self._held)
        self._held.clear()
        length = len(self.vectors)
        first = int(self.place) + len(keys)  # where the next key will go
        keys = keys[-length:]
        at = torch.arange(first - len(keys), first, device=keys.device) % length
        self.vectors[at] = keys
        self.place.fill_(first % length)


def queue_length(most: int, images: int) -> int:
    """Length of a queue for so many images: ``most``, or where that is too long the largest power of two of at most a
    quarter of the images, but not below 16.

    A queue that is long for the data holds the images of the batch themselves, as they were an epoch ago, and calls
    them negatives.

    Args:
        most: The length that is asked for.
        images: Images of an epoch.
    """
    quarter = max(16, images // 4)
    return int(min(most, 2 ** (quarter.bit_length() - 1)))
