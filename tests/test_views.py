"""Views: their geometry is exact, what is not picture is never valid, and nothing but the seed decides them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.data.geometry import apply_affine, correspondence, invert_affine, token_centres, token_valid
from otcxr.data.records import Radiograph
from otcxr.data.views import ViewsConfig, collate_views, make_views, resample, view_generator
from otcxr.errors import ConfigError

NEUTRAL = {"gamma": (1.0, 1.0), "contrast": (1.0, 1.0), "brightness": 0.0, "blur": 0.0, "noise": 0.0}
WHOLE = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


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


@pytest.mark.parametrize(
    ("height", "width", "size"), [(96, 96, 64), (150, 90, 64), (70, 160, 48), (40, 40, 96), (300, 260, 40)]
)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_geometry_finds_planted_blobs(height, width, size, flip):
    """Plant a blob, find its centroid in the view, send it back through the geometry: < 0.3 pixels of the view apart.

    Reductions and enlargements, turned, flipped, and of images that are not square.
    """
    config = ViewsConfig(size=size, scale=(0.15, 0.9), aspect=(0.6, 1.6), rotation=40, flip=flip, **NEUTRAL)
    generator = np.random.default_rng(height * width)
    worst, used = 0.0, 0
    for draw in range(40):
        _, geometry, _, _ = make_views(radiograph(picture(height, width)), config, view_generator(9, 0, draw), count=1)
        affine = geometry[0, 0].double().numpy()
        assert (np.linalg.det(affine[:, :2]) < 0) == (flip == 1.0)
        pixel = np.hypot(affine[0, :2] * width, affine[1, :2] * height) / size  # image pixels per pixel of the view
        sigma = 2.0 * max(1.0, float(pixel.max()))
        place = affine @ np.array([*generator.uniform(0.25, 0.75, 2), 1.0])
        x, y = place * (width, height)
        margin = 4 * sigma
        if not (margin < x < width - margin and margin < y < height - margin):
            continue
        batch = make_views(
            radiograph(blob(height, width, x, y, sigma)), config, view_generator(9, 0, draw), count=1
        )  # fmt: skip
        assert torch.equal(batch.geometry, geometry)
        view = batch.views[0][0, 0].double().numpy()
        reach = 4 * sigma / pixel.min()
        there = np.linalg.solve(affine[:, :2], place - affine[:, 2]) * size
        if not (reach < there[0] < size - reach and reach < there[1] < size - reach):
            continue  # a blob that is cut has another centroid
        mass = view / view.sum()
        row, column = np.mgrid[0:size, 0:size] + 0.5
        found = np.array([(mass * column).sum(), (mass * row).sum()])
        back = affine @ np.array([*(found / size), 1.0])
        error = np.abs((back - place) * (width, height)) / pixel.min()
        worst, used = max(worst, float(np.hypot(*error)), float(np.hypot(*(found - there)))), used + 1
    assert used >= 4
    assert worst < 0.3


def test_whole_image_reproduces_it():
    for height, width in ((64, 64), (48, 48)):
        pixels = picture(height, width)
        config = ViewsConfig(size=height, scale=(1.0, 1.0), aspect=(1.0, 1.0), rotation=0, **NEUTRAL)
        batch = make_views(radiograph(pixels), config, view_generator(0, 0, 0))
        for view, valid, geometry in zip(batch.views, batch.valid, batch.geometry, strict=True):
            assert (view[0, 0] - torch.from_numpy(pixels)).abs().max() < 1e-6
            assert valid.all()
            assert (geometry[0] - torch.from_numpy(WHOLE).float()).abs().max() < 1e-6
    sampled, inside = resample(pixels, None, WHOLE, 48)
    assert np.array_equal(sampled, pixels)
    assert inside.all()
    mirrored, inside = resample(pixels, None, np.array([[-1.0, 0, 1], [0, 1, 0]]), 48)
    assert np.array_equal(mirrored, pixels[:, ::-1])
    assert inside.all()
    turned, inside = resample(pixels, None, np.array([[0.0, -1, 1], [1, 0, 0]]), 48)
    assert np.array_equal(turned, np.rot90(pixels, 1))
    assert inside.all()


def test_crop_reproduces_its_pixels():
    pixels = picture(64, 96)
    affine = np.array([[32 / 96, 0, 8 / 96], [0, 32 / 64, 20 / 64]])
    sampled, inside = resample(pixels, None, affine, 32)
    assert np.abs(sampled - pixels[20:52, 8:40]).max() < 1e-6
    assert inside.all()


@given(
    scale=st.floats(0.1, 1.0), aspect=st.floats(0.5, 2.0), rotation=st.floats(0, 45), index=st.integers(0, 1000),
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
            assert (view[valid] - 0.5).abs().max() < 1e-3  # nothing of the 1.0 leaks in
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
        assert torch.equal(geometry[0], torch.from_numpy(WHOLE).float())
        assert view_valid[0, 0, :2, :2].all()
        assert not view_valid[0, 0, 3:].any()


def test_crops_are_drawn_again_until_a_quarter_is_valid():
    valid = np.zeros((80, 80), bool)
    valid[:, :40] = True
    config = ViewsConfig(size=20, scale=(0.1, 0.2), **NEUTRAL)
    for index in range(40):
        batch = make_views(radiograph(picture(80, 80), valid), config, view_generator(0, 0, index))
        for mask, geometry in zip(batch.valid, batch.geometry, strict=True):
            assert mask.float().mean() >= 0.25 or torch.equal(geometry[0], torch.from_numpy(WHOLE).float())


@pytest.mark.parametrize(("side", "size"), [(128, 32), (128, 40), (100, 33), (96, 64), (200, 17)])
def test_reduction_is_antialiased(side, size):
    """What is finer than the view's pixels averages out; nearest or plain bilinear sampling would show it as coarse."""
    board = (np.indices((side, side)).sum(0) % 2).astype(np.float32)
    sampled, _ = resample(board, None, WHOLE, size)
    assert sampled.mean() == pytest.approx(0.5, abs=0.01)
    assert np.abs(sampled - 0.5).max() < (0.01 if side % size == 0 else 0.35)
    low = np.abs(np.fft.fft2(sampled - sampled.mean())) / size**2
    ring = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    assert low[ring < 0.25].max() < 0.02  # no coarse pattern
    x = (np.indices((side, side))[1] + 0.5) / side
    stripes = (0.5 + 0.5 * np.sin(2 * np.pi * 0.45 * side * x)).astype(np.float32)  # 0.45 of the image's own rate
    sampled, _ = resample(stripes, None, WHOLE, size)
    if side / size >= 2:
        assert sampled.std() < 0.25 * stripes.std()


