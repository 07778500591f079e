"""Networks: shapes, torchvision's names, files that come back, attention against loops."""

from __future__ import annotations

import json
from math import ceil

import numpy as np
import pytest
import torch
from torch import nn

from oracles import attention_by_loops
from otcxr.errors import CheckpointError, ConfigError
from otcxr.nn.attention import CrossViewAttention
from otcxr.nn.encoder import ENCODERS, build_encoder, load_encoder, load_state, pool
from otcxr.nn.heads import ProjectionHead, TokenProjector
from otcxr.runs import Run

torch.set_num_threads(1)


def seeded(build, seed=0):
    """Build a module from a seed without touching the global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- the encoder -----------------------------------------------------------------------------------------------------

CHANNELS = {
    "resnet18": (8, 8, 16, 32, 64),
    "resnet34": (8, 8, 16, 32, 64),
    "resnet50": (8, 32, 64, 128, 256),
}


def test_every_encoder_is_covered_here():
    assert set(CHANNELS) == set(ENCODERS)


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("size", [(96, 96), (224, 224), (65, 97), (33, 64)])
@torch.no_grad()
def test_maps_have_the_announced_shapes(name, stride, size):
    encoder = build_encoder(name, width=8, stride=stride, seed=0).eval()
    assert encoder.channels == CHANNELS[name]
    assert encoder.strides == (2, 4, 8, 16, stride)
    maps = encoder(images(2, 1, *size))
    assert [tuple(m.shape) for m in maps] == [
        (2, c, ceil(size[0] / s), ceil(size[1] / s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    assert all(m.isfinite().all() for m in maps)
    torch.testing.assert_close(pool(maps), maps[-1].flatten(2).mean(-1))


@pytest.mark.parametrize("name", CHANNELS)
def test_stride_changes_the_map_not_the_weights(name):
    fine, coarse = (build_encoder(name, width=8, stride=s, seed=0).state_dict() for s in (16, 32))
    assert list(fine) == list(coarse)
    assert all(torch.equal(fine[k], coarse[k]) for k in fine)


@pytest.mark.parametrize("name", CHANNELS)
@torch.no_grad()
def test_padding_changes_the_border_not_the_weights(name):
    zeros, replicate = (
        build_encoder(name, width=8, stride=16, padding=p, seed=0).eval() for p in ("zeros", "replicate")
    )
    mine, other = zeros.state_dict(), replicate.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert [m.shape for m in zeros(images(1, 1, 65, 97))] == [m.shape for m in replicate(images(1, 1, 65, 97))]
    flat = torch.full((1, 1, 96, 96), 0.8)  # where nothing is to be seen, no position may know where it is
    for with_zeros, without in zip(zeros(flat), replicate(flat), strict=True):
        assert with_zeros.std((-2, -1)).max() > 1e-2 * with_zeros.abs().max()
        torch.testing.assert_close(without, without[..., :1, :1].expand_as(without), rtol=1e-4, atol=1e-4)


def torchvision_names(blocks, convolutions):
    """Names in torchvision's order, written down from its files; without ``fc``."""

    def norm(prefix):
        return [f"{prefix}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["conv1.weight", *norm("bn1")]
    for layer, count in enumerate(blocks, start=1):
        for block in range(count):
            here = f"layer{layer}.{block}"
            for i in range(1, convolutions + 1):
                names += [f"{here}.conv{i}.weight", *norm(f"{here}.bn{i}")]
            if block == 0 and (layer > 1 or convolutions == 3):
                names += [f"{here}.downsample.0.weight", *norm(f"{here}.downsample.1")]
    return names


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions", "parameters"),
    [
        ("resnet18", (2, 2, 2, 2), 2, 11_176_512),
        ("resnet34", (3, 4, 6, 3), 2, 21_284_672),
        ("resnet50", (3, 4, 6, 3), 3, 23_508_032),
    ],
)
def test_names_and_sizes_are_those_of_torchvision(name, blocks, convolutions, parameters):
    with torch.device("meta"):
        encoder = build_encoder(name, in_channels=3)
    state = encoder.state_dict()
    assert list(state) == torchvision_names(blocks, convolutions)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    expansion = 1 if convolutions == 2 else 4
    assert state["layer4.1.conv1.weight"].shape[:2] == (512, 512 * expansion)
    assert state["layer3.0.downsample.0.weight"].shape == (256 * expansion, 128 * expansion, 1, 1)
    if convolutions == 3:
        assert encoder.layer2[0].conv1.stride == (1, 1)
        assert encoder.layer2[0].conv2.stride == (2, 2)  # v1.5, as torchvision


