"""Views: their geometry is exact, what is not picture is never valid, and nothing but the seed decides them."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.data.geometry import apply_affine, correspondence, invert_affine, token_centres, token_valid
from otcxr.data.records import Radiograph
from otcxr.data.view_spec import GreyImage, draw_views, grey_image, noise_field, resampling
from otcxr.data.views import ViewsConfig, carry_out, collate_views, make_views, view_generator
from otcxr.data.views_host import resample
from otcxr.errors import ConfigError

NEUTRAL = {"gamma": (1.0, 1.0), "contrast": (1.0, 1.0), "brightness": 0.0, "blur": 0.0, "noise": 0.0, "window": 0.0}
WHOLE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
STEP = 1 / 255  # of 8-bit pixels


def affine_of(*numbers):
    """Six numbers, row by row, as the (2, 3) that the geometry holds."""
    return torch.tensor(numbers, dtype=torch.float32).view(2, 3)


def whole(pixels, affine, size, valid=None):
    """A view before its intensities change, from pixels in [0, 1]."""
    sampled, inside = resample(GreyImage(np.round(np.asarray(pixels) * 255).astype(np.uint8), valid), affine, size)
    return sampled / 255, inside


def radiograph(pixels, valid=None):
    image = torch.from_numpy(np.asarray(pixels, dtype=np.float32))[None]
    mask = torch.ones_like(image, dtype=torch.bool) if valid is None else torch.from_numpy(valid)[None]
    return Radiograph(image, mask, None)


def picture(height, width, seed=0):
    """Smooth noise between 0.2 and 0.9."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.random.default_rng(seed).uniform(0.05, 0.3, (6, 3))
    total = sum(np.sin(a * x + b * y + 20 * c) for a, b, c in waves)
    return (0.55 + 0.35 * total / np.abs(total).max()).astype(np.float32)


def blob(height, width, x, y, sigma):
    """A Gaussian about (x, y), in pixels whose centres lie at i + 0.5."""
    row, column = np.mgrid[0:height, 0:width] + 0.5
    return np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2)).astype(np.float32)


def source_of_pixels(affine, size):
    """Positions (size, size, 2) of the centres of a view's pixels in the image, in [0, 1], by a loop of formulas."""
    out = np.empty((size, size, 2))
    for row in range(size):
        for column in range(size):
            p = np.array([(column + 0.5) / size, (row + 0.5) / size, 1.0])
            out[row, column] = affine @ p
    return out


# ----------------------------------------------------------------------------------------------------- determinism


def test_views_depend_on_seed_epoch_and_index_only():
    image = radiograph(picture(50, 60))
    config = ViewsConfig(size=32)
    seen = {}
    for seed, epoch, index in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32 - 2), (2**40, 0, 0)]:
        first = make_views(image, config, view_generator(seed, epoch, index))
        np.random.default_rng().random()  # what happens in between is of no consequence
        again = make_views(image, config, view_generator(seed, epoch, index))
        tensors = [(*batch.views, *batch.valid, batch.geometry) for batch in (first, again)]
        for a, b in zip(*tensors, strict=True):
            assert torch.equal(a, b)
        seen[first.geometry.numpy().tobytes()] = first
        assert not torch.equal(first.geometry[0], first.geometry[1])
    assert len(seen) == 6


def test_views_leave_the_global_generators_alone():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    make_views(radiograph(picture(50, 60)), ViewsConfig(size=32), view_generator(0, 0, 0))
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_intensity_settings_do_not_move_the_geometry_of_the_first_view():
    image = radiograph(picture(50, 60))
    a = make_views(image, ViewsConfig(size=32), view_generator(3, 1, 4), count=1)
    b = make_views(image, ViewsConfig(size=32, **NEUTRAL), view_generator(3, 1, 4), count=1)
    assert torch.equal(a.geometry, b.geometry)
    assert not torch.equal(a.views[0], b.views[0])


def test_shapes_types_and_collation():
    config = ViewsConfig(size=24, clean=True)
    samples = [make_views(radiograph(picture(40, 30, i)), config, view_generator(0, 0, i), count=3) for i in range(4)]
    batch = collate_views(samples)
    assert batch.geometry.shape == (3, 4, 2, 3)
    assert batch.geometry.dtype == torch.float32
    assert len(batch.views) == len(batch.valid) == len(batch.clean) == 3
    for views, valid, clean in zip(batch.views, batch.valid, batch.clean, strict=True):
        assert views.shape == valid.shape == clean.shape == (4, 1, 24, 24)
        assert views.dtype == clean.dtype == torch.float32
        assert valid.dtype == torch.bool
    for i, sample in enumerate(samples):
        for v in range(3):
            assert torch.equal(batch.views[v][i], sample.views[v][0])
            assert torch.equal(batch.valid[v][i], sample.valid[v][0])
            assert torch.equal(batch.clean[v][i], sample.clean[v][0])
            assert torch.equal(batch.geometry[v, i], sample.geometry[v, 0])
    plain = make_views(radiograph(picture(40, 30)), ViewsConfig(size=24), view_generator(0, 0, 0))
    assert plain.clean is None
    assert collate_views([plain, plain]).clean is None


# -------------------------------------------------------------------------------------------------------- geometry


