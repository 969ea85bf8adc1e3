import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images import damage, decoding
from data_prep.images.decoding import Decoded
from data_prep.images.orientation import ORIENTATIONS
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.decoding import decode_pixels

simplejpeg = pytest.importorskip("simplejpeg")


@pytest.fixture
def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "simplejpeg", None)


def scene(height: int = 61, width: int = 83) -> Image.Image:
    """Smooth and noisy parts, so that every step of the decoder has something to do."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(rows / 7 + k) * np.cos(columns / 9 - k) for k in range(3)])
    noise = np.random.default_rng(0).normal(0, 20, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or scene()).save(buffer, "JPEG", **{"quality": 90} | options)
    return buffer.getvalue()


def oriented(orientation: int, image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


def by_pillow(data: bytes, channels: int, monkeypatch: pytest.MonkeyPatch) -> Decoded:
    with monkeypatch.context() as patch:
        patch.setattr(damage, "simplejpeg", None)
        return decode_pixels(data, "jpg", channels=channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 35, "optimize": True},
        {"progressive": True},
        {"keep_rgb": True},
        {"icc_profile": b"no profile at all"},
        {"comment": b"Exif\0\0 is only mentioned"},
    ],
)
def test_fast_decodes_are_those_of_pillow_bit_for_bit(
    options: dict[str, object], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(**options)
    fast = decode_pixels(data, "jpg", channels=channels)
    assert fast.repaired is None
    assert np.array_equal(fast.pixels, by_pillow(data, channels, monkeypatch).pixels)
    assert fast.pixels.shape == (61, 83, channels)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_print_colours_come_as_from_pillow(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(scene().convert(mode))
    for channels in (1, 3, 4):
        fast = decode_pixels(data, "jpeg", channels=channels)
        assert fast.repaired is None
        assert np.array_equal(fast.pixels, by_pillow(data, channels, monkeypatch).pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_fast_way_turns_images_upright(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = scene().transpose(ORIENTATIONS[inverse]) if orientation > 1 else scene()
    data = oriented(orientation, stored)
    monkeypatch.setattr(decoding, "load_picture", refused)  # so that it is the fast way
    fast = decode_pixels(data, "jpg")
    monkeypatch.undo()
    assert np.array_equal(fast.pixels, by_pillow(data, 3, monkeypatch).pixels)
    assert fast.pixels.shape == (61, 83, 3)
    assert np.abs(fast.pixels.astype(int) - np.asarray(scene()).astype(int)).mean() < 25


def refused(*_: object, **__: object) -> None:
    raise AssertionError("Pillow was asked")


def test_an_orientation_in_xmp_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = jpeg(xmp=packet)
    fast = decode_pixels(data, "jpg")
    assert fast.pixels.shape == (83, 61, 3)
    assert np.array_equal(fast.pixels, by_pillow(data, 3, monkeypatch).pixels)


def damaged_in_the_middle() -> bytes:
    """A JPEG that Pillow reads without a word and libjpeg-turbo warns of."""
    data = bytearray(jpeg(scene(200, 200)))
    middle = len(data) // 2
    data[middle : middle + 12] = b"\xab" * 12
    return bytes(data)


def test_damage_that_pillow_passes_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = damaged_in_the_middle()
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(data)
    found = decode_pixels(data, "jpg")
    assert found.repaired
    assert np.array_equal(found.pixels, by_pillow(data, 3, monkeypatch).pixels)


@pytest.mark.parametrize("sampling", [(0x21, 0x21, 0x11), (0x31, 0x11, 0x11), (0x11, 0x21, 0x11)])
def test_unusual_sampling_is_no_damage(
    sampling: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(jpeg(scene(48, 48), keep_rgb=True, subsampling=0))
    frame = data.index(b"\xff\xc0")
    for channel, factors in enumerate(sampling):
        data[frame + 11 + 3 * channel] = factors
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(bytes(data))
    found = decode_pixels(bytes(data), "jpg")
    assert found.repaired is None
    assert np.array_equal(found.pixels, by_pillow(bytes(data), 3, monkeypatch).pixels)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
def test_truncated_files_are_bad_samples(keep: float) -> None:
    data = jpeg(scene(200, 200))
    with pytest.raises(BadSampleError, match="damaged"):
        decode_pixels(data[: int(keep * len(data))], "jpg")


def test_the_size_is_read_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refused)
    monkeypatch.setattr(decoding, "load_picture", refused)
    with pytest.raises(BadSampleError, match=r"65000x65000 pixels.*max_pixels"):
        decode_pixels(bytes(data), "jpg")
    with pytest.raises(BadSampleError, match="83x61 pixels"):
        decode_pixels(jpeg(), "jpg", max_pixels=83 * 61 - 1)


@pytest.mark.usefixtures("pillow_alone")
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pillow_alone_reads_everything(channels: int) -> None:
    for data in (jpeg(), jpeg(scene().convert("CMYK")), oriented(3), damaged_in_the_middle()):
        found = decode_pixels(data, "jpg", channels=channels)
        assert found.pixels.shape[2] == channels
        assert found.repaired is None


@settings(max_examples=300, deadline=None)
@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    length=st.floats(0, 1),
    channels=st.sampled_from([1, 3, 4]),
)
def test_whatever_the_bytes_the_pixels_are_those_of_pillow_or_it_is_bad(
    places: list[tuple[float, int]], length: float, channels: int
) -> None:
    data = bytearray(oriented(6))
    for place, value in places:
        data[int(place * (len(data) - 1))] = value
    cut = bytes(data if length > 0.3 else data[: int(3 * length * len(data))])
    with pytest.MonkeyPatch.context() as patch:
        try:
            expected = by_pillow(cut, channels, patch)
        except BadSampleError:
            expected = None
    try:
        found = decode_pixels(cut, "jpg", channels=channels, max_pixels=10_000_000)
    except BadSampleError:
        assert expected is None or expected.pixels.size > 10_000_000
    else:
        assert expected is not None
        assert np.array_equal(found.pixels, expected.pixels)


def test_no_image_has_two_channels() -> None:
    with pytest.raises(DataError, match="not 2: change in_channels") as caught:
        decode_pixels(jpeg(), "jpg", channels=2)
    assert not isinstance(caught.value, BadSampleError)


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["uint8", "uint16", ">u2", "float16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_unchanged(kind: str, order: str) -> None:
    array = (np.random.default_rng(0).random((5, 7, 6)) * 200).astype(kind)
    found = decode_pixels(saved(np.asarray(array, order=order)), "npy", channels=6).pixels
    assert found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)
    torch.from_numpy(found.copy())


def test_an_array_without_channels_has_one() -> None:
    found = decode_pixels(saved(np.ones((3, 4), dtype=np.uint8)), "npy", channels=1).pixels
    assert found.shape == (3, 4, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"\x93NUMPY\x09\x00", "version"),
        (saved(np.ones((4, 4, 3), dtype=np.uint8))[:-1], "is truncated: 47 bytes of values, 48"),
        (saved(np.ones((4, 4, 3), dtype=np.uint8)) + b"!", "49 bytes of values, 48"),
        (saved(np.ones((4, 4, 2), dtype=np.uint8)), "2 channels.*in_channels is 3"),
        (saved(np.ones(4, dtype=np.uint8)), "shape"),
        (saved(np.ones((0, 4, 3), dtype=np.uint8)), "shape"),
        (saved(np.full((4, 4, 3), 2**60)), "not exact in float64"),
        (saved(np.ones((4, 4, 3), dtype=np.complex64)), "of type complex64"),
        (saved(np.full((4, 4, 3), np.nan)), "non-finite"),
        (saved(np.ones((90, 90, 3), dtype=np.uint8)), "90x90 pixels"),
        (saved(np.array([{"a": 1}], dtype=object), allow_pickle=True), "of type object"),
    ],
)
def test_invalid_arrays_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadSampleError, match=words):
        decode_pixels(data, "npy", max_pixels=1000)


def test_channels_in_front_are_pointed_out() -> None:
    data = saved(np.ones((100, 224, 7), dtype=np.uint8))
    with pytest.raises(BadSampleError, match=r"7 channels.*is 100.*--channels-first"):
        decode_pixels(data, "npy", channels=100, max_pixels=10**6)


def test_a_hostile_header_allocates_nothing() -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 99999, 3), }"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with pytest.raises(BadSampleError, match="0 bytes of values, 2,999,969,700,003"):
        decode_pixels(data, "npy", max_pixels=2**62)


@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 175), st.integers(0, 255)), min_size=1, max_size=5))
def test_arbitrary_arrays_raise_only_bad_sample_errors(places: list[tuple[int, int]]) -> None:
    data = bytearray(saved(np.ones((4, 4, 3), dtype=np.uint8)))
    for place, value in places:
        data[place] = value
    try:
        found = decode_pixels(bytes(data), "npy").pixels
    except BadSampleError:
        return
    assert found.shape[2] == 3
