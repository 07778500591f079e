"""The physics of phantoms against slow, independent ways to the same numbers."""

import math

import numpy as np
import pytest

from otcxr.data.phantom import _scene, parse_phantom
from otcxr.data.phantom_anatomy import DOME_Z, dome_line, ellipsoid, heart_parts, lung_outline
from otcxr.data.phantom_devices import device_tubes, generator, marker
from otcxr.data.phantom_findings import collapsed_outer, outlines
from otcxr.data.phantom_geometry import Geometry, Rays, grid_rays
from otcxr.data.phantom_render import _air, attenuation, detect, shutter_open
from otcxr.data.phantom_tubes import Tubes

PLAIN = Geometry(
    focus=1800.0, near=0.92, slope=1 / 1800.0, centre=(0.0, 0.0), yaw=0.0, pitch=0.0, angle=0.0, shift=(0.0, 0.0),
    field=400.0,
)  # fmt: skip


def scenes(count, more="prevalence=0"):
    config = parse_phantom(f"{count},seed=21,size=64,{more}")
    return [_scene(config, index) for index in range(count)]


# ---------------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("view", ["PA", "AP"])
def test_projection_is_a_line_from_the_focus_to_the_detector(view):
    """Similar triangles in space: the focus, the point, the detector as a plane."""
    checked = 0
    rng = np.random.default_rng(0)
    for _, study, _ in scenes(30):
        if study.view != view:
            continue
        g = study.geometry
        front = view == "PA"
        distance = (1 - g.near) * g.focus  # of mid-chest from the detector
        detector = distance if front else -distance
        focus = np.array([*g.centre, detector - g.focus if front else detector + g.focus])
        for x, v, z in rng.uniform(-80, 80, (5, 3)):
            point = np.array([x + g.yaw * z, v + g.pitch * z, z])  # turns of the patient as shears
            t = (detector - focus[2]) / (point[2] - focus[2])
            hit = focus + t * (point - focus)
            turn = np.array([[math.cos(g.angle), -math.sin(g.angle)], [math.sin(g.angle), math.cos(g.angle)]])
            assert np.allclose(g.project(x, v, z), turn @ hit[:2] + g.shift, atol=2e-3)
            checked += 1
    assert checked > 20


def test_rays_and_projection_are_inverse():
    for _, study, _ in scenes(10):
        g = study.geometry
        rays = grid_rays(g, 16)
        axis = ((np.arange(16) + 0.5) / 16 - 0.5) * g.field
        for z in (-70.0, 0.0, 55.0):
            x, y = g.project(*rays.at(z), z)
            assert np.abs(x - axis[None, :]).max() < 2e-3
            assert np.abs(y - axis[:, None]).max() < 2e-3
        affine = g.plane_map(16)
        column, row = np.meshgrid(np.arange(16), np.arange(16))
        at = np.einsum("ij,jrc->irc", affine, np.stack((column, row, np.ones_like(row))).astype(float))
        assert np.allclose(at, rays.at(0.0), atol=2e-3)


def test_what_is_far_from_the_detector_is_magnified_more():
    near, far = PLAIN.project(50.0, 0.0, 60.0)[0], PLAIN.project(50.0, 0.0, -60.0)[0]
    assert 50 < near < far  # PA: the front lies on the detector
    back = PLAIN._replace(slope=-PLAIN.slope)
    assert back.project(50.0, 0.0, 60.0)[0] > back.project(50.0, 0.0, -60.0)[0]


# -------------------------------------------------------------------------------------------------------- solids


def test_ellipsoid_is_met_where_small_steps_meet_it():
    rng = np.random.default_rng(1)
    z = np.linspace(-150, 150, 60001)
    for _ in range(25):
        centre, axes, tilt = rng.uniform(-20, 20, 3), rng.uniform(10, 80, 3), rng.uniform(-1, 1)
        ray = [np.array([value], np.float32) for value in (*rng.uniform(-60, 60, 2), *rng.uniform(-0.3, 0.3, 2))]
        middle, square = ellipsoid(Rays(*ray), tuple(centre), tuple(axes), tilt)
        dx, dv = ray[0] + ray[2] * z - centre[0], ray[1] + ray[3] * z - centre[1]
        a, b = dx * math.cos(tilt) + dv * math.sin(tilt), dv * math.cos(tilt) - dx * math.sin(tilt)
        inside = (a / axes[0]) ** 2 + (b / axes[1]) ** 2 + ((z - centre[2]) / axes[2]) ** 2 < 1
        if not inside.any():
            assert square[0] < 0.5
            continue
        half = math.sqrt(max(square[0], 0))
        assert middle[0] - half == pytest.approx(z[inside][0], abs=0.05)
        assert middle[0] + half == pytest.approx(z[inside][-1], abs=0.05)


