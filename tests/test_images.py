"""From files to pixels: every format exactly, DICOM as PS3.3 defines it, and no broken file passes for a picture."""

import logging
import struct
import threading
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian

from conftest import encode_png
from otcxr.data.decode import inside_border, is_dicom
from otcxr.data.dicom import read_header
from otcxr.data.images import box_in_square, fit_square, load_image, load_radiograph
from otcxr.data.png import fault, header, inflated, png_size
from otcxr.data.records import Box
from otcxr.errors import DataError


def noise(shape, low=20, high=230, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape, dtype=dtype)


def smooth(height=48, width=64, seed=0):
    """A smooth 8-bit picture, on which JPEG loses little."""
    rough = noise((height, width), seed=seed).astype(np.float32)
    low = cv2.GaussianBlur(rough, (0, 0), 6)
    return np.round(20 + 200 * (low - low.min()) / np.ptp(low)).astype(np.uint8)


def put(folder, data, name="x.png"):
    path = folder / name
    path.write_bytes(data)
    return path


def dicom(stored, *, syntax=ExplicitVRLittleEndian, drop=(), **attributes):
    """Bytes of a DICOM file: ``stored`` as 8 or 16 bits, 12 of them used by default, plus any attributes by keyword."""
    stored = np.asarray(stored)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"  # Computed Radiography
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    file = FileDataset(
        None, {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False,
        is_little_endian=syntax != ExplicitVRBigEndian,
    )  # fmt: skip
    file.SOPClassUID, file.SOPInstanceUID, file.Modality = meta.MediaStorageSOPClassUID, "1.2.3.4", "CR"
    file.Rows, file.Columns = stored.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = 8 * stored.dtype.itemsize
    file.BitsStored = attributes.pop("BitsStored", min(12, file.BitsAllocated))
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    file.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    file["PixelData"].VR = "OB" if file.BitsAllocated == 8 else "OW"
    for name, value in attributes.items():
        setattr(file, name, value)
    for name in drop:
        delattr(file, name)
    buffer = BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def lut(first, bits, entries, vr="US"):
    """One item of a VOI or modality LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 2**16, first, bits])
    if vr == "OW":
        item.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes())
    elif vr == "bytes":
        item.add_new("LUTData", "OW", np.asarray(entries, np.uint8).tobytes())
    else:
        item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return [item]


@pytest.fixture
def stored():
    """Every 12-bit value once and in no order, (64, 64)."""
    return np.random.default_rng(3).permutation(4096).reshape(64, 64).astype(np.uint16)


def pixels_of(tmp_path, data, name="x.dcm"):
    return load_radiograph(put(tmp_path, data, name)).image[0].double().numpy()


# ---------------------------------------------------------------------------------------------------- PNG and JPEG


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_grey_png_is_divided_by_the_largest_value_of_its_type(tmp_path, dtype, top):
    pixels = np.random.default_rng(0).permutation(np.linspace(0, top, 63 * 65).astype(dtype)).reshape(63, 65)
    got = load_radiograph(put(tmp_path, encode_png(pixels)))
    assert got.image.dtype == torch.float32
    assert got.valid.dtype == torch.bool
    assert got.image.shape == got.valid.shape == (1, 63, 65)
    assert got.valid.all()
    assert got.spacing is None
    assert np.array_equal(got.image[0].numpy(), pixels.astype(np.float32) / np.float32(top))
    assert got.image.min() == 0
    assert got.image.max() == 1
    assert torch.equal(load_image(str(tmp_path / "x.png")), got.image)  # a text as path, too


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_grey_in_colour_and_alpha_is_exact(tmp_path, dtype, channels):
    top = np.iinfo(dtype).max
    grey = noise((20, 30), top // 10, top - top // 10, dtype)
    pixels = np.repeat(grey[..., None], channels, axis=2)
    alpha = np.full_like(grey, top)
    alpha[:6, :9] = 0
    alpha[10:12, :] = 1  # nearly transparent is still a pixel
    if channels in (2, 4):
        pixels[..., -1] = alpha
    got = load_radiograph(put(tmp_path, encode_png(pixels)))
    assert np.array_equal(got.image[0].numpy(), grey.astype(np.float32) / np.float32(top))
    expected = alpha > 0 if channels in (2, 4) else np.ones_like(grey, bool)
    assert np.array_equal(got.valid[0].numpy(), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colour_becomes_luminance(tmp_path, dtype):
    top = np.iinfo(dtype).max
    pixels = noise((20, 30, 3), 0, top, dtype)
    got = load_image(put(tmp_path, encode_png(pixels)))[0].double().numpy()
    expected = pixels.astype(np.float64) @ (0.299, 0.587, 0.114) / top
    # channels in order, weights of BT.601; OpenCV's fixed-point arithmetic is good to a step of 8 bits, 1e-4 of 16
    assert np.abs(got - expected).max() < {255: 0.6 / 255, 65535: 1e-4}[top]


def test_palette_and_few_bits_are_their_grey_values(tmp_path):
    index = noise((20, 30), 0, 256)
    grey = np.random.default_rng(4).permutation(256).astype(np.uint8)
    palette = (b"PLTE", np.repeat(grey[:, None], 3, axis=1).tobytes())
    got = load_radiograph(put(tmp_path, encode_png(index, colour=3, extra=(palette,))))
    assert np.array_equal(got.image[0].numpy(), grey[index].astype(np.float32) / np.float32(255))
    clear = (b"tRNS", bytes(100 * [0] + 156 * [255]))
    got = load_radiograph(put(tmp_path, encode_png(index, colour=3, extra=(palette, clear))))
    assert np.array_equal(got.valid[0].numpy(), index >= 100)
    for depth in (1, 2, 4):
        pixels = noise((21, 31), 0, 2**depth)
        got = load_image(put(tmp_path, encode_png(pixels, depth=depth)))[0].numpy()
        assert np.abs(got - pixels / (2**depth - 1)).max() < 1e-6, depth


def rewritten(data, edit):
    """A PNG with its chunks (kind, content) after ``edit``, checksums right."""
    at, chunks = 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return data[:8] + b"".join(
        len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in edit(chunks)
    )


@pytest.mark.parametrize("shape", [(9, 11), (300, 400), (300, 400, 2), (300, 400, 3), (40, 50, 4)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_an_inflated_png_shows_the_same(shape, kind):
    """More than one stored block, several data chunks, chunks after the data."""
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)

    def edit(chunks):
        for name, content in chunks:
            parts = [content[k : k + 1000] for k in range(0, len(content), 1000)] if name == b"IDAT" else [content]
            yield from ((name, part) for part in parts)
            if name == b"IDAT":
                yield b"tEXt", b"Comment\0after the data"

    filtered = () if shape[2:] == (2,) else (cv2.imencode(".png", pixels)[1].tobytes(),)
    for data in (encode_png(pixels), rewritten(encode_png(pixels), edit), *filtered):
        stored = inflated(data)
        assert fault(stored) is None
        assert header(stored) == header(data)
        assert len(stored) > shape[0] * header(data).row_bytes
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED), expected)


def test_an_interlaced_png_is_left_to_the_decoder(tmp_path):
    pixels = noise((40, 50))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx])

    def edit(chunks):
        for name, content in chunks:
            yield name, {b"IHDR": content[:12] + b"\1", b"IDAT": zlib.compress(raw)}.get(name, content)

    data = rewritten(encode_png(pixels), edit)
    assert header(data).interlaced
    assert inflated(data) is data
    assert np.array_equal(load_image(put(tmp_path, data))[0].numpy(), pixels.astype(np.float32) / np.float32(255))


def test_data_that_are_damaged_under_right_checksums(tmp_path):
    """OpenCV would show what came before the damage, and grey or nothing below."""
    pixels = noise((30, 40))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    good = zlib.compress(rows)
    faults = {
        "a row short": zlib.compress(rows[:-41]), "cut": good[:-8],
        "another checksum": good[:-1] + bytes([good[-1] ^ 1]), "no deflate": b"\x78\x9c" + b"\xff" * 40,
        "empty": b"",
    }  # fmt: skip
    for what, packed in faults.items():
        data = rewritten(
            encode_png(pixels),
            lambda chunks, p=packed: ((name, p if name == b"IDAT" else content) for name, content in chunks),
        )
        assert fault(data) is None, what
        assert inflated(data) is None, what
        with pytest.raises(DataError, match="its data are damaged; copy it again"):
            load_image(put(tmp_path, data))
    more = rewritten(
        encode_png(pixels),
        lambda chunks: ((n, zlib.compress(rows + bytes(10_000_000)) if n == b"IDAT" else c) for n, c in chunks),
    )
    assert len(inflated(more)) < 2000  # what is beyond the picture is not inflated: it could fill the memory
    assert np.array_equal(load_image(put(tmp_path, more))[0].numpy(), pixels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.JPG"])
@pytest.mark.parametrize("colour", [False, True])
def test_jpeg(tmp_path, name, colour):
    pixels = smooth()
    shown = np.repeat(pixels[..., None], 3, axis=2) if colour else pixels
    data = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    got = load_radiograph(put(tmp_path, data, name))
    assert got.image.shape == (1, 48, 64)
    assert got.image.dtype == torch.float32
    assert np.abs(got.image[0].numpy() - pixels / 255).max() < 3 / 255
    assert 0 <= got.image.min() <= got.image.max() <= 1


def test_upper_case_suffix_and_content_decides(tmp_path):
    """The content tells PNG from JPEG and DICOM; files are renamed in the wild."""
    pixels = noise((20, 30))
    expected = pixels.astype(np.float32) / np.float32(255)
    for name in ("A.PNG", "a.Png", "a.jpg"):
        assert np.array_equal(load_image(put(tmp_path, encode_png(pixels), name))[0].numpy(), expected)
    data = dicom(pixels, BitsStored=8)
    assert is_dicom(data)
    for name in ("A.DCM", "a.dicom", "a.png"):
        assert np.array_equal(load_image(put(tmp_path, data, name))[0].numpy(), expected)


def test_real_rgba_originals(shared_data):
    """Two of the originals have an alpha channel, opaque everywhere: they are grey radiographs like the others."""
    mini = shared_data / "nih-mini"
    for name in ("00000773_001.png", "00001054_002.png"):
        data = (mini / "originals" / name).read_bytes()
        assert data[25] == 6  # colour type RGBA
        got = load_radiograph(mini / "originals" / name)
        assert got.image.shape == (1, 1024, 1024)
        assert got.valid.float().mean() > 0.9
        small = load_image(mini / "images" / name)
        assert (fit_square(got.image, 256) - small).abs().mean() < 2 / 255


def test_png_size_reads_the_header_only(tmp_path):
    data = encode_png(noise((20, 30)))
    assert png_size(put(tmp_path, data[:24])) == (20, 30)
    for broken, why in ((data[:23], "cut short"), (b"\xff\xd8" + data, "not a PNG")):
        with pytest.raises(DataError, match=why):
            png_size(put(tmp_path, broken))
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read: No such file"):
        png_size(tmp_path / "nowhere.png")


# --------------------------------------------------------------------------------------------------------- broken


def refuse(path, *words):
    """Loading fails with a DataError in one line that names the file, and every word of ``words``."""
    with pytest.raises(DataError) as caught:
        load_radiograph(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_messages_name_the_file_and_what_to_do(tmp_path):
    refuse(tmp_path / "missing.png", "No such file", "check the path")
    refuse(tmp_path, "cannot be read")
    refuse(put(tmp_path, b"", "empty.png"), "0 bytes", "copy it again")
    refuse(put(tmp_path, b"Image Index,Finding Labels\n" * 20, "text.png"), "neither PNG", "b'Image In'", "convert it")
    refuse(put(tmp_path, b"not DICOM" * 50, "text.dcm"), "not a readable DICOM", "convert it")
    refuse(put(tmp_path, encode_png(noise((20, 30)))[:-12]), "cut short", "copy it again")
    refuse(put(tmp_path, cv2.imencode(".jpg", smooth())[1].tobytes()[:-2]), "JPEG", "cut short", "copy it again")
    refuse(put(tmp_path, dicom(noise((20, 30)))[:-300]), "copy it again")


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_image_is_refused(tmp_path, value):
    flat = np.full((16, 16), value, np.uint8)
    for data, name in ((encode_png(flat), "a.png"), (dicom(flat, BitsStored=8), "a.dcm")):
        refuse(put(tmp_path, data, name), "every pixel is", f"{value / 255:.3f}")


def test_image_without_a_valid_pixel_is_refused(tmp_path):
    """Views of it would be black and without a single token."""
    picture = noise((16, 16))
    refuse(put(tmp_path, encode_png(np.dstack((picture, np.zeros_like(picture))))), "transparent")
    picture[:8], alpha = 99, np.repeat(np.uint8([255, 0]), 8)[:, None].repeat(16, axis=1)
    refuse(put(tmp_path, encode_png(np.dstack((picture, alpha)))), "every pixel is 0.388")  # what shows is constant
    refuse(put(tmp_path, encode_png(np.repeat(np.uint8([0, 255] * 8)[:, None], 16, axis=1))), "black or white")
    refuse(put(tmp_path, dicom(noise((16, 16)), BitsStored=8, PixelPaddingValue=0, PixelPaddingRangeLimit=255)), "padd")


def test_cut_png_is_refused_at_every_length(tmp_path):
    data = encode_png(noise((9, 11)))
    for length in range(len(data)):
        with pytest.raises(DataError, match=r"x\.png"):
            load_radiograph(put(tmp_path, data[:length]))


def test_cut_jpeg_is_refused_at_every_length(tmp_path):
    """Also where an embedded thumbnail brings its own end marker within the last bytes."""
    data = cv2.imencode(".jpg", smooth(16, 16), [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
    thumbnail = cv2.imencode(".jpg", smooth(8, 8))[1].tobytes()
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + data[2:]
    assert load_image(put(tmp_path, data)).shape == (1, 16, 16)
    assert load_image(put(tmp_path, data + b"\0" * 900)).shape == (1, 16, 16)  # padding after the end is common
    for length in range(len(data)):
        refuse(put(tmp_path, data[:length]), "cut short" if length > 1 else "x.png")
    for length in range(2, len(data) - 1, 7):  # as an interrupted copy into a file of full size leaves it
        refuse(put(tmp_path, data[:length] + b"\0" * (len(data) - length)), "cut short")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_cut_dicom_is_refused_at_every_length(tmp_path, syntax):
    data = dicom(noise((12, 10), 0, 4096, np.uint16), syntax=syntax, WindowCenter=2000, WindowWidth=4000)
    assert pixels_of(tmp_path, data).shape == (12, 10)
    whole = pixels_of(tmp_path, data)
    for length in [*range(0, len(data), 3), *range(len(data) - 20, len(data))]:
        path = put(tmp_path, data[:length], "x.dcm")
        if syntax == ExplicitVRLittleEndian or length < len(data) - 16:
            refuse(path)
            continue
        try:  # what follows the pixels (the end of the deflated stream) may be missing
            got = load_radiograph(path).image[0].numpy()
        except DataError:
            continue
        assert np.array_equal(got, whole)


def test_cut_real_dicom_is_refused(tmp_path, shared_data):
    """JPEG inside DICOM: decoders complete a cut stream in grey without a word."""
    path = sorted((shared_data / "dicom").glob("*.dcm"))[0]
    data = path.read_bytes()
    for length in [*range(1, len(data), len(data) // 25), *range(len(data) - 40, len(data) - 4)]:
        refuse(put(tmp_path, data[:length], "x.dcm"), "copy it again" if length > 2000 else "x.dcm")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), kind=st.sampled_from(["png8", "png16", "rgba"])
)
def test_changed_byte_in_a_png_is_noticed(tmp_path, place, flip, kind):
    """A checksum covers every byte but the signature, the lengths and itself; those break the file otherwise."""
    pixels = {"png8": noise((9, 11)), "png16": noise((9, 11), 0, 65000, np.uint16), "rgba": noise((9, 11, 4))}[kind]
    data = bytearray(encode_png(pixels))
    data[int(place * len(data))] ^= flip
    with pytest.raises(DataError, match=r"x\.png"):
        load_radiograph(put(tmp_path, bytes(data)))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), kind=st.sampled_from(["jpg", "dcm"]))
def test_changed_byte_never_ends_in_another_error(tmp_path, place, flip, kind):
    """JPEG and DICOM have no checksum: such a file may load, but it must load as a picture or fail as DataError."""
    data = dicom(noise((9, 11), 0, 4096, np.uint16), WindowCenter=2000, WindowWidth=4000, PixelSpacing=[0.1, 0.2])
    data = bytearray(data if kind == "dcm" else cv2.imencode(".jpg", smooth(16, 16))[1].tobytes())
    data[int(place * len(data))] ^= flip
    try:
        got = load_radiograph(put(tmp_path, bytes(data), f"x.{kind}"))
    except DataError:
        return
    assert got.image.dtype == torch.float32
    assert 0 <= got.image.min() < got.image.max() <= 1


def test_header_that_states_too_many_pixels(tmp_path):
    data = bytearray(encode_png(noise((9, 11))))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    refuse(put(tmp_path, bytes(data)), "60000 x 60000 pixels", "header is damaged")


# ---------------------------------------------------------------------------------------------------------- DICOM


def test_real_pair_of_dicom_files_is_one_and_its_negative(shared_data):
    dark, bright = (load_radiograph(path) for path in sorted((shared_data / "dicom").glob("*.dcm")))
    assert dark.image.shape == bright.image.shape == (1, 1024, 1024)
    assert (dark.image + bright.image - 1).abs().max() < 1e-6
    assert dark.image.std() > 0.1
    assert dark.spacing == (0.168, 0.168)


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, case by case."""
    out = ((x - (center - 0.5)) / (width - 1) + 0.5) if width > 1 else np.zeros_like(x)
    out = np.where(x <= center - 0.5 - (width - 1) / 2, 0.0, out)
    return np.where(x > center - 0.5 + (width - 1) / 2, 1.0, out)


def linear_exact(x, center, width):
    """PS3.3 C.11.2.1.3.2, case by case."""
    out = (x - center) / width + 0.5
    return np.where(x <= center - width / 2, 0.0, np.where(x > center + width / 2, 1.0, out))


def sigmoid(x, center, width):
    """PS3.3 C.11.2.1.3.1."""
    return 0.5 + 0.5 * np.tanh(2 * (x - center) / width)


@pytest.mark.parametrize(
    ("function", "formula"), [(None, linear), ("LINEAR", linear), ("LINEAR_EXACT", linear_exact), ("SIGMOID", sigmoid)]
)
@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1800.5, 1000.0), (3000, 1), (-50, 700)])
def test_window_functions(tmp_path, stored, function, formula, center, width):
    attributes = {} if function is None else {"VOILUTFunction": function}
    got = load_radiograph(put(tmp_path, dicom(stored, WindowCenter=center, WindowWidth=width, **attributes)))
    expected = formula(stored.astype(np.float64), center, width)
    assert np.abs(got.image[0].double().numpy() - expected).max() < 1e-6
    assert got.image.dtype == torch.float32