def test_whole_image_reproduces_it():
    """All 8 bits of it, upright, mirrored and turned."""
    for height, width in ((64, 64), (48, 48)):
        pixels = np.round(picture(height, width) * 255).astype(np.uint8)
        config = ViewsConfig(size=height, scale=(1.0, 1.0), aspect=(1.0, 1.0), rotation=0, **NEUTRAL)
        batch = make_views(radiograph(pixels / np.float32(255)), config, view_generator(0, 0, 0))
        for view, valid, geometry in zip(batch.views, batch.valid, batch.geometry, strict=True):
            assert (view[0, 0] * 255 - torch.from_numpy(pixels)).abs().max() < 1e-4
            assert valid.all()
            assert (geometry[0] - affine_of(*WHOLE)).abs().max() < 1e-6
    image = GreyImage(pixels, None)
    for affine, expected in (
        (WHOLE, pixels),
        ((-1.0, 0, 1, 0, 1, 0), pixels[:, ::-1]),
        ((0.0, -1, 1, 1, 0, 0), np.rot90(pixels, 1)),
    ):
        sampled, inside = resample(image, affine, 48)
        assert np.array_equal(sampled, expected)
        assert inside.all()


def test_crop_reproduces_its_pixels():
    pixels = np.round(picture(64, 96) * 255).astype(np.uint8)
    sampled, inside = resample(GreyImage(pixels, None), (32 / 96, 0, 8 / 96, 0, 32 / 64, 20 / 64), 32)
    assert np.array_equal(sampled, pixels[20:52, 8:40])
    assert inside.all()


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight():
    levels = np.arange(0, 65536, 7).astype(np.float32) / 65535
    grey = grey_image(radiograph(levels[None]))
    assert grey.valid is None
    error = grey.pixels[0] / 255 - levels
    assert np.abs(error).max() <= 0.5 / 255 + 1e-6
    assert np.sqrt((error**2).mean()) == pytest.approx(0.0011, abs=5e-5)  # as the docstring says
    exact = np.arange(256, dtype=np.float32) / 255
    assert np.array_equal(grey_image(radiograph(exact[None])).pixels[0], np.arange(256))