@torch.no_grad()
def test_a_block_computes_the_residual_sum():
    """The last stage of a small network, written out."""
    encoder = build_encoder("resnet18", width=4, seed=1).eval()
    maps = encoder(images(2, 1, 64, 64))
    x = maps[3]
    for block in encoder.layer4:
        skip = x if block.downsample is None else block.downsample(x)
        x = (block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + skip).relu()
    torch.testing.assert_close(maps[4], x)
    stem = encoder.bn1(nn.functional.conv2d((images(2, 1, 64, 64) - 0.5) / 0.25, encoder.conv1.weight, None, 2, 3))
    torch.testing.assert_close(maps[0], stem.relu())


def test_seed_fixes_the_weights_and_leaves_the_global_state():
    before = torch.get_rng_state()
    first, again, other = (build_encoder("resnet18", width=4, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["layer2.1.conv1.weight"], other["layer2.1.conv1.weight"])


def test_without_a_seed_the_global_state_decides():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first, second = (build_encoder("resnet18", width=4).conv1.weight for _ in range(2))
        torch.manual_seed(7)
        again = build_encoder("resnet18", width=4).conv1.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "unknown encoder 'resnet81'; did you mean 'resnet18'"),
        ({"name": "vit"}, "unknown encoder 'vit'; known: resnet18, resnet34, resnet50"),
        ({"name": "resnet18", "stride": 8}, "encoder.stride must be 16 or 32, received 8"),
        ({"name": "resnet18", "width": 3}, "encoder.width must be >= 4 .* received 3 and 1"),
        ({"name": "resnet18", "padding": "reflect"}, "encoder.padding must be zeros or replicate, received 'reflect'"),
        ({"name": "resnet18", "in_channels": 0}, "in_channels >= 1, received 64 and 0"),
    ],
)
def test_encoders_that_cannot_be_built(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder(**arguments)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    encoder = build_encoder("resnet18", in_channels=2, width=4, stride=16, seed=5)
    encoder.train()(images(4, 2, 32, 32))  # running statistics of their own
    method = nn.ModuleDict({"encoder": encoder, "head": seeded(lambda: nn.Linear(3, 2))})
    run = Run(tmp_path / "run")
    run.write_weights(method, encoder, {"epoch": 3})
    return run.path, encoder


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@torch.no_grad()
def test_an_encoder_comes_back_from_its_run(saved):
    path, encoder = saved
    x = images(3, 2, 48, 48, seed=1)
    expected = encoder.eval()(x)
    for place in (path, str(path), path / "encoder.safetensors"):
        loaded = load_encoder(place)
        assert loaded.architecture == encoder.architecture
        assert not loaded.training
        assert all(torch.equal(p, q) for p, q in zip(loaded(x), expected, strict=True))
    facts = json.loads((path / "encoder.json").read_text())
    assert facts["channels"] == list(encoder.channels)
    assert facts["strides"] == list(encoder.strides)
    assert facts["epoch"] == 3


@pytest.mark.parametrize("name", ["encoder.safetensors", "encoder.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing in ") as error:
        load_encoder(saved[0])
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 8}, r"'conv1.weight' has shape \(4, 2, 7, 7\), this network needs \(8, 2, 7, 7\)"),
        ({"in_channels": 1}, r"'conv1.weight' has shape"),
        ({"name": "resnet34"}, "lacks 'layer1.2.conv1.weight'"),
        ({"name": "resnet7"}, "unknown encoder 'resnet7'"),
        ({"stride": 5}, "stride"),
        ({"width": "wide"}, "cannot be read"),
        ({"depth": 3}, "cannot be read"),
    ],
)
def test_a_description_of_another_network_is_refused(saved, change, message):
    file = saved[0] / "encoder.json"
    facts = json.loads(file.read_text())
    facts["architecture"] |= change
    file.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=message) as error:
        load_encoder(saved[0])
    one_line(error)


