"""Images that are turned upright by their Exif orientation, and whether their labels are too."""

import warnings

from data_prep.images.opening import open_picture
from data_prep.images.orientation import orientation_of
from data_prep.images.tiff_layout import STARTS, read_layout
from simmim.data.order.source import BadSampleError, DataError

TURNS = {
    2: "mirrored left to right",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored at its diagonal",
    6: "turned 90 degrees clockwise",
    7: "mirrored at its other diagonal",
    8: "turned 90 degrees anticlockwise",
}
"""What each Exif orientation does to the stored pixels, to show them upright."""

SIDEWAYS = frozenset({5, 6, 7, 8})
"""Orientations that exchange rows and columns."""


def orientation_in(encoded: bytes) -> int:
    """Return the orientation that an image file names, 2 to 8; 1 if it is upright or has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid Exif, which decoding ignores too
        try:
            if encoded.startswith(STARTS):
                found = read_layout(encoded).orientation
                return found if found in TURNS else 1
            return orientation_of(open_picture(encoded))
        except MemoryError:
            raise
        # Nearly any type on hostile bytes; decoding says what is wrong with them.
        except Exception:
            return 1


def unsure_frame(encoded: bytes, size: tuple[int, int]) -> str | None:
    """Return a warning if labels of the right size may still be those of the stored pixels.

    Args:
        encoded: the image file.
        size: rows and columns of the upright image, and of its labels.
    """
    orientation = orientation_in(encoded)
    if orientation == 1 or (orientation in SIDEWAYS and size[0] != size[1]):
        return None
    return (
        f"its Exif orientation is {orientation}, so its pixels are read {TURNS[orientation]}; the "
        "size does not tell whether its labels are upright as well: check that they are"
    )


def size_error(
    encoded: bytes, size: tuple[int, int], labels: tuple[int, int], *, of: str, remedy: str
) -> DataError:
    """Return the error for labels of another size than the upright image.

    Args:
        encoded: the image file.
        size: rows and columns of the upright image.
        labels: those that the labels are for.
        of: what the labels are, such as `label map`.
        remedy: what to do about a single wrong file.

    Returns:
        A `BadSampleError` for a wrong file; for labels of the stored pixels of a turned image a
        `DataError`, since there will be more of them.
    """
    shown, labelled = (f"{columns}x{rows}" for rows, columns in (size, labels))
    orientation = orientation_in(encoded)
    if orientation in SIDEWAYS and labels == size[::-1]:
        return DataError(
            f"its {of} has {labelled} pixels, the frame in which the image is stored, but its Exif "
            f"orientation is {orientation}: its pixels are read upright, {TURNS[orientation]}, as "
            f"{shown}, and labels must be upright too. Turn them in the same way (boxes and "
            "polygons with width and height), or remove the orientation from the image file."
        )
    return BadSampleError(f"its {of} has {labelled} pixels, the image {shown}: {remedy}")