@given(
    scale=st.floats(0.1, 1.0), aspect=st.floats(0.5, 2.0), rotation=st.floats(0, 30), index=st.integers(0, 1000),
    shape=st.sampled_from([(40, 40), (30, 55), (55, 30)]), size=st.sampled_from([16, 33]),
    flip=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_valid_is_exactly_where_the_centre_lies_inside(scale, aspect, rotation, index, shape, size, flip):
    config = ViewsConfig(
        size=size, scale=(scale, scale), aspect=(aspect, aspect), rotation=rotation, flip=flip, **NEUTRAL
    )
    batch = make_views(radiograph(picture(*shape)), config, view_generator(0, 0, index))
    for view, valid, geometry in zip(batch.views, batch.valid, batch.geometry, strict=True):
        place = source_of_pixels(geometry[0].double().numpy(), size)
        inside = ((place >= 0) & (place <= 1)).all(-1)
        clear = (np.abs(place) > 1e-5).all(-1) & (np.abs(place - 1) > 1e-5).all(-1)
        assert np.array_equal(valid[0, 0].numpy()[clear], inside[clear])
        assert (view[~valid] == 0).all()
        assert (view[valid] > 0.1).all()  # the picture is brighter than that everywhere


@pytest.mark.parametrize("size", [24, 64, 100])
def test_pixels_that_are_not_valid_stay_so(size):
    """A view's pixel is valid only when everything it averages over is; wrong values mark what must never count."""
    height, width = 90, 120
    hole = np.ones((height, width), bool)
    hole[:12], hole[:, 100:], hole[40:50, 30:45] = False, False, False
    pixels = np.where(hole, 0.5, 1.0).astype(np.float32)
    config = ViewsConfig(size=size, scale=(0.3, 1.0), rotation=20, **NEUTRAL)
    for index in range(20):
        batch = make_views(radiograph(pixels, hole), config, view_generator(0, 0, index))
        for view, valid, geometry in zip(batch.views, batch.valid, batch.geometry, strict=True):
            assert (view[valid] - 128 * STEP).abs().max() < 1e-6  # nothing of the 1.0 leaks in
            assert (view[~valid] == 0).all()
            place = source_of_pixels(geometry[0].double().numpy(), size)
            row, column = np.floor(place[..., 1] * height), np.floor(place[..., 0] * width)
            within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column = row.clip(0, height - 1).astype(int), column.clip(0, width - 1).astype(int)
            allowed = within & hole[row, column]
            got = valid[0, 0].numpy()
            assert not (got & ~allowed).any()
            # and it is lost only near what is not valid: within a pixel of the view and one of the image
            reach = math.ceil(2 * max(height, width) / size) + 2
            far = np.ones_like(allowed)
            for dr in range(-reach, reach + 1, 1):
                for dc in (-reach, 0, reach):
                    far &= hole[(row + dr).clip(0, height - 1), (column + dc).clip(0, width - 1)]
                    far &= hole[(row + dc).clip(0, height - 1), (column + dr).clip(0, width - 1)]
            assert got[allowed & far].all()


def test_image_of_little_validity_is_shown_whole():
    valid = np.zeros((60, 60), bool)
    valid[:6, :6] = True
    config = ViewsConfig(size=30, scale=(0.3, 0.5), **NEUTRAL)
    batch = make_views(radiograph(picture(60, 60), valid), config, view_generator(0, 0, 0))
    for view_valid, geometry in zip(batch.valid, batch.geometry, strict=True):
        assert torch.equal(geometry[0], affine_of(*WHOLE))
        assert view_valid[0, 0, :2, :2].all()
        assert not view_valid[0, 0, 3:].any()


def test_crops_are_drawn_again_until_a_quarter_is_valid():
    valid = np.zeros((80, 80), bool)
    valid[:, :40] = True
    config = ViewsConfig(size=20, scale=(0.1, 0.2), **NEUTRAL)
    for index in range(40):
        batch = make_views(radiograph(picture(80, 80), valid), config, view_generator(0, 0, index))
        for mask, geometry in zip(batch.valid, batch.geometry, strict=True):
            # 24 x 24 points decide, and a pixel must be valid all over: so a little less than a quarter may come out
            assert mask.float().mean() >= 0.2 or torch.equal(geometry[0], affine_of(*WHOLE))


# ------------------------------------------------------------------------------------------------------- intensity


def test_range_and_clean_views():
    image = radiograph(picture(60, 60))
    strong = {"gamma": (0.5, 2.0), "contrast": (0.5, 1.5), "brightness": 0.2, "blur": 1.0, "noise": 0.05, "window": 1.0,
              "window_clip": 0.1}  # fmt: skip
    for index in range(20):
        batch = make_views(image, ViewsConfig(size=32, clean=True, **strong), view_generator(0, 0, index), count=1)
        view, valid, clean = batch.views[0], batch.valid[0], batch.clean[0]
        assert 0 <= view.min() <= view.max() <= 1
        assert view.isfinite().all()
        assert 0 <= clean.min() <= clean.max() <= 1
        assert (view[~valid] == 0).all()
        assert (clean[~valid] == 0).all()
        assert (view - clean).abs().max() > 0.01
        neutral = make_views(image, ViewsConfig(size=32, clean=True, **NEUTRAL), view_generator(0, 0, index), count=1)
        assert torch.equal(neutral.geometry, batch.geometry)
        assert torch.equal(neutral.clean[0], clean)
        assert (neutral.views[0] - clean).abs().max() < 1e-6


def only(**change):
    """One upright view of half the image with nothing but this change, and the view before it."""
    config = ViewsConfig(size=32, scale=(0.5, 0.5), aspect=(1, 1), rotation=0, clean=True, **(NEUTRAL | change))
    image = grey_image(radiograph(picture(60, 60)))
    (drawn,) = draw_views((60, 60), None, config, view_generator(0, 0, 0), count=1)
    batch = carry_out(image, [drawn], clean=True)
    assert batch.valid[0].all() or drawn.cutout[2]
    return (
        drawn,
        batch.views[0][0, 0].double().numpy(),
        batch.clean[0][0, 0].double().numpy(),
        batch.valid[0][0, 0].numpy(),
    )


def toe_and_shoulder(x, black, white, knee=0.25):
    """Straight from (black, 0) to (knee, knee), and the same at the white end; a loop over pixels."""
    out = np.empty_like(x)
    for at, value in np.ndenumerate(x):
        if value < knee and black < 0:
            value = knee * (value - black) / (knee - black)
        elif value > 1 - knee and white > 1:
            value = 1 - knee * (white - value) / (white - 1 + knee)
        out[at] = value
    return out


@pytest.mark.parametrize("gamma", [0.5, 0.8, 2.0])
def test_formula_of_gamma(gamma):
    _, view, clean, _ = only(gamma=(gamma, gamma))
    assert np.abs(view - clean**gamma).max() < 1e-6


@pytest.mark.parametrize("contrast", [0.5, 1.4])
@pytest.mark.parametrize("brightness", [0.0, 0.2])
def test_formula_of_contrast_and_brightness(contrast, brightness):
    drawn, view, clean, _ = only(contrast=(contrast, contrast), brightness=brightness)
    assert (drawn.brightness != 0) == (brightness != 0)
    mean = clean.mean()
    shifted = mean + contrast * (clean - mean) + drawn.brightness
    ends = [mean + contrast * (end - mean) + drawn.brightness for end in (0, 1)]
    assert np.abs(view - toe_and_shoulder(shifted, *ends)).max() < 1e-6


def test_formula_of_the_window():
    drawn, view, clean, _ = only(window=1.0, window_clip=0.1)
    low, high = drawn.window
    assert 0 < low <= 0.1
    assert 0.9 <= high < 1
    assert np.abs(view - np.clip((clean - low) / (high - low), 0, 1)).max() < 1e-6


def test_formula_of_the_blur():
    drawn, view, clean, _ = only(blur=1.0, blur_sigma=(0.8, 0.8))
    assert drawn.blur == pytest.approx(0.8)
    weights = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)  # ceil(2.4) = 3
    weights /= weights.sum()
    expected = np.zeros_like(clean)
    for dy, wy in zip(range(-3, 4), weights, strict=True):
        for dx, wx in zip(range(-3, 4), weights, strict=True):
            rows, columns = np.arange(32)[:, None] + dy, np.arange(32)[None] + dx
            expected += wy * wx * clean[rows.clip(0, 31), columns.clip(0, 31)]
    assert np.abs(view - expected).max() < 1e-6


def test_formula_of_the_noise():
    drawn, view, clean, _ = only(noise=0.05)
    assert 0 < drawn.noise <= 0.05
    expected = np.clip(clean + drawn.noise * noise_field(drawn.noise_key, 32), 0, 1)
    assert np.abs(view - expected).max() < 1e-6