def test_zone_plate_of_a_turned_crop_does_not_fold():
    side, size = 256, 64
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    distance = np.hypot(x, y)
    plate = (0.5 + 0.5 * np.cos(0.5 * np.pi * side * distance**2 / 2 * 0.9)).astype(np.float32)
    angle = math.radians(20)
    linear = 0.7 * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    affine = np.column_stack((linear, 0.5 - linear @ [0.5, 0.5]))
    sampled, inside = resample(plate, None, affine, size)
    there = source_of_pixels(affine, size) * 2 - 1
    radius = np.hypot(there[..., 0], there[..., 1])
    # the plate's local frequency, in waves per pixel of the view, is proportional to the radius; above 1 it is gone
    frequency = 0.45 * radius * side / 2 * 0.5 * (0.7 * 2 / size) * 2
    gone = inside & (frequency > 1.0)
    assert gone.sum() > 200
    assert sampled[gone].std() < 0.2 * plate.std()
    assert abs(sampled[gone].mean() - 0.5) < 0.02


# ------------------------------------------------------------------------------------------------------- intensity


def test_range_and_clean_views():
    image = radiograph(picture(60, 60))
    strong = {"gamma": (0.3, 3.0), "contrast": (0.2, 3.0), "brightness": 0.6, "blur": 1.0, "noise": 0.3}
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


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"gamma": (2.0, 2.0)}, lambda x: x**2),
        ({"contrast": (0.5, 0.5)}, lambda x: (x - x.mean()) * 0.5 + x.mean()),
    ],
)
def test_intensity_formulas(settings_, expected):
    config = ViewsConfig(size=32, scale=(0.5, 0.5), aspect=(1, 1), rotation=0, clean=True, **(NEUTRAL | settings_))
    batch = make_views(radiograph(picture(60, 60)), config, view_generator(0, 0, 0), count=1)
    assert batch.valid[0].all()
    assert (batch.views[0] - expected(batch.clean[0])).abs().max() < 1e-6


def test_noise_blur_and_brightness_do_what_they_say():
    flat = radiograph(np.full((60, 60), 0.5) + 0.01 * (np.indices((60, 60)).sum(0) % 2))

    def views(count=30, **change):
        config = ViewsConfig(size=60, scale=(1, 1), aspect=(1, 1), rotation=0, **(NEUTRAL | change))
        return [make_views(flat, config, view_generator(0, 0, i), count=1).views[0].numpy() for i in range(count)]

    plain = views(1)[0]
    shifts = [float((v - plain).mean()) for v in views(brightness=0.2)]
    assert max(map(abs, shifts)) <= 0.2 + 1e-6
    assert min(shifts) < -0.1
    assert max(shifts) > 0.1
    deviations = [float((v - plain).std()) for v in views(noise=0.05)]
    assert max(deviations) < 0.052
    assert max(deviations) > 0.03
    assert min(deviations) < 0.02
    assert all(v.std() < 0.2 * plain.std() for v in views(5, blur=1.0, blur_sigma=(2.0, 2.0)))
    blurred = [v.std() < 0.9 * plain.std() for v in views(60, blur=0.5, blur_sigma=(2.0, 2.0))]
    assert 15 < sum(blurred) < 45


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 15}, "views.size must be at least 16 pixels, received 15"),
        ({"scale": (0.0, 1.0)}, r"views.scale must be \(low, high\)"),
        ({"scale": (0.5, 1.1)}, r"views.scale .*received \(0.5, 1.1\)"),
        ({"scale": (0.8, 0.3)}, "views.scale"),
        ({"aspect": (0.0, 1.0)}, "views.aspect"),
        ({"gamma": (2.0, 1.0)}, "views.gamma"),
        ({"contrast": (-1.0, 1.0)}, "views.contrast"),
        ({"blur_sigma": (0.0, 1.0)}, "views.blur_sigma"),
        ({"blur_sigma": (math.nan, 1.0)}, "views.blur_sigma"),
        ({"flip": 1.5}, "views.flip is a probability, received 1.5"),
        ({"blur": -0.1}, "views.blur is a probability"),
        ({"rotation": 46}, r"views.rotation must be in \[0, 45\]"),
        ({"rotation": -1}, r"views.rotation must be in \[0, 45\]"),
        ({"noise": -0.1}, "views.noise"),
        ({"brightness": -0.1}, "views.brightness"),
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