def test_windows_differ_by_half_a_value(tmp_path, stored):
    """LINEAR and LINEAR_EXACT are easily confused; of a narrow window the values tell them apart."""
    exact = pixels_of(tmp_path, dicom(stored, WindowCenter=8, WindowWidth=16, VOILUTFunction="LINEAR_EXACT"))
    plain = pixels_of(tmp_path, dicom(stored, WindowCenter=8, WindowWidth=16))
    place = stored == 8
    assert exact[place][0] == pytest.approx(0.5, abs=1e-7)
    assert plain[place][0] == pytest.approx(0.5 / 15 + 0.5, abs=1e-7)


def test_first_of_several_windows(tmp_path, stored):
    several = dicom(stored, WindowCenter=[1800, 100], WindowWidth=[1000, 50], WindowCenterWidthExplanation=["a", "b"])
    assert np.array_equal(
        pixels_of(tmp_path, several), pixels_of(tmp_path, dicom(stored, WindowCenter=1800, WindowWidth=1000))
    )


def test_inversion(tmp_path, stored):
    window = {"WindowCenter": 1800, "WindowWidth": 3000}
    plain = pixels_of(tmp_path, dicom(stored, **window))
    for attributes in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},  # as DX files say it: once
    ):
        assert np.abs(pixels_of(tmp_path, dicom(stored, **window, **attributes)) + plain - 1).max() < 1e-6, attributes
    same = pixels_of(tmp_path, dicom(stored, **window, PresentationLUTShape="IDENTITY"))
    assert np.array_equal(same, plain)