def test_cut_out_is_the_mean_and_not_valid():
    """What is erased must be neither matched nor carry mass."""
    drawn, view, clean, valid = only(cutout=1.0, cutout_area=(0.2, 0.2), brightness=0.2)
    left, top, right, bottom = drawn.cutout
    assert 0.15 < (right - left) * (bottom - top) / 32**2 < 0.25
    expected = np.ones((32, 32), bool)
    expected[top:bottom, left:right] = False
    assert np.array_equal(valid, expected)
    assert np.abs(view[~valid] - (clean.mean() + drawn.brightness)).max() < 1e-6
    assert clean[~valid].std() > 0.01  # what was there before is kept for methods that restore it


def test_cut_outs_lie_everywhere_and_keep_their_area():
    config = ViewsConfig(size=64, cutout=0.5, cutout_area=(0.05, 0.25))
    drawn = [draw_views((80, 80), None, config, view_generator(0, 0, i), count=1)[0].cutout for i in range(600)]
    holes = np.array([hole for hole in drawn if hole[2]])
    assert 240 < len(holes) < 360
    area = (holes[:, 2] - holes[:, 0]) * (holes[:, 3] - holes[:, 1]) / 64**2
    assert area.min() > 0.04
    assert area.max() < 0.27
    assert (holes.min(), holes.max()) == (0, 64)
    covered = np.zeros((64, 64))
    for left, top, right, bottom in holes:
        covered[top:bottom, left:right] += 1
    assert (covered.sum(0) > 0).all()
    assert (covered.sum(1) > 0).all()
    assert covered.max() < 0.4 * len(holes)


def test_pixels_outside_are_zero_beside_a_cut_out():
    config = ViewsConfig(size=48, rotation=30, scale=(1.0, 1.0), cutout=1.0, cutout_area=(0.25, 0.25))
    corners = 0
    for index in range(10):
        image = grey_image(radiograph(picture(50, 50)))
        drawn = draw_views((50, 50), None, config, view_generator(0, 0, index))
        batch = carry_out(image, drawn)
        for numbers, view, valid in zip(drawn, batch.views, batch.valid, strict=True):
            left, top, right, bottom = numbers.cutout
            place = source_of_pixels(numbers.matrix(), 48)
            outside = torch.from_numpy(((place < 0) | (place > 1)).any(-1))
            corners += int(outside.any())
            assert (view[0, 0][outside] == 0).all()
            hole = torch.zeros(48, 48, dtype=torch.bool)
            hole[top:bottom, left:right] = True
            assert (view[0, 0][hole & ~outside] > 0.1).all()
            assert torch.equal(valid[0, 0], ~outside & ~hole)
    assert corners > 10


def test_noise_is_white_normal_and_the_same_everywhere():
    """Mean, variance, kurtosis, quantiles and correlation of neighbours of the whole table; and known numbers."""
    field = noise_field(0, 1024).astype(np.float64)
    count = field.size
    assert abs(field.mean()) < 4 / math.sqrt(count)
    assert abs(field.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((field**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((field**4).mean() - 3) < 4 * math.sqrt(96 / count)
    for lag in (1, 2, 3, 7, 96, 224, 1024, 524288):
        flat = field.ravel()
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 4 / math.sqrt(count - lag), lag
        assert abs((flat[:-lag] ** 2 * flat[lag:] ** 2).mean() - 1) < 4 * math.sqrt(8 / (count - lag)), lag
    assert np.quantile(field, (0.0228, 0.5, 0.9772)) == pytest.approx((-2, 0, 2), abs=0.02)
    assert len(np.unique(field.astype(np.float32))) > 0.98 * count
    assert np.array_equal(noise_field(12345, 8).ravel(), field.ravel().astype(np.float32)[12345 : 12345 + 64])
    ends = noise_field(2**20 - 10, 8).ravel()
    assert np.array_equal(ends[10:], field.ravel().astype(np.float32)[:54])  # it goes in a circle
    assert noise_field(5, 1030).shape == (1030, 1030)


def test_probabilities_are_kept():
    config = ViewsConfig(size=32, blur=0.3, window=0.7, cutout=0.1, flip=0.2)
    drawn = [view for i in range(500) for view in draw_views((40, 40), None, config, view_generator(0, 0, i))]
    happened = [(v.blur > 0, v.window != (0.0, 1.0), v.cutout[2] > 0, v.affine[0] < 0) for v in drawn]
    assert np.mean(happened, axis=0) == pytest.approx([0.3, 0.7, 0.1, 0.2], abs=0.05)
    gammas = np.log([view.gamma for view in drawn])
    assert np.quantile(gammas, (0.25, 0.5, 0.75)) == pytest.approx(
        np.linspace(np.log(0.7), np.log(1.4), 5)[1:4], abs=0.03
    )
    keys = np.array([view.noise_key for view in drawn])
    assert keys.min() < 2**14
    assert keys.max() > 2**20 - 2**14
    assert len(set(keys.tolist())) > 990


# ------------------------------------------------------------------------------------------------------ multi-crop


def test_local_views_follow_the_others_and_leave_them_alone():
    image = radiograph(picture(90, 70))
    plain = make_views(image, ViewsConfig(size=48), view_generator(0, 3, 7))
    config = ViewsConfig(size=48, local_count=3, local_size=24, local_scale=(0.05, 0.1), clean=True)
    batch = make_views(image, config, view_generator(0, 3, 7))
    assert [tuple(view.shape) for view in batch.views] == [(1, 1, 48, 48)] * 2 + [(1, 1, 24, 24)] * 3
    assert batch.geometry.shape == (5, 1, 2, 3)
    assert [tuple(view.shape) for view in batch.clean] == [tuple(view.shape) for view in batch.views]
    for v in range(2):
        assert torch.equal(batch.views[v], plain.views[v])
        assert torch.equal(batch.valid[v], plain.valid[v])
    assert torch.equal(batch.geometry[:2], plain.geometry)
    areas = torch.linalg.det(batch.geometry[2:, 0, :, :2])
    assert ((areas >= 0.05 - 1e-6) & (areas <= 0.1 + 1e-6)).all()
    joined = collate_views([batch, make_views(image, config, view_generator(0, 3, 8))])
    assert [tuple(view.shape) for view in joined.views] == [(2, 1, 48, 48)] * 2 + [(2, 1, 24, 24)] * 3


def test_intensity_settings_move_no_geometry_of_any_view():
    image = radiograph(picture(50, 60))
    extra = {"local_count": 2, "local_size": 16}
    a = make_views(image, ViewsConfig(size=32, cutout=1.0, **extra), view_generator(3, 1, 4), count=3)
    b = make_views(image, ViewsConfig(size=32, **extra, **NEUTRAL), view_generator(3, 1, 4), count=3)
    assert torch.equal(a.geometry, b.geometry)
    assert a.geometry.shape[0] == 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3), (3, 900), (900, 16), (17, 16)])
