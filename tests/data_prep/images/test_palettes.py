"""Pictures whose palette is missing are named."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image
from data_prep.images.decoding import DecodingError, decode


def test_a_png_without_its_palette_is_rejected() -> None:
    buffer = io.BytesIO()
    indexes = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(indexes, mode="P")
    image.putpalette(list(range(192)))
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    assert check_image(data).width == 8
    place = data.index(b"PLTE") - 4
    (length,) = struct.unpack(">I", data[place : place + 4])
    without = data[:place] + data[place + 12 + length :]
    with pytest.raises(RejectedImageError, match="palette is missing"):
        check_image(without)
    with pytest.raises(DecodingError, match="palette is missing"):
        decode(without, "png", max_pixels=100)