@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -1000.0), (-1.0, 4095.0), (0.25, 0.0)])
def test_rescale_goes_before_the_window(tmp_path, stored, slope, intercept):
    data = dicom(stored, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=900, WindowWidth=1500)
    expected = linear(stored * slope + intercept, 900, 1500)
    assert np.abs(pixels_of(tmp_path, data) - expected).max() < 1e-6


def test_signed_pixels(tmp_path, stored):
    signed = (stored.astype(np.int16) - 2048).astype(np.int16)
    data = dicom(signed, WindowCenter=-100, WindowWidth=900)
    assert np.abs(pixels_of(tmp_path, data) - linear(signed.astype(np.float64), -100, 900)).max() < 1e-6


def test_bits_above_those_stored_are_not_pixels(tmp_path, stored):
    """Old files keep overlays in the unused high bits."""
    overlay = stored | np.uint16(0xF000) * (stored % 3 == 0)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(pixels_of(tmp_path, dicom(overlay, **window)), pixels_of(tmp_path, dicom(stored, **window)))


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_voi_table_goes_before_the_window(tmp_path, stored, bits, vr):
    """A table of 8-bit entries needs no 8-bit index; the values outside the table take its ends."""
    entries = np.round((2**bits - 1) * np.linspace(0, 1, 3000) ** 2).astype(int)
    data = dicom(stored, VOILUTSequence=lut(500, bits, entries, vr), WindowCenter=1, WindowWidth=2)
    expected = entries[np.clip(stored.astype(int) - 500, 0, 2999)] / (2**bits - 1)
    assert np.abs(pixels_of(tmp_path, data) - expected).max() < 1e-6