def test_tiny_and_elongated_images(shape):
    image = radiograph(np.random.default_rng(0).uniform(0.3, 0.9, shape))
    config = ViewsConfig(size=32, scale=(0.08, 1), local_count=1, local_size=16, **NEUTRAL)
    for index in range(10):
        batch = make_views(image, config, view_generator(0, 0, index))
        for view, valid in zip(batch.views, batch.valid, strict=True):
            assert valid.any()
            assert (view[valid] > 0.29).all()
            assert (view[valid] < 0.91).all()
            assert (view[~valid] == 0).all()


def test_an_elongated_image_keeps_the_detail_of_its_short_side():
    """Each axis is reduced by what it needs itself: stripes that run along a long image survive."""
    stripes = np.tile(np.array([0.2, 0.2, 0.8, 0.8]), 8)[:, None] * np.ones((1, 512))
    sampled, _ = whole(stripes, WHOLE, 32)
    assert resampling(WHOLE, (32, 512), 32).halvings == (4, 0)
    assert np.abs(sampled - stripes[:, :32]).max() < 2 * STEP


# ----------------------------------------------------------------------------------------------------- guard rails


def nodule_visibility(config, diameter_mm, draws, *, lung, contrast=0.1, field_mm=400.0, side=448):
    """Rose's signal-to-noise ratio of a planted nodule in each view: contrast / deviation x root of its pixels.

    The radiograph is lungs of one grey level on a body, of a mean of about a half; the nodule is a disc of soft edge,
    0.1 brighter. Its contrast is taken from a view without noise, minus that of the same view without the nodule, over
    its own area; the deviation is that of the drawn noise, but at least that of a detector, 0.01.
    """
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side
    lungs = (np.abs(np.abs(x - 0.5) - 0.22) < 0.13) & (np.abs(y - 0.5) < 0.33)
    body = cv2.GaussianBlur(np.where(lungs, lung, 0.7).astype(np.float32), (0, 0), 4)
    place = np.array([0.3, 0.45])
    away = np.hypot(x - place[0], y - place[1]) * field_mm
    bump = contrast / (1 + np.exp((away - diameter_mm / 2) / 0.7))
    images = [grey_image(radiograph(body)), grey_image(radiograph(body + bump))]
    out = []
    for index in range(draws):
        (drawn,) = draw_views((side, side), None, config, view_generator(0, 0, index), count=1)
        quiet = drawn._replace(noise=0.0)
        (without, seen) = (carry_out(image, [quiet]).views[0][0, 0].double().numpy() for image in images)
        centres = token_centres(config.size, config.size).double()
        there = apply_affine(torch.from_numpy(drawn.matrix()), centres).view(config.size, config.size, 2).numpy()
        inside = np.hypot(*(there - place).transpose(2, 0, 1)) * field_mm < diameter_mm / 2
        if inside.sum() < 3 or (without[inside] == 0).any():
            continue  # outside the crop
        signal = (seen - without)[inside].mean()
        out.append(signal / max(drawn.noise, 0.01) * math.sqrt(inside.sum()))
    return np.array(out)


def fixed(config, **change):
    return ViewsConfig(**{**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, **change})


# every setting at an end of its range, all at once, the whole image in one view: a nodule is never smaller
LIMITS = [
    {"gamma": (g, g), "contrast": (c, c), "brightness": 0.2, "blur": 1.0, "blur_sigma": (1.5, 1.5), "noise": 0.05,
     "window": 1.0, "window_clip": 0.1}
    for g in (0.5, 2.0) for c in (0.5, 1.5)
]  # fmt: skip


