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
    read_pixels,
    write_skipped,
)
from otcxr.data.images import fit_square, load_image
from otcxr.data.records import Collection, Radiograph, Record, Skipped
from otcxr.data.sources import open_collection
from otcxr.data.views import ViewsConfig, collate_views
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
    usable, skipped = check_records(collection, PixelCache(1.0), 0.34, calls.append)
    assert usable == [0, 1, 2, 3, 4, 5]
    assert [s.image for s in skipped] == ["gone.png", "6.png", "7.png"]  # the reader's part first
    assert "cut short" in skipped[1].reason
    assert "neither PNG" in skipped[2].reason
    assert calls == list(range(1, 9))
    assert check_records(collection, PixelCache(0.0), 0.34)[0] == usable


def test_an_image_that_is_mostly_padding_is_listed(tmp_path, save_png):
    """It would give views without a single valid token, which no dense method can use."""
    picture = np.zeros((100, 100), np.uint8)
    picture[40:52, 40:52] = np.arange(144, dtype=np.uint8).reshape(12, 12) + 20
    save_png("stamp.png", picture)
    save_png("whole.png", np.tile(np.arange(100, dtype=np.uint8) + 50, (100, 1)))
    collection = Collection("x", (), records_of([tmp_path / "stamp.png", tmp_path / "whole.png"]))
    usable, skipped = check_records(collection, PixelCache(1.0), 0.5)
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
        dataset = ViewDataset(records, ViewsConfig(size=16, clean=True), 5, PixelCache(limit))
        batches = EpochBatches(range(6), 2, seed=5)
        batches.epoch = 4
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate_views, num_workers=workers)
        loaded.append(list(loader))
        assert len(loaded[-1]) == 3
    for other in loaded[1:]:
        for a, b in zip(loaded[0], other, strict=True):
            assert torch.equal(a.geometry, b.geometry)
            for x, y in zip((*a.views, *a.valid, *a.clean), (*b.views, *b.valid, *b.clean), strict=True):
                assert x.numpy().tobytes() == y.numpy().tobytes()


def test_items_depend_on_epoch_and_index(folder):
    records = records_of(sorted(folder.glob("[0-5].png")))
    dataset = ViewDataset([records[0], records[0]], ViewsConfig(size=16), 5, PixelCache(1.0))
    views = [dataset[item].views[0] for item in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])  # the same image as another record: other views
    assert torch.equal(dataset[(0, 0)].views[0], views[0])
    other = ViewDataset(records, ViewsConfig(size=16), 6, PixelCache(1.0))
    assert not torch.equal(other[(0, 0)].views[0], views[0])


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