def test_voi_table_of_packed_bytes_and_all_entries(tmp_path, stored):
    entries = noise(4096, 0, 256)
    data = dicom(stored, VOILUTSequence=lut(0, 8, entries, "bytes"))
    assert np.abs(pixels_of(tmp_path, data) - entries[stored] / 255).max() < 1e-6
    entries = np.arange(65536)  # 0 in the descriptor stands for 65536
    data = dicom(stored * np.uint16(16), BitsStored=16, VOILUTSequence=lut(0, 16, entries, "OW"))
    assert np.abs(pixels_of(tmp_path, data) - stored * 16 / 65535).max() < 1e-6


def test_voi_table_in_a_big_endian_file(tmp_path, stored):
    item = lut(0, 12, range(4096), "OW")
    item[0].LUTData = np.arange(4096, dtype=">u2").tobytes()
    data = dicom(stored, syntax=ExplicitVRBigEndian, VOILUTSequence=item)
    assert np.abs(pixels_of(tmp_path, data) - stored / 4095).max() < 1e-6


def test_voi_table_over_rescaled_and_signed_values(tmp_path, stored):
    """Modality values may be negative although the stored ones are not: the index must not wrap around."""
    entries = np.arange(4096)
    signed = (stored.astype(np.int16) - 2048).astype(np.int16)
    for data in (
        dicom(signed, VOILUTSequence=lut(-2048, 12, entries)),
        dicom(stored, RescaleSlope=1, RescaleIntercept=-2048, VOILUTSequence=lut(65536 - 2048, 12, entries)),
    ):
        assert np.abs(pixels_of(tmp_path, data) - stored / 4095).max() < 1e-6
    data = dicom(stored, RescaleSlope=1, RescaleIntercept=-2048, VOILUTSequence=lut(0, 12, entries))
    assert np.abs(pixels_of(tmp_path, data) - np.maximum(stored.astype(int) - 2048, 0) / 4095).max() < 1e-6