@pytest.mark.parametrize("name", ["encoder.safetensors", "encoder.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "binary", "list", "number"])
def test_a_damaged_file_is_refused_in_one_line(saved, name, damage):
    file = saved[0] / name
    whole = file.read_bytes()
    file.write_bytes(
        {"half": whole[: len(whole) // 2], "empty": b"", "binary": b"\xff\xfe\x80" * 9, "list": b"[]", "number": b"7"}[
            damage
        ]
    )
    with pytest.raises(CheckpointError) as error:
        load_encoder(saved[0])
    one_line(error)


def test_load_state_names_the_first_difference():
    small, large = seeded(lambda: nn.Linear(2, 2)), seeded(lambda: nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"here lacks '0\.weight'"):
        load_state(large, small.state_dict(), "here")
    with pytest.raises(CheckpointError, match="here has 'more', which this network lacks"):
        load_state(small, {**small.state_dict(), "more": torch.zeros(1)}, "here")
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'bias' has shape \(3,\), this network needs \(2,\)"):
        load_state(small, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, "here")
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())  # nothing is loaded by halves


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture
def attention():
    """Double precision, with norm weights that are not the identity."""
    module = seeded(lambda: CrossViewAttention(12, heads=3)).double()
    with torch.no_grad():
        module.norm.weight.copy_(normal(12, seed=1) + 1)
        module.norm.bias.copy_(normal(12, seed=2))
    return module


VALID = torch.tensor([[True] * 7, [True, False, True, True, False, True, False], [False] * 6 + [True]])


@torch.no_grad()
def test_attention_equals_the_loops(attention):
    query, other = normal(3, 5, 12, seed=3, dtype=torch.float64), normal(3, 7, 12, seed=4, dtype=torch.float64)
    infused, weights = attention(query, other, VALID)
    assert weights.shape == (3, 3, 5, 7)
    q = attention.query(attention.norm(query)).numpy()
    k, v = (x.numpy() for x in attention.key_value(attention.norm(other)).chunk(2, dim=-1))
    for image in range(3):
        parts = []
        for head in range(3):
            d = slice(4 * head, 4 * head + 4)
            mixed, expected = attention_by_loops(q[image][:, d], k[image][:, d], v[image][:, d], VALID[image].numpy())
            np.testing.assert_allclose(weights[image, head].numpy(), expected, atol=1e-12)
            parts.append(mixed)
        out = np.concatenate(parts, 1) @ attention.out.weight.numpy().T + attention.out.bias.numpy()
        np.testing.assert_allclose(infused[image].numpy(), out, atol=1e-11)


@torch.no_grad()
def test_attention_equals_that_of_torch(attention):
    query, other = normal(3, 5, 12, seed=3, dtype=torch.float64), normal(3, 7, 12, seed=4, dtype=torch.float64)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.copy_(torch.cat((attention.query.weight, attention.key_value.weight)))
    theirs.in_proj_bias.copy_(torch.cat((attention.query.bias, attention.key_value.bias)))
    theirs.out_proj.weight.copy_(attention.out.weight)
    theirs.out_proj.bias.copy_(attention.out.bias)
    q, kv = attention.norm(query), attention.norm(other)
    expected = theirs(q, kv, kv, key_padding_mask=~VALID, average_attn_weights=False)
    for got, right in zip(attention(query, other, VALID), expected, strict=True):
        torch.testing.assert_close(got, right, atol=1e-12, rtol=0)


def test_attention_looks_at_valid_tokens_only(attention):
    query, other = normal(3, 5, 12, seed=5, dtype=torch.float64), normal(3, 7, 12, seed=6, dtype=torch.float64)
    changed = torch.where(VALID.unsqueeze(-1), other, 1e3).requires_grad_()
    infused, weights = attention(query, other, VALID)
    same, same_weights = attention(query, changed, VALID)
    assert (weights[~VALID[:, None, None, :].expand_as(weights)] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 5, dtype=torch.float64))
    assert torch.equal(infused, same)
    assert torch.equal(weights, same_weights)
    same.square().sum().backward()
    assert (changed.grad[~VALID] == 0).all()
    assert changed.grad[VALID].abs().max() > 0


@torch.no_grad()
def test_attention_has_no_order_of_tokens(attention):
    query, other = normal(3, 5, 12, seed=7, dtype=torch.float64), normal(3, 7, 12, seed=8, dtype=torch.float64)
    rows, columns = [2, 4, 0, 1, 3], [6, 5, 0, 1, 2, 4, 3]
    infused, weights = attention(query, other, VALID)
    moved, moved_weights = attention(query[:, rows], other[:, columns], VALID[:, columns])
    torch.testing.assert_close(moved, infused[:, rows])
    torch.testing.assert_close(moved_weights, weights[:, :, rows][..., columns])


def test_attention_is_one_layer_for_both_directions(attention):
    assert {name.split(".")[0] for name, _ in attention.named_parameters()} == {"norm", "query", "key_value", "out"}
    x, everywhere = normal(2, 4, 12, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    (one, _), (two, _) = attention(x, x.clone(), everywhere), attention(x.clone(), x, everywhere)
    assert torch.equal(one, two)


@torch.no_grad()
def test_attention_weights_are_single_precision_under_autocast():
    module = seeded(lambda: CrossViewAttention(16, heads=2))
    query, other, valid = normal(2, 5, 16), normal(2, 6, 16, seed=1), torch.ones(2, 6, dtype=torch.bool)
    infused, weights = module(query, other, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_weights = module(query, other, valid)
    assert rough_weights.dtype == torch.float32
    torch.testing.assert_close(rough_weights.sum(-1), torch.ones(2, 2, 5))
    torch.testing.assert_close(rough_weights, weights, atol=0.02, rtol=0.1)
    torch.testing.assert_close(rough.float(), infused, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("heads", [5, 0, -4, 24])
def test_heads_that_do_not_divide_the_channels(heads):
    with pytest.raises(ConfigError, match=rf"method.heads = {heads} does not divide the 12 channels.*\[1, 2, 4\]"):
        CrossViewAttention(12, heads=heads)


# --- heads -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_are_projected_one_by_one():
    projector = seeded(lambda: TokenProjector(6, 10, 4)).double().train()
    tokens = normal(3, 5, 6, dtype=torch.float64)
    out = projector(tokens)
    assert out.shape == (3, 5, 4)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(projector(tokens[i : i + 1, j : j + 1])[0, 0], out[i, j])
    changed = tokens.clone()
    changed[1, 2] = 1e3
    rest = torch.ones(3, 5, dtype=torch.bool)
    rest[1, 2] = False
    assert torch.equal(projector(changed)[rest], out[rest])
    assert not torch.equal(projector(changed)[1, 2], out[1, 2])


def test_projection_head():
    simclr, vicreg = (seeded(lambda norm=norm: ProjectionHead(6, 10, 4, final_norm=norm)) for norm in (True, False))
    assert [type(m).__name__ for m in simclr] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in vicreg] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [m.bias is not None for m in simclr if isinstance(m, nn.Linear)] == [False, False]
    assert [m.bias is not None for m in vicreg if isinstance(m, nn.Linear)] == [False, True]
    x = 5 * normal(32, 6) + 3
    out = simclr(x)
    assert out.shape == vicreg(x).shape == (32, 4)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("width", [4, 8, 12, 16])
def test_gradients_of_narrow_shortcuts_are_right_channels_last(width):
    """Where oneDNN's own gradient of a strided 1x1 convolution writes beyond its workspace, and where it does not."""
    encoder = build_encoder("resnet18", width=width, seed=0)
    shortcut = encoder.layer2[0].downsample
    assert [name for name, _ in shortcut.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    conv = shortcut[0].to(memory_format=torch.channels_last)
    for side in (8, 9, 16):
        x = torch.randn(4, width, side, side).to(memory_format=torch.channels_last).requires_grad_()
        y = conv(x)
        g = torch.randn_like(y)
        conv.weight.grad = None
        y.backward(g)
        taken = x.detach()[..., ::2, ::2].double()
        expected = torch.einsum("bohw,bihw->oi", g.double(), taken)
        torch.testing.assert_close(conv.weight.grad.double()[..., 0, 0], expected,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
        expected = torch.zeros_like(x, dtype=torch.float64)
        expected[..., ::2, ::2] = torch.einsum("bohw,oi->bihw", g.double(), conv.weight.detach().double()[..., 0, 0])
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)
