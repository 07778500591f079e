"""Losses whose value is known on paper: two images or tokens that have nothing in common, and nothing learned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from otcxr.data.geometry import ViewBatch
from otcxr.methods.contrastive_ot import ContrastiveOT, ContrastiveOTSettings
from otcxr.methods.otcxr import OTCXR, OTCXRSettings
from otcxr.methods.pcrlv2 import PCRLv2, PCRLv2Settings
from otcxr.nn.encoder import Architecture, Encoder, build_encoder

ROOT = Path(__file__).parent.parent


class Says(Encoder):
    """An encoder whose last map is the image itself, pixel by pixel, in channels."""

    def __init__(self, channels):
        super().__init__()
        self.architecture, self.channels, self.strides = Architecture("says", channels, 4, 16), (channels,), (1,)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return (self.scale * images,)


def batch_of(*maps):
    """Views (B, C, h, w) that ``Says`` gives back."""
    valid = tuple(torch.ones(len(m), 1, *m.shape[2:], dtype=torch.bool) for m in maps)
    return ViewBatch(maps, torch.eye(3)[:2].expand(len(maps), len(maps[0]), 2, 3).clone(), valid)


def transport_of_two(cost, epsilon):
    """Entropic value of two points each, mass 1/2, costs 0 to itself and ``cost`` to the other.

    By symmetry P = exp((s - C) / epsilon) / 4; that P sums to 1 gives s, and s is the value.
    """
    return epsilon * math.log(2 / (1 + math.exp(-cost / epsilon)))


PLAIN = OTCXRSettings(
    mass="uniform", infuse=False, overlap_weight=0.0, place=0.0, centred_cost=False, alpha=3.0, beta=0.0, eta=0.0,
    global_weight=0.0,
    variance_rows=(), epsilon=0.5, tolerance=1e-7, max_iterations=5000,
)  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_otcxr_of_two_orthogonal_tokens(epsilon):
    method = OTCXR(Says(2), replace(PLAIN, epsilon=epsilon))
    method.projector = nn.Identity()
    tokens = torch.eye(2).reshape(1, 2, 1, 2)  # channel k is 1 at position k
    out = method(batch_of(tokens, tokens))
    assert float(out.terms["transport"]) == pytest.approx(transport_of_two(1.0, epsilon), abs=1e-6)
    assert float(out.loss.detach()) == pytest.approx(3 * transport_of_two(1.0, epsilon), abs=3e-6)
    assert float(out.terms["transport_chance"]) == pytest.approx(0.5)


def test_otcxr_of_swapped_tokens_costs_no_more():
    """Transport asks what is there, not where."""
    method = OTCXR(Says(2), PLAIN)
    method.projector = nn.Identity()
    tokens = torch.eye(2).reshape(1, 2, 1, 2)
    same, swapped = (method(batch_of(tokens, other)).loss.detach() for other in (tokens, tokens.flip(-1)))
    assert float(swapped) == pytest.approx(float(same), abs=1e-6)
    pixelwise = OTCXR(Says(2), replace(PLAIN, pairing="same-cell"))
    pixelwise.projector = nn.Identity()
    assert float(pixelwise(batch_of(tokens, tokens)).loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(pixelwise(batch_of(tokens, tokens.flip(-1))).loss.detach()) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_contrastive_ot_of_two_images(length):
    """Logits (a, 0) and (0, a): NT-Xent ln(1 + 2 exp(-1 / t)), probits at 1 - 2 e^a / (e^2a + 1) of each other."""
    settings = ContrastiveOTSettings(temperature=0.5, epsilon=0.3, tolerance=1e-7, max_iterations=5000, outputs=2)
    method = ContrastiveOT(Says(2), settings)
    method.head = nn.Identity()
    images = (length * torch.eye(2)).reshape(2, 2, 1, 1)
    out = method.train()(batch_of(images, images))
    contrastive = math.log(1 + 2 * math.exp(-1 / 0.5))
    cost = 1 - 2 * math.exp(length) / (math.exp(2 * length) + 1)
    transport = transport_of_two(cost, 0.3)
    assert float(out.terms["contrastive"]) == pytest.approx(contrastive, rel=1e-6)
    assert float(out.terms["transport"]) == pytest.approx(transport, rel=1e-4)
    # the weight makes both terms equal in the first step
    assert float(out.loss.detach()) == pytest.approx(2 * contrastive, rel=1e-4)


def pcrlv2_agreement(first, second):
    method = PCRLv2(build_encoder("resnet18", width=4, stride=16, seed=0), PCRLv2Settings()).train()
    for scale in method.scales:
        scale.norm, scale.predictor = nn.Identity(), nn.Identity()
    maps = [[x.reshape(*x.shape, 1, 1)] * 5 for x in (first, second)]
    return float(method._agreement(maps, [(0, 1, 3)])[0].detach())


def test_pcrlv2_agreement_of_equal_opposite_and_unrelated_views():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert pcrlv2_agreement(x, x) == pytest.approx(-1.0, abs=1e-6)
    assert pcrlv2_agreement(x, -x) == pytest.approx(1.0, abs=1e-6)
    many = [torch.randn(4000, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert abs(pcrlv2_agreement(*many)) < 0.01  # its chance level


def test_the_literal_configuration_says_what_its_text_says():
    """Learned masses by a head, infused, sharp transport, variance over all tokens, and no more."""
    settings = yaml.safe_load((ROOT / "configs" / "otcxr-paper.yaml").read_text())["method"]
    literal = OTCXRSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "name"})
    assert (literal.mass, literal.mass_gradient, literal.infuse) == ("score", True, True)
    assert (literal.objective, literal.reach, literal.centred_cost) == ("sharp", None, False)
    assert (literal.variance_rows, literal.global_weight, literal.mass_weight) == (("tokens",), 0.0, 0.0)
    assert (literal.alpha, literal.beta, literal.eta) == (25.0, 25.0, 1.0)
    assert (literal.pairing, literal.place, literal.overlap_weight) == ("transport", 0.0, 0.0)