def brute_air(body, rays):
    """Air along each ray by steps of half a millimetre, every surface asked at the very point."""
    z = np.arange(-130, 130, 0.5, dtype=np.float32)[:, None, None] + np.float32(0.25)
    x, v = rays.x0 + rays.x1 * z, rays.v0 + rays.v1 * z
    outer, inner, _, s = lung_outline(body, x, v)
    flat = np.sqrt(np.maximum(1 - (x / np.maximum(outer, 1)) ** 2, 0))
    inside = np.abs(z) < body.depth * (1 - 0.4 * s * s) * flat
    inside &= (v - dome_line(body, x)) * 2 * body.dome_radius < (z - DOME_Z) ** 2
    knob_v, knob_r = body.knob
    solids = [
        *heart_parts(body), ((0.75 * body.inner, knob_v, -8.0), (knob_r, knob_r, 30.0), 0.0),
        ((-0.45 * body.inner, knob_v + 15.0, 22.0), (0.72 * body.inner, 70.0, 16.0), 0.0),
        ((0.62 * body.inner, knob_v + 90.0, -38.0), (0.62 * body.inner, 150.0, 14.0), 0.0),
    ]  # fmt: skip
    for centre, axes, tilt in solids:
        dx, dv = x - centre[0], v - centre[1]
        a, b = dx * math.cos(tilt) + dv * math.sin(tilt), dv * math.cos(tilt) - dx * math.sin(tilt)
        inside &= (a / axes[0]) ** 2 + (b / axes[1]) ** 2 + ((z - centre[2]) / axes[2]) ** 2 >= 1
    beside = np.zeros_like(x)
    for share, border, width in ((0.68, inner, 13), (0.32, 0.45 * inner, 15)):
        t = np.clip((np.abs(x) - border) / width + 0.5, 0, 1)
        beside += share * t * t * (3 - 2 * t)
    return (0.5 * inside * beside).sum(axis=0)


def test_air_is_what_an_integral_in_small_steps_finds():
    """The closed form takes the outline of the lungs where the ray crosses mid-chest: some per cent off, no more."""
    errors = []
    for body, study, _ in scenes(8):
        rays = grid_rays(study.geometry, 40)
        air, _, _ = _air(body, study.geometry, rays)
        truth = brute_air(body, rays)
        assert truth.max() > 100
        errors.append(np.abs(air - truth).mean() / truth.mean())
        assert air[truth == 0].mean() < 0.5  # only along the edges
        assert np.corrcoef(air.ravel(), truth.ravel())[0, 1] > 0.99
    assert np.mean(errors) < 0.03


def test_outside_the_body_there_is_nothing():
    config = parse_phantom("20,seed=21,size=64,prevalence=0,devices=0")
    for index in range(20):
        body, study, disease = _scene(config, index)
        # step back: a field so wide that the neck ends in air
        study = study._replace(letter="", geometry=study.geometry._replace(field=800.0))
        integral = attenuation(body, study, disease, 1.0, 64)
        x, v = grid_rays(study.geometry, 64).at(0.0)
        outside = (v < 150) & (np.abs(x) > body.width + body.wall + 44 + study.arm + 60)
        assert outside.sum() > 50
        assert integral[outside].max() == 0
        assert integral.min() >= 0


def test_bone_behind_more_tissue_adds_less():
    """Beam hardening: the same skeleton in a fatter patient."""
    body, study, disease = scenes(1, "prevalence=0,devices=0")[0]
    study = study._replace(letter="")

    def skeleton(fat):
        thick = body._replace(fat=fat)
        with_bone, without = (
            attenuation(one, study, disease, 1.0, 64) for one in (thick, thick._replace(rib_bone=1e-6))
        )
        return float((with_bone - without).sum())

    assert 0 < skeleton(150.0) < 0.9 * skeleton(40.0)