@pytest.mark.parametrize("lung", [0.2, 0.35, 0.5])
def test_a_nodule_stays_visible(lung):
    """Rose: above 3 to 5 an observer sees it. At the defaults even the worst draw keeps a nodule of 10 mm above 5, and
    one of 5 mm above 2; at the limits, all at once, the worst draw keeps one of 30 mm above 5, 20 mm above 3, 10 mm
    above 1.
    """
    usual = ViewsConfig(scale=(1.0, 1.0))
    assert nodule_visibility(usual, 10, 60, lung=lung).min() > 5
    assert nodule_visibility(usual, 5, 60, lung=lung).min() > 2
    for change in LIMITS:
        extreme = ViewsConfig(scale=(1.0, 1.0), rotation=30, **change)
        for diameter, bound in ((10, 1), (20, 3), (30, 5)):
            seen = nodule_visibility(extreme, diameter, 15, lung=lung)
            assert len(seen) > 10
            assert seen.min() > bound, (change, diameter)


ALONE = [
    {"gamma": (0.5, 0.5)}, {"gamma": (2.0, 2.0)}, {"contrast": (0.5, 0.5)}, {"contrast": (1.5, 1.5)},
    {"brightness": 0.2}, {"blur": 1.0, "blur_sigma": (1.5, 1.5)}, {"noise": 0.05}, {"window": 1.0, "window_clip": 0.1},
    {"rotation": 30.0}, {"aspect": (0.5, 0.5)}, {"aspect": (2.0, 2.0)},
]  # fmt: skip


@pytest.mark.parametrize("change", ALONE, ids=lambda change: "-".join(map(str, change)))
def test_one_setting_at_its_limit_keeps_a_nodule_visible(change):
    """With everything else at its default, the worst draw keeps a nodule of 10 mm above 3 in lungs of any grey."""
    config = ViewsConfig(**{"scale": (1.0, 1.0), **change})
    for lung in (0.2, 0.35, 0.5):
        assert nodule_visibility(config, 10, 30, lung=lung).min() > 3


def test_contrast_and_brightness_make_no_two_grey_levels_equal():
    """Toe and shoulder keep apart what a clip would make black or white; without them this fails at the first draw."""
    ramp = radiograph(np.repeat(np.arange(256)[None] / 255, 256, axis=0))
    for contrast in (0.5, 1.5):
        for index in range(10):
            config = ViewsConfig(size=256, scale=(1, 1), aspect=(1, 1), rotation=0,
                                 **(NEUTRAL | {"contrast": (contrast, contrast), "brightness": 0.2}))  # fmt: skip
            row = make_views(ramp, config, view_generator(0, 0, index), count=1).views[0][0, 0, 0].double()
            assert row.diff().min() > 0.2 * STEP
            assert row.min() >= 0
            assert row.max() <= 1


def test_distribution_of_crops():
    """Area, aspect, angle and place of 400 crops, from their geometry."""
    height, width = 100, 80
    config = ViewsConfig(size=16, scale=(0.1, 0.4), aspect=(0.8, 1.25), rotation=10, flip=0.25, **NEUTRAL)
    image = radiograph(picture(height, width))
    batches = [make_views(image, config, view_generator(5, 0, i), count=1) for i in range(400)]
    drawn = [batch.geometry[0, 0].double().numpy() for batch in batches]
    axes = np.array(drawn)[:, :, :2] * np.array([[width], [height]])
    sides = np.linalg.norm(axes, axis=1)
    area, aspect = np.abs(np.linalg.det(axes)) / (height * width), sides[:, 0] / sides[:, 1]
    assert area.min() >= 0.1 - 1e-6
    assert area.max() <= 0.4 + 1e-6
    assert np.quantile(area, (0.1, 0.9)) == pytest.approx((0.13, 0.37), abs=0.03)
    assert aspect.min() >= 0.8 - 1e-6
    assert aspect.max() <= 1.25 + 1e-6
    assert abs(np.log(aspect).mean()) < 0.03
    angle = np.degrees(np.arctan2(-axes[:, 0, 1], axes[:, 1, 1]))
    assert np.abs(angle).max() <= 10 + 1e-6
    assert np.abs(angle).max() > 9
    assert abs(angle.mean()) < 1
    assert 60 < (np.linalg.det(axes) < 0).sum() < 140
    centre = np.array(drawn) @ np.array([0.5, 0.5, 1.0])
    assert centre.mean(0) == pytest.approx((0.5, 0.5), abs=0.03)
    assert np.abs(centre - 0.5).max() > 0.25
    # before they are turned, crops lie inside the image: their centre is at least half a side away from the border
    half = sides / 2 / (width, height)
    assert (centre > half - 1e-6).all()
    assert (centre < 1 - half + 1e-6).all()


def test_large_crops_of_elongated_images_stay_inside():
    config = ViewsConfig(size=16, scale=(0.9, 1.0), rotation=0, **NEUTRAL)
    for shape in ((30, 90), (90, 30), (50, 50)):
        for index in range(20):
            batch = make_views(radiograph(picture(*shape)), config, view_generator(0, 0, index))
            assert all(valid.all() for valid in batch.valid)
            corners = apply_affine(batch.geometry[:, 0], torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(2, -1, -1))
            assert corners.min() > -1e-6
            assert corners.max() < 1 + 1e-6


