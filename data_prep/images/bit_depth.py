"""Colour of more than 8 bits a channel, which Pillow cuts to 8: told from the file's header."""

from PIL import Image, TiffImagePlugin

_BITS_PER_SAMPLE = 258
_JPEG2000_SIZES = b"\xff\x51"
_AV1_SETTINGS = b"av1C"


def lost_bits(image: Image.Image, data: bytes) -> int:
    """Return the bits a channel of a file whose values Pillow cuts to 8 bits, else 0.

    Args:
        image: the opened file; its pixels are not loaded.
        data: the file.
    """
    match image.format:
        case "PNG":
            bits = data[24] if data[25] else 8  # grey of 16 bits is read as it is
        case "TIFF":
            bits = _tiff_bits(image)
        case "PPM":
            bits = _ppm_bits(data) if image.mode == "RGB" else 8
        case "JPEG2000":
            place = data.find(_JPEG2000_SIZES)
            grey = image.mode.startswith("I")
            bits = 8 if grey or place < 0 else 1 + (data[place + 40 : place + 41] or b"\7")[0] % 128
        case "AVIF":
            place = data.find(_AV1_SETTINGS)
            bits = 10 if place >= 0 and (data[place + 6 : place + 7] or b"\0")[0] & 0x40 else 8
        case _:
            bits = 8
    return bits if bits > 8 else 0


def _tiff_bits(image: Image.Image) -> int:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    values = image.tag_v2.get(_BITS_PER_SAMPLE, (8,))
    bits = values if isinstance(values, tuple) else (values,)
    return max(bits) if len(bits) > 1 else 8


def _ppm_bits(data: bytes) -> int:
    lines = (line.partition(b"#")[0] for line in data[:4096].split(b"\n"))
    words = b" ".join(lines).split(maxsplit=4)
    return int(words[3]).bit_length() if len(words) > 3 and words[3].isdigit() else 8
