"""What all tests share: the real data where it exists, one thread, and files that are written by hand."""

import functools
import os
import struct
import zlib
from pathlib import Path

# Triton looks once, when it is imported first, whether it is to interpret: before torch or a test does so
if os.environ.get("OTCXR_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from otcxr.data import phantom
from otcxr.memory import keep_memory

keep_memory()
_RENDER = phantom.render
_DRAWN = functools.lru_cache(maxsize=8192)(_RENDER)
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The test images are tiny: threads only cost, and a CPU shared with others then gives the same sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn_once(config, index):
    """``phantom.render``, which a process does once for each small phantom."""
    return _DRAWN(config, index).copy() if config.size <= 64 else _RENDER(config, index)


@pytest.fixture(scope="module", autouse=True)
def _phantoms_once(request):
    """Most tests look at the same few phantoms. Not where phantoms are the matter."""
    if "phantom" in request.module.__name__:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "render", drawn_once)
        yield


@pytest.fixture(autouse=True)
def config_home(tmp_path_factory, monkeypatch):
    """A configuration folder of its own: no test makes the site's key in the user's."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder / "otcxr"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real radiographs and label files, which the repository does not contain."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data are not here: {SHARED_DATA} does not exist")
    return SHARED_DATA


def _png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encode_png(pixels, *, colour=None, depth=None, extra=()):
    """Encode (H, W) or (H, W, C) integers as PNG, after RFC 2083 and without any library of images.

    ``colour`` is the PNG colour type (0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA), by default from C. ``extra``:
    chunks (kind, content) that go before the pixels. Below 8 bits, ``depth`` packs several pixels into a byte.
    """
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour is None else colour
    depth = 8 * pixels.dtype.itemsize if depth is None else depth
    flat = pixels.reshape(height, -1)
    if depth < 8:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1)
        rows = np.packbits(bits, axis=1)
    else:
        rows = flat.astype(">u2" if depth == 16 else np.uint8)
    return b"".join((
        b"\x89PNG\r\n\x1a\n",
        _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *(_png_chunk(kind, content) for kind, content in extra),
        _png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        _png_chunk(b"IEND", b""),
    ))  # fmt: skip


@pytest.fixture
def save_png(tmp_path):
    """Function that writes integers as ``NAME`` below tmp_path, by default a small random 8-bit picture."""

    def save(name, pixels=None, **options):
        if pixels is None:
            pixels = np.random.default_rng(len(name)).integers(20, 230, (24, 32), dtype=np.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels, **options))
        return path

    return save