def test_modality_table_of_twelve_bits(tmp_path, stored):
    entries = np.arange(4095, -1, -1)
    window = {"WindowCenter": 1000, "WindowWidth": 2000}
    data = dicom(stored, ModalityLUTSequence=lut(0, 12, entries), **window)
    assert np.abs(pixels_of(tmp_path, data) - linear(4095.0 - stored, 1000, 2000)).max() < 1e-6


def test_table_that_is_too_short_is_refused(tmp_path, stored):
    item = lut(0, 12, range(4096), "OW")
    item[0].LUTData = item[0].LUTData[:4000]
    refuse(put(tmp_path, dicom(stored, VOILUTSequence=item), "x.dcm"), "look-up table", "4096")


def test_padding_is_not_valid(tmp_path, stored):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    stored[10:14, 20:30] = 7
    got = load_radiograph(put(tmp_path, dicom(stored, PixelPaddingValue=7, **window)))
    assert np.array_equal(got.valid[0].numpy(), stored != 7)
    for low, high in ((100, 160), (160, 100)):  # MONOCHROME1 files state the limit below the value
        data = dicom(stored, PixelPaddingValue=low, PixelPaddingRangeLimit=high, **window)
        got = load_radiograph(put(tmp_path, data))
        assert np.array_equal(got.valid[0].numpy(), (stored < 100) | (stored > 160))
    signed = (stored.astype(np.int16) - 2048).astype(np.int16)
    got = load_radiograph(put(tmp_path, dicom(signed, PixelPaddingValue=-2041, **window)))
    assert np.array_equal(got.valid[0].numpy(), signed != -2041)


def test_without_window_eight_bits_are_stated_and_more_are_percentiles(tmp_path, stored, caplog):
    pixels = noise((20, 30))
    assert np.abs(pixels_of(tmp_path, dicom(pixels, BitsStored=8)) - pixels / 255).max() < 1e-6
    six = dicom(noise((20, 30), 0, 64), BitsStored=6)
    assert np.abs(pixels_of(tmp_path, six) - noise((20, 30), 0, 64) / 63).max() < 1e-6
    identity = dicom(pixels, BitsStored=8, RescaleSlope=1, RescaleIntercept=0)  # as many secondary captures say
    assert np.abs(pixels_of(tmp_path, identity) - pixels / 255).max() < 1e-6
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="otcxr.data.dicom"):
        got = pixels_of(tmp_path, dicom(stored))
    low, high = np.percentile(stored, (0.5, 99.5))
    assert np.abs(got - np.clip((stored - low) / (high - low), 0, 1)).max() < 1e-6
    assert "no window" in caplog.text
    assert "x.dcm" in caplog.text


def test_padding_does_not_shift_the_percentiles(tmp_path, stored):
    """A third of the image padded with a value far away would leave the anatomy in a few grey levels."""
    inner = stored // 16 + 2000
    framed = inner.copy()
    framed[:20] = 0
    got = load_radiograph(put(tmp_path, dicom(framed, PixelPaddingValue=0)))
    low, high = np.percentile(inner[20:], (0.5, 99.5))
    expected = np.clip((inner[20:] - low) / (high - low), 0, 1)
    assert np.abs(got.image[0, 20:].double().numpy() - expected).max() < 1e-6
    assert not got.valid[0, :20].any()
    assert got.valid[0, 20:].all()


