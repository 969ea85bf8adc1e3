"""Formats that are not read are named, and damaged files leave the terminal alone."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels


def _jpeg_of(marker: int, bits: int) -> bytes:
    frame = bytes([0xFF, marker, 0, 11, bits, 0, 8, 0, 8, 1, 1, 0x11, 0])
    return b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0" + frame + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "empty file"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 1\nMAXVAL 255\nENDHDR\n" + bytes(4), "PAM"),
        (b"PF\n2 2\n-1.0\n" + bytes(48), "PFM"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (bytes(128) + b"DICM" + bytes(40), "DICOM"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"II\xbc\x01" + bytes(40), "JPEG XR"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "git lfs pull"),
        (_jpeg_of(0xF7, 16), "JPEG-LS"),
        (_jpeg_of(0xC1, 12), "JPEG of 12 bits"),
        (_jpeg_of(0xC3, 8), "lossless JPEG"),
    ],
)
def test_other_formats_are_named_with_a_remedy(data: bytes, name: str) -> None:
    with pytest.raises(RejectedImageError, match=rf"{name}.*not supported.*\.npy"):
        check_image(data)
    with pytest.raises(BadSampleError, match=rf"unknown format: .*{name}"):
        decode_pixels(data, "jpg")


def test_jpeg_2000_of_many_bands_is_named() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.zeros((16, 16, 5), dtype=np.uint8)
    data = bytes(imagecodecs.jpeg2k_encode(values, level=0, codecformat="j2k"))
    with pytest.raises(RejectedImageError, match=r"JPEG 2000 with 5 components.*\.npy"):
        check_image(data)


CHECK = """
import sys
from data_prep.images.checking import RejectedImageError, check_image
for name in sys.argv[1:]:
    try:
        check_image(open(name, "rb").read())
    except RejectedImageError as error:
        print(error)
"""


def test_damaged_tiffs_write_nothing_to_the_terminal(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    if not (Path(Image.__file__).parents[1] / "pillow.libs").is_dir():
        pytest.skip("libtiff is not Pillow's own")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    names = []
    for packed in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF", compression=packed, strip_size=2000)
        data = bytearray(buffer.getvalue())
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        for kind, damaged in (("wiped", bytes(data)), ("cut", bytes(data[: len(data) // 2]))):
            names.append(tmp_path / f"{packed}-{kind}.tif")
            names[-1].write_bytes(damaged)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *map(str, names)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    assert "TIFF" in done.stdout
