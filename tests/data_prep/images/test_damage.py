"""Damage that Pillow ignores is found if the format allows it."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images import damage
from data_prep.images.checking import RejectedImageError, check_image
from data_prep.images.damage import (
    DamageError,
    check_jpeg,
    check_png,
    check_scans,
    check_webp,
    decode_jpeg,
)

strict = pytest.mark.skipif(damage.simplejpeg is None, reason="simplejpeg is not installed")


def _decodes_in_pillow(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


@strict
def test_a_jpeg_damaged_in_the_middle_is_rejected_though_pillow_accepts_it(
    draw_image: Callable[..., bytes],
) -> None:
    data = draw_image(0, size=64)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(200) + data[middle + 200 :]
    assert _decodes_in_pillow(damaged)
    with pytest.raises(RejectedImageError, match="cannot be decoded completely: Corrupt JPEG data"):
        check_image(damaged)


@strict
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_strict_decoder_gives_pillows_pixels(
    mode: str, draw_image: Callable[..., bytes]
) -> None:
    data = draw_image(1, mode=mode)
    with Image.open(io.BytesIO(data)) as image:
        pixels = decode_jpeg(data, image.size)
        assert pixels is not None
        assert np.array_equal(pixels.squeeze(), np.asarray(image))
        # Sizes that contradict each other are left to Pillow, and nothing is allocated for them.
        assert decode_jpeg(data, (60_000, 60_000)) is None


@strict
def test_the_check_and_the_whole_decode_agree(draw_image: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(0)
    files = [draw_image(seed, size=64, mode=mode) for seed, mode in enumerate(["L", "RGB", "CMYK"])]
    refused = 0
    for number in range(300):
        data = bytearray(files[number % 3])
        for _ in range(3):
            data[int(rng.integers(len(data) // 4, len(data)))] ^= 1 << int(rng.integers(8))
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
        verdicts = []
        for look in (check_jpeg, decode_jpeg):
            try:
                look(bytes(data), size)
                verdicts.append("")
            except DamageError as error:
                verdicts.append(str(error))
        assert verdicts[0] == verdicts[1]
        refused += verdicts[0] != ""
    assert 30 < refused < 300


NO_SIMPLEJPEG = """
import sys
sys.modules["simplejpeg"] = None
from data_prep.images.checking import check_image
checked = check_image(open(sys.argv[1], "rb").read())
print(checked.width, checked.notes)
"""


def test_without_simplejpeg_pillow_checks_and_a_note_says_so(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(draw_image(0))
    done = subprocess.run(
        [sys.executable, "-c", NO_SIMPLEJPEG, str(path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "28 ('JPEG checked by Pillow alone',)\n"


def test_every_flipped_bit_of_a_png_is_found(draw_image: Callable[..., bytes]) -> None:
    data = draw_image(0, image_format="PNG", size=8)
    check_png(data)
    for place in range(8, len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        with pytest.raises(DamageError):
            check_png(bytes(flipped))
        with pytest.raises(DamageError):
            check_png(data[:place])
    with pytest.raises(RejectedImageError, match="checksum of its chunk IDAT"):
        check_image(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])


def test_a_cut_webp_is_found(draw_image: Callable[..., bytes]) -> None:
    data = draw_image(0, image_format="WEBP")
    check_webp(data)
    with pytest.raises(DamageError, match="is truncated"):
        check_webp(data[:-1])


def test_a_jpeg_of_endless_scans_is_refused_unread(draw_image: Callable[..., bytes]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="JPEG", progressive=True)
    check_scans(buffer.getvalue(), 89_478_485)
    with pytest.raises(DamageError, match="30 scans"):
        check_scans(b"\xff\xd8" + b"\xff\xda\0\2\1" * 30, 89_478_485)


def test_only_scans_of_the_image_itself_are_counted(draw_image: Callable[..., bytes]) -> None:
    many = b"\xff\xda\0\2" * 40
    photo = draw_image(0, size=64)
    video = photo + b"\0\0\0\x18ftypmp42" + many * 1000
    comment = b"\xff\xfe" + (2 + len(many)).to_bytes(2, "big") + many
    thumbnail = photo[:2] + comment + photo[2:]
    restarts = b"\xff\xd8" + b"\xff\xda\0\2\1\xff\0\xff\xd0" * 30
    for data in (video, thumbnail):
        check_scans(data, 89_478_485)
        assert check_image(data).data == data
    with pytest.raises(DamageError, match="30 scans"):
        check_scans(restarts, 89_478_485)


def test_a_jpeg_beyond_the_default_size_may_have_as_many_scans_as_a_smaller_one() -> None:
    scan = b"\xff\xda\0\2\1"
    check_scans(b"\xff\xd8" + scan * 20, 2**31)
    with pytest.raises(DamageError, match="21 scans"):
        check_scans(b"\xff\xd8" + scan * 21, 2**31)