def test_colour_frames_and_no_pixels_are_refused(tmp_path, stored):
    refuse(put(tmp_path, dicom(stored, NumberOfFrames=2, PixelData=stored.tobytes() * 2), "x.dcm"), "2 frame(s)")
    colour = noise((16, 16, 3))
    data = dicom(colour, BitsStored=8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    refuse(put(tmp_path, data, "x.dcm"), "'RGB'", "convert it")
    lying = dicom(colour, BitsStored=8, SamplesPerPixel=3, PlanarConfiguration=0)  # says MONOCHROME2
    refuse(put(tmp_path, lying, "x.dcm"), "shape (16, 16, 3)")
    refuse(put(tmp_path, dicom(stored, drop=("PixelData",)), "x.dcm"), "no pixels")
    refuse(put(tmp_path, dicom(stored, drop=("PhotometricInterpretation",)), "x.dcm"), "photometric interpretation ''")
    refuse(put(tmp_path, dicom(stored)[128:], "x.dcm"), "not a readable DICOM")
    refuse(put(tmp_path, dicom(np.full_like(stored, 9)), "x.dcm"), "constant")


@pytest.mark.parametrize("name", ["PixelSpacing", "WindowCenter", "RescaleSlope", "NumberOfFrames"])
def test_numbers_that_are_none_are_refused(tmp_path, stored, name):
    """Whatever the field, the message names the file: one such file must not stop a run."""
    text = {"PixelSpacing": "0.1\\0.2", "WindowCenter": "2000", "RescaleSlope": "1.0", "NumberOfFrames": "1"}[name]
    given = {"PixelSpacing": [0.1, 0.2], "WindowCenter": 2000, "RescaleSlope": "1.0", "NumberOfFrames": 1}[name]
    data = dicom(stored, **({"WindowWidth": 4000, "WindowCenter": 2000, "RescaleIntercept": 0} | {name: given}))
    assert text.encode() in data
    tag = struct.pack("<HH", *divmod(int(pydicom.datadict.tag_for_keyword(name)), 65536))
    at = data.index(text.encode(), data.index(tag))
    broken = data[:at] + b"x" + data[at + 1 :]
    refuse(put(tmp_path, broken, "x.dcm"))


def test_spacing_is_row_then_column(tmp_path, stored):
    def spacing(**attributes):
        return load_radiograph(put(tmp_path, dicom(stored, **attributes), "x.dcm")).spacing

    assert spacing() is None
    assert spacing(PixelSpacing=[0.2, 0.1]) == (0.2, 0.1)
    assert spacing(ImagerPixelSpacing=[0.3, 0.15]) == (0.3, 0.15)
    assert spacing(PixelSpacing=[0.2, 0.1], ImagerPixelSpacing=[0.3, 0.15]) == (0.2, 0.1)
    assert spacing(PixelSpacing="", ImagerPixelSpacing=[0.3, 0.15]) == (0.3, 0.15)


def test_same_radiograph_in_three_formats_agrees(tmp_path, stored):
    """12 bits over their whole range: within half a step of 8 bits plus what the 12-bit window leaves."""
    inverted = dicom(4095 - stored, PhotometricInterpretation="MONOCHROME1", WindowCenter=2048, WindowWidth=4096)
    wide = np.round(stored * (65535 / 4095)).astype(np.uint16)
    narrow = np.round(stored * (255 / 4095)).astype(np.uint8)
    a = pixels_of(tmp_path, inverted)
    b = pixels_of(tmp_path, encode_png(wide), "b.png")
    c = pixels_of(tmp_path, encode_png(narrow), "c.png")
    assert np.abs(a - b).max() < 0.51 / 65535 + 1e-6
    assert np.abs(a - c).max() < 0.51 / 255
    assert np.abs(b - c).max() < 0.51 / 255 + 0.51 / 65535


# ------------------------------------------------------------------------------------ what a file covers and states


@pytest.mark.parametrize("kind", ["Shutter", "Collimator"])
def test_what_a_shutter_or_collimator_covers_is_not_valid(tmp_path, stored, kind):
    """Edges are counted from 1 and are the first that is hidden (PS3.3 C.7.6.11.1.1)."""
    rectangle = {f"{kind}Shape": "RECTANGULAR", f"{kind}LeftVerticalEdge": 10, f"{kind}RightVerticalEdge": 50,
                 f"{kind}UpperHorizontalEdge": 5, f"{kind}LowerHorizontalEdge": 60}  # fmt: skip
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    valid = load_radiograph(put(tmp_path, dicom(stored, **window, **rectangle), "r.dcm")).valid[0].numpy()
    expected = np.zeros((64, 64), bool)
    for row in range(1, 65):
        for column in range(1, 65):
            expected[row - 1, column - 1] = 5 < row < 60 and 10 < column < 50
    assert np.array_equal(valid, expected)
    circle = {f"{kind}Shape": "CIRCULAR", f"CenterOfCircular{kind}": [30, 20], f"RadiusOfCircular{kind}": 9}
    valid = load_radiograph(put(tmp_path, dicom(stored, **window, **circle), "c.dcm")).valid[0].numpy()
    y, x = np.ogrid[1:65, 1:65]
    assert np.array_equal(valid, (y - 30) ** 2 + (x - 20) ** 2 <= 81)
    corners = [10, 10, 10, 40, 50, 40, 50, 10]  # row, column of each
    polygon = {f"{kind}Shape": "POLYGONAL", f"VerticesOfThePolygonal{kind}": corners}
    valid = load_radiograph(put(tmp_path, dicom(stored, **window, **polygon), "p.dcm")).valid[0].numpy()
    expected[:] = False
    expected[9:50, 9:40] = True
    assert np.array_equal(valid, expected)
    both = {**rectangle, **circle, f"{kind}Shape": ["RECTANGULAR", "CIRCULAR"]}
    valid = load_radiograph(put(tmp_path, dicom(stored, **window, **both), "b.dcm")).valid[0].numpy()
    assert valid[29, 19]
    assert not valid[29, 8]
    nothing = {**rectangle, f"{kind}RightVerticalEdge": 3}
    assert load_radiograph(put(tmp_path, dicom(stored, **window, **nothing), "n.dcm")).valid.all()


@pytest.mark.parametrize(("attributes", "expected"), [
    ({"PatientID": "7", "IssuerOfPatientID": "A"}, {"patient": "A|7"}), ({"PatientID": " 7 "}, {"patient": "7"}),
    ({"PatientID": ""}, {"patient": None}), ({"StudyInstanceUID": "1.2"}, {"study": "1.2"}),
    ({"PatientSex": "f"}, {"sex": "F"}), ({"PatientSex": "O"}, {"sex": None}),
    ({"PatientAge": "058Y"}, {"age": 58}), ({"PatientAge": "018M"}, {"age": 1.5}), ({"PatientAge": "62"}, {"age": 62}),
    ({"PatientAge": "000Y"}, {"age": None}), ({"PatientAge": "155Y"}, {"age": None}),
    ({"PatientBirthDate": "19500301", "StudyDate": "20200301"}, {"age": pytest.approx(70, abs=0.01)}),
    ({"PatientBirthDate": "19500301"}, {"age": None}),
    ({"ViewPosition": "AP"}, {"view": "AP"}), ({"ViewPosition": "LL"}, {"view": "LATERAL"}),
    ({"ViewPosition": "OBLIQUE", "SeriesDescription": "PA"}, {"view": None}),
    ({"SeriesDescription": "W Chest pa"}, {"view": "PA"}), ({"SeriesDescription": "PA and Lat"}, {"view": None}),
    ({"SeriesDescription": "Lateral"}, {"view": "LATERAL"}),
    ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [9, 9]}, {"spacing": (0.2, 0.1)}),
    ({"ImagerPixelSpacing": [0.3, 0.15], "EstimatedRadiographicMagnificationFactor": 1.5}, {"spacing": (0.2, 0.1)}),
    ({"PixelSpacing": [0, 0]}, {"spacing": None}),
], ids=repr)  # fmt: skip
def test_who_and_what_a_header_says(tmp_path, stored, attributes, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are not what the standard allows, as in archives
        path = put(tmp_path, dicom(stored, **attributes), "x.dcm")
    header = read_header(path)._asdict()
    for name, value in expected.items():
        assert header[name] == (pytest.approx(value) if name == "spacing" and value else value)


def test_header_of_a_file_that_has_none(tmp_path):
    with pytest.raises(DataError, match=r"x\.dcm is not a readable DICOM file"):
        read_header(put(tmp_path, b"nothing", "x.dcm"))


def test_padding_of_signed_pixels_that_is_stated_as_unsigned(tmp_path, stored):
    signed = stored.astype(np.int16) - 2000
    signed[20:29] = -2048
    window = {"WindowCenter": 0, "WindowWidth": 8000, "BitsStored": 16}
    pad = (0x0028, 0x0120)
    file = pydicom.dcmread(BytesIO(dicom(signed, **window, PixelPaddingValue=-2048)))
    del file[pad]
    file.add_new(pad, "US", 2**16 - 2048)
    buffer = BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    valid = load_radiograph(put(tmp_path, buffer.getvalue(), "x.dcm")).valid[0].numpy()
    assert np.array_equal(valid, signed != -2048)


def test_wide_pixels(tmp_path, stored):
    """32 bits allocated are read where 16 of them are used, and refused where more are."""
    window = {"WindowCenter": 100_000 + 2048, "WindowWidth": 4096, "BitsStored": 32}
    wide = pixels_of(tmp_path, dicom(stored.astype(np.uint32) + 100_000, **window))
    narrow = pixels_of(tmp_path, dicom(stored, WindowCenter=2048, WindowWidth=4096), "n.dcm")
    assert np.array_equal(wide, narrow)
    refuse(put(tmp_path, dicom(stored.astype(np.uint32) * 4000, **window), "w.dcm"), "more than 16 bits")


def test_size_that_no_radiograph_has(tmp_path, stored):
    refuse(put(tmp_path, dicom(stored, Rows=60000, Columns=60000), "x.dcm"), "60000 x 60000 pixels")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(signed=st.booleans(), bits=st.integers(9, 16), low=st.floats(0, 0.4), seed=st.integers(0, 99))
def test_percentiles_from_counts_are_numpys(tmp_path, signed, bits, low, seed):
    rng = np.random.default_rng(seed)
    top = 2**bits
    values = rng.integers(int(low * top), top, (23, 19)) - (top // 2 if signed else 0)
    stored = values.astype(np.int16 if signed else np.uint16)
    seen = pixels_of(tmp_path, dicom(stored, BitsStored=bits, RescaleSlope="-2.5", RescaleIntercept="7"))
    modality = stored * -2.5 + 7.0
    a, b = np.percentile(modality, (0.5, 99.5))
    assert np.abs(seen - np.clip((modality - a) / (b - a), 0, 1)).max() < 1e-6


# ------------------------------------------------------------------------------------------------------------- TIFF


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_tiff(tmp_path, dtype, top, compression, capfd):
    grey = noise((40, 60), 1, top, dtype)

    buffer = BytesIO()
    Image.fromarray(grey).save(buffer, "TIFF", compression=compression)
    whole = buffer.getvalue()
    assert np.abs(pixels_of(tmp_path, whole, "x.tif") - grey / top).max() < 1e-7
    for length in range(8, len(whole) - 8, 97):  # after the pixels come bytes that nobody needs
        refuse(put(tmp_path, whole[:length], "cut.tif"))
    assert capfd.readouterr().err == ""  # what OpenCV would write there is in the message


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_whose_zero_is_white(tmp_path, dtype, top, order):
    """Written by hand: Pillow turns pixels as it sees fit."""
    grey = noise((40, 60), 1, top, dtype).astype(np.dtype(dtype).newbyteorder(order))

    def tiff(photometric):
        entries = [(256, 4, 60), (257, 4, 40), (258, 3, 8 * grey.itemsize), (259, 3, 1), (262, 3, photometric),
                   (273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 4, 40), (279, 4, grey.nbytes)]  # fmt: skip
        directory = struct.pack(f"{order}H", len(entries))
        for tag, kind, value in entries:
            directory += struct.pack(f"{order}HHI", tag, kind, 1)
            directory += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        start = b"II*\0" if order == "<" else b"MM\0*"
        return start + struct.pack(f"{order}I", 8) + directory + struct.pack(f"{order}I", 0) + grey.tobytes()

    assert np.abs(pixels_of(tmp_path, tiff(1), "b.tif") - grey / top).max() < 1e-6
    assert np.abs(pixels_of(tmp_path, tiff(0), "w.tif") - (1 - grey / top)).max() < 1e-6


def test_tiff_of_floating_point_numbers_is_refused(tmp_path):
    buffer = BytesIO()
    Image.fromarray(noise((9, 9)).astype(np.float32)).save(buffer, "TIFF")
    refuse(put(tmp_path, buffer.getvalue(), "x.tif"), "float32")


def test_transfer_syntaxes_decode_alike():
    """pydicom's own files: one picture without loss in seven encodings."""
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    expected = load_image(files / "MR_small.dcm")
    kinds = ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded")
    for kind in kinds:
        assert torch.equal(load_image(files / f"MR_small_{kind}.dcm"), expected), kind
    refuse(files / "MR_truncated.dcm", "less than expected")


def test_warnings_filters_survive_threads(tmp_path, stored):
    """Decoding silences pydicom's warnings; several threads at it must not leave the process silent for good."""
    path = put(tmp_path, dicom(stored, WindowCenter=2048, WindowWidth=4096), "x.dcm")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(path) for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# -------------------------------------------------------------------------------------------- borders and squares


def border_valid(image, **options):
    valid = np.zeros(image.shape, bool)
    valid[inside_border(image, **options)] = True
    return valid


def test_inside_border():
    picture = noise((40, 50)).astype(np.float32) / 255
    assert border_valid(picture).all()
    expected = np.zeros((40, 50), bool)
    expected[3:36, 7:48] = True
    for value in (0, 1, 1.5 / 255, 1 - 1.5 / 255):
        framed = np.where(expected, picture, value).astype(np.float32)
        assert np.array_equal(border_valid(framed), expected), value
    mixed = picture.copy()
    mixed[:3], mixed[36:] = 0, 1  # black above, white below
    rows = (np.arange(40) >= 3) & (np.arange(40) < 36)
    assert np.array_equal(border_valid(mixed), np.repeat(rows[:, None], 50, axis=1))


def test_inside_border_is_one_sided_and_leaves_the_inside():
    picture = noise((40, 50)).astype(np.float32) / 255
    left = picture.copy()
    left[:, :5] = 0
    left[:, 20:30] = 0  # a black band inside, such as an implant or a gap, is no border
    expected = np.ones((40, 50), bool)
    expected[:, :5] = False
    assert np.array_equal(border_valid(left), expected)
    nearly = picture.copy()
    nearly[0], nearly[0, 17] = 0, 0.5  # one mark in the row: not blank
    assert border_valid(nearly).all()
    grey = picture.copy()
    grey[:4] = 0.4  # constant, but neither black nor white
    assert border_valid(grey).all()
    tolerant = picture.copy()
    tolerant[:4] = 2.5 / 255
    assert border_valid(tolerant).all()
    assert not border_valid(tolerant, tolerance=3 / 255)[:4].any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inside_border_of_a_blank_image(value):
    assert not border_valid(np.full((6, 9), value, np.float32)).any()


def test_load_radiograph_marks_its_border(tmp_path):
    picture = noise((40, 50))
    picture[:, 44:] = 0
    picture[38:] = 0
    got = load_radiograph(put(tmp_path, encode_png(picture)))
    expected = np.ones((40, 50), bool)
    expected[:, 44:], expected[38:] = False, False
    assert np.array_equal(got.valid[0].numpy(), expected)
    assert got.image.shape == (1, 40, 50)  # never cropped: boxes hold


def area_average(picture, size):
    """The mean over the part of the square picture that each pixel of the result covers, by explicit overlaps."""
    side = len(picture)
    edges, step = np.arange(size + 1) * side / size, np.arange(side)
    low = np.maximum(edges[:-1, None], step[None])
    overlap = np.clip(np.minimum(edges[1:, None], step[None] + 1) - low, 0, None) * size / side
    return overlap @ picture @ overlap.T


@pytest.mark.parametrize("size", [16, 21, 32, 50, 127])
def test_fit_square_is_an_area_average(size):
    """A checkerboard of single pixels has nothing coarser than its mean; without averaging it would alias."""
    board = (np.indices((128, 128)).sum(0) % 2).astype(np.float32)
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    plate = (0.5 + 0.5 * np.cos(60 * (x**2 + y**2))).astype(np.float32)
    for picture in (board, plate, noise((128, 128)).astype(np.float32) / 255):
        got = fit_square(torch.from_numpy(picture)[None], size)[0].numpy()
        assert np.abs(got - area_average(picture, size)).max() < 1e-5
    if 128 % size == 0:
        assert (fit_square(torch.from_numpy(board)[None], size) - 0.5).abs().max() < 1e-6


def test_fit_square_averages_exactly():
    picture = torch.from_numpy(noise((60, 90)).astype(np.float32) / 255)[None]
    padded = torch.zeros(90, 90)
    padded[15:75] = picture[0]
    expected = padded.reshape(30, 3, 30, 3).mean((1, 3))
    assert (fit_square(picture, 30)[0] - expected).abs().max() < 1e-6
    assert torch.equal(fit_square(padded[None], 90)[0], padded)
    assert fit_square(picture, 200).shape == (1, 200, 200)
    assert fit_square(picture, 30).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 91), (91, 60), (40, 200), (37, 36)])
@pytest.mark.parametrize("size", [32, 64, 150])
def test_boxes_follow_the_picture_into_the_square(height, width, size):
    """Draw a bright rectangle, find it in the square, compare with where the box went."""
    x, y, w, h = width // 4, height // 3, width // 2, height // 4
    picture = torch.zeros(1, height, width)
    picture[0, y : y + h, x : x + w] = 1
    square = fit_square(picture, size)[0].double()
    left, top, box_w, box_h = (size * v for v in box_in_square(Box("f", x, y, w, h), height, width))
    along_x, along_y = square.sum(0), square.sum(1)
    place = torch.arange(size).double() + 0.5
    tolerance = 0.06 if size <= max(height, width) else 0.3  # OpenCV's float32 sums; enlarging blurs the edge
    assert float((along_x * place).sum() / along_x.sum()) == pytest.approx(left + box_w / 2, abs=tolerance)
    assert float((along_y * place).sum() / along_y.sum()) == pytest.approx(top + box_h / 2, abs=tolerance)
    assert float(square.sum()) == pytest.approx(box_w * box_h, rel=0.02)
