"""Decoding of the images that are trained on, by the decoder of `data_prep`, with its pixels."""

from dataclasses import replace
from typing import Protocol

import numpy as np

from data_prep.channels import ChannelNameError, ChannelNames, Choice, choose
from data_prep.format.text import count_noun
from data_prep.images.arrays import (
    ArrayError,
    is_channels_first,
    read_header,
    read_values,
    write_array,
)
from data_prep.images.channel_names import names_in_file
from data_prep.images.decoding import (
    MODES,
    ChannelsError,
    DamagedError,
    Decoded,
    DecodingError,
    TooLargeError,
    decode,
)
from data_prep.images.jpeg2000 import is_jpeg2000
from data_prep.images.opening import UnknownFormatError
from data_prep.images.tiff_layout import STARTS
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.settings import MAX_PIXELS, DecodeSettings

ARRAY_EXTENSION = "npy"


def channels_last(data: bytes, extension: str, channels: int) -> bytes:
    """Return an array of few channels before rows and columns with its channels last.

    It is recognised as in `data-prep shard`, unless its last axis has the channels of the encoder.
    Any other file is returned as it is.

    Args:
        data: content of the file.
        extension: file name extension; distinguishes pictures and arrays.
        channels: channels of the encoder.
    """
    if extension != ARRAY_EXTENSION:
        return data
    try:
        header = read_header(data, channels_last=False)
        if not is_channels_first(header.shape) or header.channels == channels:
            return data
        return write_array(np.moveaxis(read_values(data, header), 0, -1))
    except ArrayError:  # decoding it will report it
        return data


class NamedImage(Protocol):
    """An encoded image whose set may name its channels."""

    @property
    def image(self) -> bytes:
        """The encoded file."""

    @property
    def extension(self) -> str:
        """File name extension."""

    @property
    def channels(self) -> ChannelNames | None:
        """Names of its channels by its set; None if that has none."""


def names_of(raw: NamedImage, data: bytes, settings: DecodeSettings) -> ChannelNames | None:
    """Return the names of the channels of an image: its set's, or its file's, or those given.

    Args:
        raw: the image.
        data: its file.
        settings: names for files without them.
    """
    if raw.channels is not None:
        return raw.channels
    told = names_in_file(data, raw.extension)
    if told is not None and told.described:
        return told.names
    return settings.fallback_channels or (None if told is None else told.names)


def choice_for(raw: NamedImage, data: bytes, settings: DecodeSettings) -> Choice | None:
    """Return which of the channels of an image are wanted; None: all, in their order.

    Args:
        raw: the image.
        data: its file.
        settings: names of the wanted channels.

    Raises:
        BadSampleError: the image lacks one of them.
    """
    wanted = settings.wanted_channels
    if wanted is None:
        return None
    try:
        return choose(names_of(raw, data, settings), wanted)
    except ChannelNameError as error:
        raise BadSampleError(f"the image cannot be used: its {error}") from None


def decode_image(raw: NamedImage, *, channels: int, settings: DecodeSettings) -> Decoded:
    """Decode an image to the channels that are wanted by name; see `decode_pixels`.

    Args:
        raw: the image.
        channels: channels of the result.
        settings: names of the wanted channels, and the size limit.

    Raises:
        BadSampleError: the image lacks one of them, or as `decode_pixels`.
        DataError: see `decode_pixels`.
    """
    data, extension, max_pixels = raw.image, raw.extension, settings.max_pixels
    choice = choice_for(raw, data, settings)
    count = channels if choice is None else choice.count
    decoded = decode_pixels(data, extension, channels=count, max_pixels=max_pixels)
    return decoded if choice is None else replace(decoded, pixels=choice.take(decoded.pixels))


def decode_pixels(
    data: bytes, extension: str, *, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Decode a file: a picture upright, an array with its channels last.

    See `data_prep.images.decoding.decode` and `channels_last`.

    Args:
        data: content of the file.
        extension: file name extension; distinguishes pictures and arrays.
        channels: channels of the result; 1 (grey), 3 (colour) or 4 (colour, alpha) for pictures.
        max_pixels: largest rows · columns that are decoded.

    Raises:
        BadSampleError: the file is damaged, too large, or an array with other channels or with NaN.
        DataError: pictures cannot have that many channels.
    """
    has_bands = extension == ARRAY_EXTENSION or data.startswith(STARTS) or is_jpeg2000(data)
    if channels not in MODES and not has_bands:
        raise DataError(
            f"images have 1 (grey), 3 (colour) or 4 channels (with transparency), not {channels}:"
            " change in_channels, or use arrays (.npy) with that many channels."
        )
    data = channels_last(data, extension, channels)
    kind = "array" if extension == ARRAY_EXTENSION else "image"
    try:
        decoded = decode(data, extension, channels=channels, max_pixels=max_pixels)
    except TooLargeError as error:
        raise too_large_error(*error.size, max_pixels) from None
    except ChannelsError as error:
        hint = ""
        if kind == "array" and read_header(data).shape[0] == channels:
            hint = ": move them to the last axis, as `data-prep shard --channels-first` does"
        raise BadSampleError(
            f"the {kind} has {count_noun(error.channels, 'channel')}, but in_channels is "
            f"{channels}{hint}"
        ) from None
    except DecodingError as error:
        if isinstance(error.__cause__, UnknownFormatError):
            raise BadSampleError(f"the image is damaged or of an unknown format: {error}") from None
        fault = "is damaged" if isinstance(error, DamagedError) else "cannot be used"
        raise BadSampleError(f"the {kind} {fault}: {error}") from error
    if decoded.pixels.dtype.kind == "f" and not np.isfinite(decoded.pixels).all():
        raise BadSampleError(f"the {kind} has non-finite values (NaN or Inf)")
    return decoded


def too_large_error(width: int, height: int, max_pixels: int) -> BadSampleError:
    """Return the error for an image with more pixels than allowed."""
    return BadSampleError(
        f"the image has {width}x{height} pixels, more than the {max_pixels:,} allowed:"
        " scale it down, or raise max_pixels"
    )
