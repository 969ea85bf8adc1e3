"""Names of formats that are not read, so that a rejection says what a file is."""

from data_prep.images.jpeg2000 import component_bits, is_jpeg2000

_STARTS: dict[bytes, str] = {
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL image",
    b"P7\n": "a PAM image",
    b"PF\n": "a PFM image in colour",
    b"8BPS": "a Photoshop document",
    b"v/1\x01": "an OpenEXR image",
    b"II\xbc\x01": "a JPEG XR image",
    b"version https://git-lfs": "a pointer of Git LFS (fetch the file with git lfs pull)",
    b"#?RADIANCE": "a Radiance HDR image",
    b"SIMPLE  =": "a FITS file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"CDF\x01": "a NetCDF file",
    b"CDF\x02": "a NetCDF file",
    b"DDS ": "a DDS texture",
    b"qoif": "a QOI image",
    b"\0\0\x01\0": "an icon (ICO)",
    b"%PDF": "a PDF document",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"<!doctype": "an HTML page",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
}
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_JPEG = b"\xff\xd8\xff"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_JPEG_LS = 0xF7
_ARITHMETIC = (0xC9, 0xCA, 0xCD, 0xCE)


def name_format(data: bytes) -> str | None:
    """Return what a file is that no reader accepts, such as `a JPEG XL image`; None if unknown."""
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        return "a HEIF image (HEIC)"
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if is_jpeg2000(data):
        bands = len(component_bits(data))
        return f"a JPEG 2000 with {bands} components" if bands > 4 else None
    if data.startswith(_JPEG):
        return _name_jpeg(data)
    return next((name for start, name in _STARTS.items() if data.startswith(start)), None)


def _name_jpeg(data: bytes) -> str | None:
    place = 2
    while place + 5 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == _JPEG_LS:
            return "a JPEG-LS image"
        if kind in _FRAMES:
            if kind in _LOSSLESS:
                return "a lossless JPEG"
            if data[place + 4] != 8:
                return f"a JPEG of {data[place + 4]} bits"
            return "a JPEG with arithmetic coding" if kind in _ARITHMETIC else None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