def test_lordosis_throws_the_clavicles_up_in_ap():
    """Relative to the apex of the lung, both seen by their own depth."""
    above = {"PA": [], "AP": []}
    for body, study, _ in scenes(120):
        g = study.geometry
        front = g.project(60.0, body.clavicle[0], 0.62 * body.depth)[1]
        level = g.project(60.0, body.clavicle[0], 0.0)[1]
        above[study.view].append(float(level - front))
    assert np.mean(above["AP"]) > np.mean(above["PA"]) + 3


# --------------------------------------------------------------------------------------------------------- tubes


def test_a_tube_is_as_long_as_the_chord_of_a_cylinder():
    tubes = Tubes()
    tubes.path([(-90.0, 10.0, 0.0), (90.0, 10.0, 0.0)], (12.0, 12.0))
    path = tubes.longest(PLAIN, 256)
    rays = grid_rays(PLAIN, 256)
    x, v = rays.at(0.0)
    chord = 2 * np.sqrt(np.maximum(144.0 - (v - 10.0) ** 2, 0))
    middle = np.abs(x) < 80
    assert np.abs(path - chord)[middle].max() < 0.05
    assert path.max() == pytest.approx(24.0, abs=0.1)


def test_tubes_do_not_add_up_and_thin_ones_keep_their_matter():
    def total(size, radius, repeat=1):
        tubes = Tubes()
        for _ in range(repeat):
            tubes.path([(-60.0, -40.0, 0.0), (50.0, 70.0, 0.0)], (radius, radius), weight=2.0)
        path = tubes.longest(PLAIN, size)
        return float(path.sum()) * (400.0 / size) ** 2

    assert total(128, 5.0, repeat=3) == total(128, 5.0)
    fine = total(1024, 1.5)
    for size in (64, 128, 256):  # thinner than a pixel: wider and as much fainter
        assert total(size, 1.5) == pytest.approx(fine, rel=0.12)
    assert Tubes().longest(PLAIN, 64) is None


def test_tubes_outside_the_picture_draw_nothing():
    tubes = Tubes()
    tubes.path([(900.0, 0.0, 0.0), (1200.0, 50.0, 0.0)], (5.0, 5.0))
    assert tubes.longest(PLAIN, 64).max() == 0
    tubes.path([(-900.0, 0.0, 0.0), (900.0, 0.0, 0.0)], (5.0, 5.0))  # through the whole picture
    path = tubes.longest(PLAIN, 64)
    assert (path[31:33] > 0).all()


# ------------------------------------------------------------------------------------------------------ detector


def test_quantum_noise_grows_with_the_square_root_of_what_is_absorbed():
    """Behind c nepers exp(-c) of the quanta arrive, so the logarithm is noisy by exp(c / 2)."""
    _, study, _ = scenes(1)[0]
    study = study._replace(
        scatter=0.0, sharpen=0.0, blur=0.0, window=(0.0, 1.0, 1.0), shutter=(-1.0, -1.0, 2.0, 2.0, 0.0), exposure=1.0
    )
    integral = np.tile(np.repeat(np.float32([1.0, 2.0, 3.0]), 64), (192, 1))
    grey = detect(integral, study, 0.005, np.random.default_rng(0))
    spread = [grey[8:-8, 64 * k + 8 : 64 * k + 56].std() for k in range(3)]
    assert spread[1] / spread[0] == pytest.approx(math.exp(0.5), rel=0.1)
    means = [grey[:, 64 * k + 8 : 64 * k + 56].mean() for k in range(3)]
    assert means[2] - means[1] == pytest.approx(means[1] - means[0], rel=0.05)  # the logarithm is linear in mu d


def test_scatter_takes_contrast():
    _, study, _ = scenes(1)[0]
    study = study._replace(sharpen=0.0, window=(0.0, 1.0, 1.0), shutter=(-1.0, -1.0, 2.0, 2.0, 0.0))
    integral = np.full((96, 96), 3.0, np.float32)
    integral[:, :8] = 0.0  # the picture's darkest and brightest stay what they are
    integral[40:56, 40:56] = 2.7
    contrast = []
    for scatter in (0.0, 0.5, 1.0):
        grey = detect(integral, study._replace(scatter=scatter), 0.0, np.random.default_rng(0))
        contrast.append(grey[60:80, 60:80].mean() - grey[44:52, 44:52].mean())
    assert contrast[0] > contrast[1] > contrast[2] > 0


