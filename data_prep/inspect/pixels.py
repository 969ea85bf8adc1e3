"""Images in shards that someone else wrote, as `data-prep shard` would store them."""

from data_prep.format.manifest import IMAGE_EXTENSIONS
from data_prep.images.checking import check_image


def stored_form(data: bytes, extension: str, *, max_pixels: int) -> tuple[bytes, str]:
    """Return an image file and its extension, in one of the formats that shards may hold.

    Raises:
        RejectedImageError: it is of another format and has no such form.
    """
    if extension in IMAGE_EXTENSIONS:
        return data, extension
    checked = check_image(data, max_pixels=max_pixels, decode=False)
    return checked.data, checked.extension
