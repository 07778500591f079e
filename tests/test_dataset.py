"""From records to batches: nothing is lost in memory, nothing broken goes unnoticed, and the order is reproducible."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import encode_png
from otcxr.data.dataset import (
    DataConfig,
    EpochBatches,
    ImageDataset,
    PixelCache,
    ViewDataset,
    check_records,
    join_views,
    read_pixels,
    write_skipped,
)
from otcxr.data.images import fit_square, load_image
from otcxr.data.records import Collection, Radiograph, Record, Skipped
from otcxr.data.sources import open_collection
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError, DataError


def records_of(paths):
    return [Record(path, path.stem, path.stem) for path in paths]


def equal(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.valid, b.valid) and a.spacing == b.spacing


@pytest.fixture
def folder(tmp_path):
    """Six readable images of several kinds, with padding in one of them, and two broken ones."""
    generator = np.random.default_rng(0)
    for i in range(6):
        dtype, top = (np.uint16, 65000) if i % 2 else (np.uint8, 250)
        pixels = generator.integers(top // 10, top, (30, 24 + i), dtype=dtype)
        pixels[: 5 * (i == 3)] = 0
        (tmp_path / f"{i}.png").write_bytes(encode_png(pixels))
    (tmp_path / "6.png").write_bytes(encode_png(pixels)[:-20])
    (tmp_path / "7.png").write_text("not an image")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cache_loses_nothing(tmp_path, dtype):
    """Every value that 8 and 16 bits can hold."""
    top = np.iinfo(dtype).max
    pixels = np.arange(top + 1, dtype=dtype).reshape(16, -1)
    path = tmp_path / "all.png"
    path.write_bytes(encode_png(pixels))
    direct = read_pixels(path)
    for limit in (1.0, 0.0):
        cache = PixelCache(limit)
        for _ in range(2):
            assert equal(cache.get(path), direct)
    assert np.array_equal(direct.image[0].numpy(), pixels.astype(np.float32) / np.float32(top))


def test_cache_limit_changes_no_number(folder):
    """Also for images that are computed and have more than 16 bits: what fits must not depend on memory."""
    images = [*sorted(folder.glob("[0-5].png")), *(r.image for r in open_collection("phantom:2,size=32").records)]
    everything, nothing, some = PixelCache(1.0), PixelCache(0.0), PixelCache(3e-6)
    for _ in range(2):
        for image in images:
            expected = everything.get(image)
            assert equal(nothing.get(image), expected)
            assert equal(some.get(image), expected)
            assert (expected.image - read_pixels(image).image).abs().max() <= 0.5 / 65535 + 1e-7
            assert torch.equal(expected.valid, read_pixels(image).valid)
    assert not everything.get(images[3]).valid.all()


class Counted:
    """An image that counts how often it is computed."""

    def __init__(self):
        self.count = 0

    def radiograph(self):
        self.count += 1
        image = torch.linspace(0, 1, 100).view(1, 10, 10)
        return Radiograph(image, torch.ones_like(image, dtype=torch.bool), (0.1, 0.2))


def test_cache_reads_once_what_fits():
    image = Counted()
    cache = PixelCache(200e-9)  # exactly one: 100 pixels of 16 bits
    for _ in range(3):
        assert cache.get(image).spacing == (0.1, 0.2)
    assert image.count == 1
    other = Counted()
    for _ in range(3):
        cache.get(other)
    assert other.count == 3
    small = PixelCache(199e-9)
    small.get(image)
    small.get(image)
    assert image.count == 3


def test_cached_pixels_are_not_shared():
    """A caller may change what it gets; the next one must not see it."""
    cache = PixelCache(1.0)
    counted = Counted()
    first = cache.get(counted)
    first.image.zero_()
    first.valid.zero_()
    assert cache.get(counted).image.max() == 1
    assert cache.get(counted).valid.all()
    assert counted.count == 1


# ---------------------------------------------------------------------------------------------------------- checking


def test_check_records_counts_and_lists(folder):
    paths = sorted(folder.glob("*.png"))
    collection = Collection("folder:x", (), records_of(paths), (Skipped("gone.png", "missing"),))
    calls = []
    usable, skipped, contents = check_records(collection, PixelCache(1.0), 0.34, calls.append)
    assert usable == [0, 1, 2, 3, 4, 5]
    assert [s.image for s in skipped] == ["gone.png", "6.png", "7.png"]  # the reader's part first
    assert "cut short" in skipped[1].reason
    assert "neither PNG" in skipped[2].reason
    assert calls == list(range(1, 9))
    assert check_records(collection, PixelCache(0.0), 0.34) == (usable, skipped, contents)


def test_an_image_that_is_mostly_padding_is_listed(tmp_path, save_png):
    """It would give views without a single valid token, which no dense method can use."""
    picture = np.zeros((100, 100), np.uint8)
    picture[40:52, 40:52] = np.arange(144, dtype=np.uint8).reshape(12, 12) + 20
    save_png("stamp.png", picture)
    save_png("whole.png", np.tile(np.arange(100, dtype=np.uint8) + 50, (100, 1)))
    collection = Collection("x", (), records_of([tmp_path / "stamp.png", tmp_path / "whole.png"]))
    usable, skipped, _ = check_records(collection, PixelCache(1.0), 0.5)
    assert usable == [1]
    assert "only 1.4% of its area is a picture" in skipped[0].reason


def test_check_records_fills_the_cache():
    images = [Counted() for _ in range(5)]
    collection = Collection("x", (), [Record(image, str(i), str(i)) for i, image in enumerate(images)])
    cache = PixelCache(1.0)
    check_records(collection, cache, 0.0)
    for image in images:
        cache.get(image)
        assert image.count == 1


def test_limit_of_skipped_and_the_number_to_set(folder):
    """3 of 9: the message must name a value that is enough."""
    collection = Collection("folder:x", (), records_of(sorted(folder.glob("*.png"))), (Skipped("gone.png", "missing"),))
    match = r"3 of 9 images of folder:x .*\(first: gone.png: missing\); at most 5.0% .* set data.max_skipped to 0.334"
    with pytest.raises(DataError, match=match):
        check_records(collection, PixelCache(1.0), 0.05)
    with pytest.raises(DataError, match=match.replace("5.0", "33.3")):
        check_records(collection, PixelCache(1.0), 0.333)
    assert len(check_records(collection, PixelCache(1.0), 0.334)[0]) == 6


def test_share_at_the_limit_is_allowed():
    """29 of 100 is 0.29, although 0.29 * 100 is less than 29 in floating point."""
    good = Counted()
    records = [Record(good, str(i), str(i)) for i in range(71)]
    collection = Collection("x", (), records, tuple(Skipped(str(i), "missing") for i in range(29)))
    assert len(check_records(collection, PixelCache(1.0), 0.29)[1]) == 29
    with pytest.raises(DataError, match="to 0.290"):
        check_records(collection, PixelCache(1.0), 0.289)


def test_nothing_usable_is_an_error_at_any_limit(folder):
    broken = Collection("folder:x", (), records_of([folder / "6.png", folder / "7.png"]))
    with pytest.raises(DataError, match=r"2 of 2 images .*6.png.*check data.source"):
        check_records(broken, PixelCache(1.0), 1.0)
    with pytest.raises(DataError, match="folder:x has no images; check data.source"):
        check_records(Collection("folder:x", (), []), PixelCache(1.0), 1.0)


def test_write_skipped(tmp_path):
    path = tmp_path / "skipped.csv"
    listed = [Skipped("a.png", 'has a comma, a "quote"\nand a line'), Skipped("M\udcfcller.png", "missing ü")]
    write_skipped(path, listed)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["image", "reason"], list(listed[0][:2]), ["M\\udcfcller.png", "missing ü"]]
    write_skipped(path, [])
    assert path.read_text() == "image,reason\n"
    assert [p.name for p in tmp_path.iterdir()] == ["skipped.csv"]


def test_data_config():
    assert DataConfig("phantom:3").max_skipped == 0.05
    for change, words in (
        ({"max_skipped": 1.5}, r"data.max_skipped is a share in \[0, 1\], received 1.5"),
        ({"max_skipped": -0.1}, "data.max_skipped"),
        ({"workers": -1}, "data.workers"),
        ({"cache_gb": -1.0}, "data.cache_gb"),
    ):
        with pytest.raises(ConfigError, match=words):
            DataConfig("phantom:3", **change)


# ------------------------------------------------------------------------------------------------- order and loading


def epoch_of(batches, epoch):
    batches.epoch = epoch
    return list(batches)


def test_every_index_at_most_once_an_epoch():
    indices = [3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377]
    batches = EpochBatches(indices, 4, seed=0)
    assert len(batches) == 2
    orders = []
    for epoch in range(30):
        got = epoch_of(batches, epoch)
        assert [len(batch) for batch in got] == [4, 4]
        flat = [item for batch in got for item in batch]
        assert {e for e, _ in flat} == {epoch}
        chosen = [index for _, index in flat]
        assert len(set(chosen)) == 8
        assert set(chosen) <= set(indices)
        assert all(type(index) is int for index in chosen)
        orders.append(tuple(chosen))
        assert epoch_of(batches, epoch) == got  # again the same
    assert len(set(orders)) == 30
    left_out = {i for order in orders for i in set(indices) - set(order)}
    assert left_out == set(indices)  # nobody is left out for ever


def test_order_depends_on_the_seed():
    a, b, c = (EpochBatches(range(50), 10, seed) for seed in (0, 0, 1))
    assert epoch_of(a, 3) == epoch_of(b, 3)
    assert epoch_of(a, 3) != epoch_of(c, 3)
    assert epoch_of(a, 0) != list(EpochBatches(range(50), 10, 1))


def test_resume_skips_exactly_the_batches_done():
    whole = EpochBatches(range(23), 4, seed=7)
    expected = epoch_of(whole, 2)
    assert len(expected) == 5
    for first in range(6):
        resumed = EpochBatches(range(23), 4, seed=7)
        resumed.first = first
        assert epoch_of(resumed, 2) == expected[first:]
        assert len(resumed) == 5  # a whole epoch


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_change_no_byte(folder):
    records = records_of(sorted(folder.glob("[0-5].png")))
    loaded = []
    for workers, limit in ((0, 1.0), (0, 0.0), (2, 1.0)):
        dataset = ViewDataset(records, range(6), ViewsConfig(size=16, clean=True), 5, PixelCache(limit))
        batches = EpochBatches(range(6), 2, seed=5)
        batches.epoch = 4
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=join_views, num_workers=workers)
        loaded.append(list(loader))
        assert len(loaded[-1]) == 3
    for other in loaded[1:]:
        for (a, lost_a), (b, lost_b) in zip(loaded[0], other, strict=True):
            assert lost_a == lost_b == ()
            assert torch.equal(a.geometry, b.geometry)
            for x, y in zip((*a.views, *a.valid, *a.clean), (*b.views, *b.valid, *b.clean), strict=True):
                assert x.numpy().tobytes() == y.numpy().tobytes()


def test_items_depend_on_epoch_and_index(folder):
    records = records_of(sorted(folder.glob("[0-5].png")))
    dataset = ViewDataset([records[0], records[0]], [0, 1], ViewsConfig(size=16), 5, PixelCache(1.0))
    views = [dataset[item].batch.views[0] for item in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])  # the same image as another record: other views
    assert torch.equal(dataset[(0, 0)].batch.views[0], views[0])
    other = ViewDataset(records, range(6), ViewsConfig(size=16), 6, PixelCache(1.0))
    assert not torch.equal(other[(0, 0)].batch.views[0], views[0])


# --------------------------------------------------------------------------------------------------------- stand-ins


class Fading:
    """An image that can be read so many times."""

    def __init__(self, value, times, name=""):
        self.value, self.times, self.name = value, times, name

    def __str__(self):
        return self.name

    def radiograph(self):
        self.times -= 1
        if self.times < 0:
            raise DataError("the disk is gone")
        image = torch.full((1, 20, 20), self.value)
        image[0, 0, 0] = 0.0
        return Radiograph(image, torch.ones_like(image, dtype=torch.bool), None)


def fading(times):
    """A data set of images with one grey value each; image i can be read ``times[i]`` times."""
    records = [Record(Fading((i + 1) / 16, n, f"{i}.png"), str(i), str(i)) for i, n in enumerate(times)]
    usable = [i for i, n in enumerate(times) if n >= 0]
    return ViewDataset(records, usable, ViewsConfig(size=16), 3, PixelCache(0.0))


def same_views(a, b):
    return torch.equal(a.geometry, b.geometry) and all(map(torch.equal, a.views, b.views))


def test_another_image_stands_in_for_one_that_is_lost():
    """The same one whenever it is asked for, drawn from (seed, epoch, index); the views stay those of the index."""
    whole, broken = fading([999] * 8), fading([999, 999, 0, 999, 999, 999, 999, 999])
    levels = set()
    for epoch in range(12):
        got = broken[(epoch, 2)]
        assert {item.image for item in got.lost} == {"2.png"}
        assert got.lost[0].reason == f"unreadable in epoch {epoch + 1}: the disk is gone"
        assert same_views(broken[(epoch, 2)].batch, got.batch)
        assert torch.equal(got.batch.geometry, whole[(epoch, 2)].batch.geometry)
        assert not same_views(got.batch, whole[(epoch, 2)].batch)
        levels.add(float(got.batch.views[0].median()))
    assert len(levels) > 2  # not always the same one
    for index in (0, 1, 3):  # nobody else is touched
        assert same_views(broken[(0, index)].batch, whole[(0, index)].batch)
        assert broken[(0, index)].lost == ()


def test_what_was_left_out_at_the_start_never_stands_in():
    times = [0] + [-1] * 8 + [999]  # 1 to 8 were unreadable when the run began: only 9 (and 0 itself) may stand in
    dataset = fading(times)
    for epoch in range(5):
        lost = {item.image for item in dataset[(epoch, 0)].lost}
        assert lost == {"0.png"}


def test_all_images_gone_is_an_error_not_a_loop():
    dataset = fading([0] * 6)
    with pytest.raises(DataError, match=r"10 images in a row cannot be read .*the disk is gone\); is the folder still"):
        dataset[(0, 0)]


def test_a_joined_batch_lists_what_all_of_its_samples_lost():
    dataset = fading([99, 0, 99, 0, 99, 99, 99, 99])
    joined = join_views([dataset[(0, i)] for i in range(4)])
    assert joined.batch.views[0].shape[0] == 4
    assert {item.image for item in joined.lost} == {"1.png", "3.png"}


# ----------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_pieces_put_together_are_the_batches_of_one_process(processes, accumulate, first):
    """Whatever it runs on, step k sees the same images, in the same order, wherever it begins."""
    indices, size = range(100, 157), 24

    def batches(process=0, processes=1, accumulate=1):
        sampler = EpochBatches(indices, size, 11, process=process, processes=processes, accumulate=accumulate)
        sampler.epoch, sampler.first = 5, first
        assert len(sampler) == 2
        return list(sampler)

    whole = batches()
    assert len(whole) == 2 - first
    pieces = [batches(process, processes, accumulate) for process in range(processes)]
    for own in pieces:
        assert len(own) == accumulate * len(whole)
        assert {len(piece) for piece in own} == {size // (processes * accumulate)}
    for number, expected in enumerate(whole):
        steps = [own[number * accumulate : (number + 1) * accumulate] for own in pieces]
        together = [item for part in range(accumulate) for own in steps for item in own[part]]
        assert together == expected


# --------------------------------------------------------------------------------------------------------- contents


def contents_of(images, **how):
    records = [Record(image, str(i), str(i)) for i, image in enumerate(images)]
    return check_records(Collection("x", (), records), PixelCache(1.0), 0.9, **how).contents


class Grey:
    def __init__(self, pixels):
        self.pixels = torch.as_tensor(pixels, dtype=torch.float32)[None]

    def radiograph(self):
        return Radiograph(self.pixels.clone(), torch.ones_like(self.pixels, dtype=torch.bool), None)


def test_contents_change_with_a_pixel_and_nothing_else():
    pictures = np.random.default_rng(4).random((6, 12, 10))
    before = contents_of([Grey(picture) for picture in pictures])
    assert len(before) == 16
    assert contents_of([Grey(picture) for picture in pictures]) == before
    changed = pictures.copy()
    changed[3, 5, 5] += 2 / 65535
    assert contents_of([Grey(picture) for picture in changed]) != before
    swapped = pictures[[1, 0, 2, 3, 4, 5]]
    assert contents_of([Grey(picture) for picture in swapped]) != before
    assert contents_of([Grey(picture) for picture in pictures[:5]]) != before
    turned = [Grey(picture.reshape(10, 12)) for picture in pictures]
    assert contents_of(turned) != before


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_contents_do_not_depend_on_who_reads(processes):
    """Each process reads its share; ``everyone`` gathers, and all know the same as one that reads everything."""
    images = [Grey(picture) for picture in np.random.default_rng(4).random((7, 6, 6))]
    images[4] = Fading(0.5, 0)  # broken: found by one process, known to all
    collection = Collection("x", (), [Record(image, f"{i}.png", str(i)) for i, image in enumerate(images)])
    alone = check_records(collection, PixelCache(1.0), 0.9)
    assert alone.usable == [0, 1, 2, 3, 5, 6]
    shares = []

    def check(process, everyone):
        return check_records(
            collection, PixelCache(1.0), 0.9, process=process, processes=processes, everyone=everyone
        )  # fmt: skip

    def note(share):
        shares.append(share)
        raise LookupError

    for process in range(processes):
        with pytest.raises(LookupError):
            check(process, note)
    assert sorted(index for share in shares for index in share) == list(range(7))  # nobody reads what another reads
    for gathered in (shares, shares[::-1]):
        assert check(1, lambda share, gathered=gathered: gathered) == alone


def test_whole_images_for_evaluation(folder):
    paths = sorted(folder.glob("[0-5].png"))
    dataset = ImageDataset(records_of(paths), 20, PixelCache(1.0))
    assert len(dataset) == 6
    for index, path in enumerate(paths):
        assert dataset[index].shape == (1, 20, 20)
        assert dataset[index].dtype == torch.float32
        assert torch.equal(dataset[index], fit_square(load_image(path), 20))
    assert torch.stack([dataset[i] for i in range(6)]).shape == (6, 1, 20, 20)
    phantoms = open_collection("phantom:2,size=32").records
    assert ImageDataset(phantoms, 32, PixelCache(0.0))[1].shape == (1, 32, 32)
    assert isinstance(paths[0], Path)