def test_shutter_is_where_it_was_drawn():
    _, study, _ = scenes(1)[0]
    lit = shutter_open(study._replace(shutter=(0.25, 0.125, 0.75, 1.2, 0.0)), 64)
    rows, columns = np.nonzero(lit)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (16, 47, 8, 63)
    assert lit.sum() == 32 * 56


def test_strong_contrast_takes_no_more_than_all_tissue():
    """A pneumothorax of contrast 1.5 is air, not less than air."""
    source = "10,seed=3,size=64,prevalence=0,pneumothorax_prevalence=1,devices=0"
    config = parse_phantom(source)
    for index in range(10):
        body, study, disease = _scene(config, index)
        strong, usual = (attenuation(body, study, disease, contrast, 64) for contrast in (1.5, 1.0))
        (beyond,) = outlines(body, disease, "Pneumothorax", grid_rays(study.geometry, 64))
        assert np.median(np.abs(strong - usual)[beyond]) < 2e-3  # the pleural line aside


def test_noise_of_a_larger_pixel_is_less():
    """Twice the side collects four times the quanta: half the deviation."""
    _, study, _ = scenes(1)[0]
    study = study._replace(
        scatter=0.0, sharpen=0.0, blur=0.0, window=(0.0, 1.0, 1.0), shutter=(-1.0, -1.0, 2.0, 2.0, 0.0)
    )
    spread = {}
    for size in (64, 128):
        integral = np.tile(np.repeat(np.float32([1.0, 3.0]), size // 2), (size, 1))
        grey = detect(integral, study, 0.005, np.random.default_rng(0))
        spread[size] = grey[8:-8, 8 : size // 2 - 8].std()
    assert spread[128] / spread[64] == pytest.approx(2.0, rel=0.15)


def test_the_letter_lies_on_its_own_side():
    """PA and AP are shown alike: the patient's right is on the left of the picture."""
    sides = set()
    for _, study, _ in scenes(60, "prevalence=0,devices=0"):
        if study.letter:
            columns = np.nonzero(marker(study, 128).max(axis=0) > 1)[0]
            assert (columns.mean() < 64) == (study.letter == "R")
            sides.add(study.letter)
    assert sides == {"L", "R"}


def test_no_vessel_and_no_water_beyond_a_collapsed_lung():
    config = parse_phantom("12,seed=3,size=160,prevalence=0,pneumothorax_prevalence=1,edema_prevalence=1,devices=0")
    for index in range(12):
        body, study, disease = _scene(config, index)
        rays = grid_rays(study.geometry, 160)
        x, v = rays.at(0.0)
        (beyond,) = outlines(body, disease, "Pneumothorax", rays)
        deep = beyond & (np.abs(x) > collapsed_outer(body, disease.collapses[0], x, v) + 5)
        if not deep.any():
            continue
        bare = attenuation(body, study._replace(density=0.0), disease._replace(edema=None), 1.0, 160)
        wet = attenuation(body, study, disease, 1.0, 160)
        assert np.abs(wet - bare)[deep].max() < 2e-3  # whatever the lung holds, pleural air holds none of it
        for part in outlines(body, disease, "Edema", rays):
            assert not (part & beyond).any()


def test_devices_are_a_setting_and_more_common_in_ap():
    def count(devices):
        found = {"PA": 0, "AP": 0}
        for body, study, _ in scenes(300, f"prevalence=0,devices={devices}"):
            found[study.view] += study.line + study.tube + study.feeding + bool(study.leads)
            assert devices or not (body.pacemaker or body.wires)
        return found

    usual = count(1)
    assert count(0) == {"PA": 0, "AP": 0}
    assert usual["AP"] > 3 * usual["PA"] > 0
    assert count(2)["AP"] > 1.5 * usual["AP"]


def test_leads_of_a_pacemaker_leave_its_can():
    found = 0
    for body, study, _ in scenes(200, "prevalence=0,devices=2"):
        can = generator(body, study, 128)
        assert (can is None) == (not body.pacemaker)
        if can is None:
            continue
        alone = study._replace(line=False, tube=False, feeding=False, leads=0)
        leads = device_tubes(body._replace(wires=False), alone).longest(study.geometry, 128)
        assert leads[can > 1].max() > 0
        assert (can.argmax() % 128 < 64) == (body.pacemaker < 0)
        found += 1
    assert found > 5