@pytest.mark.parametrize(("size", "side"), [(224, 96), (96, 48), (128, 48), (64, 32), (512, 224), (16, 16)])
def test_local_views_are_three_sevenths_of_the_others(size, side):
    config = ViewsConfig(size=size, local_count=1)
    assert config.local_side == side
    assert draw_views((40, 40), None, config, view_generator(0, 0, 0))[2].size == side
    assert ViewsConfig(size=size, local_size=20).local_side == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 15}, "views.size must be at least 16 pixels, received 15"),
        ({"local_size": 8}, "views.local_size must be at least 16 pixels, or 0 for 3/7 of views.size, received 8"),
        ({"scale": (0.0, 1.0)}, r"views.scale must be \(low, high\) with 0.08 <= low .*the nearest is \(0.08, 1\)"),
        ({"scale": (0.5, 1.1)}, r"views.scale .*shows no anatomy.*received \(0.5, 1.1\); the nearest is \(0.5, 1\)"),
        ({"scale": (0.8, 0.3)}, "views.scale .*give the smaller one first"),
        ({"local_scale": (0.04, 0.3)}, r"views.local_scale .*the nearest is \(0.05, 0.3\)"),
        ({"aspect": (0.4, 1.0)}, "views.aspect .*enlarged"),
        ({"gamma": (1.5, 1.0)}, "views.gamma"),
        ({"gamma": (0.4, 1.0)}, "views.gamma .*nodules drown"),
        ({"contrast": (-1.0, 1.0)}, "views.contrast"),
        ({"contrast": (0.8, 1.6)}, r"views.contrast .*the nearest is \(0.8, 1.5\)"),
        ({"blur_sigma": (0.0, 1.0)}, "views.blur_sigma must be .* 0 < low"),
        ({"blur_sigma": (0.5, 2.0)}, "views.blur_sigma .*erases nodules"),
        ({"blur_sigma": (math.nan, 1.0)}, "views.blur_sigma"),
        ({"flip": 1.5}, "views.flip is a probability, received 1.5; give 0 to 1"),
        ({"blur": -0.1}, "views.blur is a probability"),
        ({"window": 2}, "views.window is a probability"),
        ({"window_clip": 0.2}, r"views.window_clip must be in \[0, 0.1\]"),
        ({"cutout": -1}, "views.cutout is a probability"),
        ({"cutout_area": (0.1, 0.3)}, "views.cutout_area .*hides a nodule"),
        ({"rotation": 31}, r"views.rotation must be in \[0, 30\] \(no patient"),
        ({"rotation": -1}, r"views.rotation must be in \[0, 30\]"),
        ({"rotation": math.nan}, r"views.rotation must be in \[0, 30\]"),
        ({"noise": -0.1}, "views.noise"),
        (
            {"noise": 0.06},
            r"views.noise must be in \[0, 0.05\] \(more noise drowns nodules\), received 0.06; 0 switches",
        ),
        ({"brightness": -0.1}, "views.brightness"),
        ({"brightness": 0.3}, "views.brightness"),
        ({"local_count": -1}, "views.local_count must be >= 0"),
        ({"executor": "gpu"}, "views.executor must be host or device, received 'gpu'"),
    ],
)
def test_settings_that_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        ViewsConfig(**change)


# -------------------------------------------------------------------------------------------------- correspondence


def maps(*rows):
    return torch.tensor([rows], dtype=torch.float64)


IDENTITY = maps([1, 0, 0], [0, 1, 0])


def everywhere(*grid):
    return torch.ones(1, grid[0] * grid[1], dtype=torch.bool)


def test_affine_maps_and_inverse():
    affine = maps([0.3, -0.2, 0.4], [0.1, 0.7, -0.1])
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.5, 0.25]]], dtype=torch.float64)
    expected = torch.tensor([[[0.4, -0.1], [0.7, 0.0], [0.5, 0.125]]], dtype=torch.float64)
    assert torch.allclose(apply_affine(affine, points), expected)
    assert torch.allclose(apply_affine(invert_affine(affine), expected), points)
    assert torch.allclose(token_centres(2, 4), torch.tensor(
        [[.125, .25], [.375, .25], [.625, .25], [.875, .25], [.125, .75], [.375, .75], [.625, .75], [.875, .75]]
    ))  # fmt: skip


def test_correspondence_of_known_maps():
    grid = (3, 4)
    cells = torch.arange(12).view(3, 4)
    same = correspondence(IDENTITY, IDENTITY, everywhere(*grid), everywhere(*grid), grid, grid)
    assert torch.equal(same.cell[0], torch.arange(12))
    assert same.known.all()
    assert torch.allclose(same.position[0], token_centres(*grid).double())

    # view t lies one cell to the right of view s: what s shows in column c, t shows in column c - 1
    right = maps([1, 0, 0.25], [0, 1, 0])
    shifted = correspondence(IDENTITY, right, everywhere(*grid), everywhere(*grid), grid, grid)
    expected = torch.cat((torch.full((3, 1), -1), cells[:, :3]), dim=1)
    assert torch.equal(shifted.cell[0].view(3, 4), expected)
    assert torch.equal(shifted.known[0].view(3, 4), expected >= 0)

    mirror = maps([-1, 0, 1], [0, 1, 0])
    flipped = correspondence(IDENTITY, mirror, everywhere(*grid), everywhere(*grid), grid, grid)
    assert torch.equal(flipped.cell[0].view(3, 4), cells.flip(1))
    both = correspondence(mirror, mirror, everywhere(*grid), everywhere(*grid), grid, grid)
    assert torch.equal(both.cell[0], torch.arange(12))

    # (x, y) of t lies at (1 - y, x) of the image: the row of t counts from the right
    quarter = maps([0, -1, 1], [1, 0, 0])
    turned = correspondence(IDENTITY, quarter, everywhere(4, 4), everywhere(4, 4), (4, 4), (4, 4))
    for row in range(4):
        for column in range(4):
            assert turned.cell[0, row * 4 + column] == (3 - column) * 4 + row

    # the left upper quarter of the image, enlarged, against the whole: four tokens of s fall into one of t
    zoom = maps([0.5, 0, 0], [0, 0.5, 0])
    zoomed = correspondence(zoom, IDENTITY, everywhere(4, 4), everywhere(4, 4), (4, 4), (4, 4))
    fours = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]])
    assert torch.equal(zoomed.cell[0].view(4, 4), fours)


def test_unknown_where_either_token_is_not_valid():
    grid = (2, 2)
    valid_s, valid_t = everywhere(*grid), everywhere(*grid)
    valid_s[0, 0], valid_t[0, 3] = False, False
    got = correspondence(IDENTITY, IDENTITY, valid_s, valid_t, grid, grid)
    assert got.known.tolist() == [[False, True, True, False]]
    assert got.cell.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("grid_s", "grid_t"), [((7, 7), (7, 7)), ((6, 6), (3, 4)), ((2, 5), (7, 6))])
def test_correspondence_agrees_with_a_loop(grid_s, grid_t):
    config = ViewsConfig(size=42, scale=(0.2, 0.8), rotation=30, flip=0.5, **NEUTRAL)
    hole = np.ones((60, 80), bool)
    hole[:20] = False
    image = radiograph(picture(60, 80), hole)
    batch = collate_views([make_views(image, config, view_generator(1, 0, i)) for i in range(6)])
    valid_s, valid_t = token_valid(batch.valid[0], *grid_s), token_valid(batch.valid[1], *grid_t)
    geometry = batch.geometry.double()
    got = correspondence(geometry[0], geometry[1], valid_s, valid_t, grid_s, grid_t)
    assert 0 < got.known.float().mean() < 1
    for b in range(6):
        square = [np.vstack((g[b].numpy(), [0, 0, 1])) for g in geometry]
        for i in range(grid_s[0] * grid_s[1]):
            centre = [(i % grid_s[1] + 0.5) / grid_s[1], (i // grid_s[1] + 0.5) / grid_s[0], 1.0]
            x, y, _ = np.linalg.inv(square[1]) @ square[0] @ centre
            assert got.position[b, i].numpy() == pytest.approx((x, y), abs=1e-7)  # centres are float32
            inside = 0 <= x < 1 and 0 <= y < 1
            cell = int(y * grid_t[0]) * grid_t[1] + int(x * grid_t[1]) if inside else -1
            assert got.cell[b, i] == cell
            assert bool(got.known[b, i]) == bool(inside and valid_s[b, i] and valid_t[b, cell])


def test_corresponding_tokens_show_the_same_part_of_the_image():
    """From end to end: the image holds its own coordinates, so both views say where they look."""
    y, x = np.mgrid[0:120, 0:120] / 120
    config = ViewsConfig(size=96, scale=(0.3, 0.7), rotation=15, flip=0.5, **NEUTRAL)
    for index in range(10):
        xs = make_views(radiograph(x), config, view_generator(0, 0, index))
        ys = make_views(radiograph(y), config, view_generator(0, 0, index))
        assert torch.equal(xs.geometry, ys.geometry)
        grid = (12, 12)
        valid = [token_valid(v, *grid, share=1.0) for v in xs.valid]
        got = correspondence(xs.geometry[0], xs.geometry[1], *valid, grid, grid)
        means = [
            torch.stack([torch.nn.functional.adaptive_avg_pool2d(v.views[k], grid).flatten(1) for v in (xs, ys)], -1)
            for k in range(2)
        ]
        known = got.known[0]
        apart = means[0][0][known] - means[1][0][got.cell[0][known]]
        cell_side = xs.geometry[1, 0, :, :2].norm(dim=0).max() / 12
        assert known.sum() > 5
        assert apart.norm(dim=1).max() < cell_side * 0.75 + 0.01  # half the diagonal of a cell, and its pixels


def test_token_valid_threshold():
    valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :4, :2] = True  # half of the first token
    valid[..., :4, 4:7] = True  # three quarters of the second
    valid[..., 4:, :4] = True  # the third
    valid[..., 4, 4:] = True  # a quarter of the fourth
    assert token_valid(valid, 2, 2).tolist() == [[True, True, True, False]]
    assert token_valid(valid, 2, 2, share=0.6).tolist() == [[False, True, True, False]]
    assert token_valid(valid, 2, 2, share=0.25).tolist() == [[True, True, True, True]]
    assert token_valid(valid, 2, 2, share=1.0).tolist() == [[False, False, True, False]]
    assert token_valid(valid, 1, 2).shape == (1, 2)


def test_a_bare_image_is_valid_everywhere():
    image = torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(0))
    bare = make_views(image, ViewsConfig(size=32), view_generator(0, 0, 0))
    whole = make_views(
        Radiograph(image, torch.ones_like(image, dtype=torch.bool), None), ViewsConfig(size=32), view_generator(0, 0, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(bare.views, whole.views, strict=True))
    assert torch.equal(bare.geometry, whole.geometry)
