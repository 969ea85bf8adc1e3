"""A few samples of a set of images: their channels, bits, sizes and statistics."""

import io
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.format.text import count_noun
from data_prep.images.arrays import ArrayError, is_measured, read_header
from data_prep.images.channel_names import no_data_in_file
from data_prep.images.checking import RejectedImageError, read_pixels
from data_prep.images.decoding import DecodingError, decode
from data_prep.images.deep_png import is_deep_png
from data_prep.images.opening import has_transparency
from data_prep.images.tiff_layout import STARTS, TiffError, read_layout
from simmim.data.datasets.shards import RawSample
from simmim.data.order.source import BadSampleError, DataError, SampleSource
from simmim.data.transforms.decoding import (
    ARRAY_EXTENSION,
    channels_last,
    choice_for,
    decode_pixels,
)
from simmim.data.transforms.settings import DecodeSettings

MEASURED_SIDE = 256
"""Rows and columns of an image that are measured, about; others between them are skipped."""

RANGES = {"uint8": 255.0, "uint16": 65535.0}
"""Integer value that stands for 1.0; floating-point images are taken as they are."""

STORED = {"1": (1, "uint8"), "L": (1, "uint8"), "I;16": (1, "uint16"), "RGB": (3, "uint8")}
"""Channels and type of the pictures of common modes of Pillow."""
WITH_ALPHA = 4
"""Channels of a picture with transparency: colour and alpha, whichever way it is stored."""
SHARED = {"uint8", "uint16"}
"""Types of images that a batch may mix; others have to be of one type."""


@dataclass(frozen=True, order=True)
class ImageForm:
    """Channels and type of an image as it is stored."""

    channels: int
    type: str
    """uint8, uint16 or a floating-point type."""

    @property
    def scale(self) -> float:
        """Stored value that stands for 1.0."""
        return RANGES.get(self.type, 1.0)

    def __str__(self) -> str:
        bits = f"{8 * np.dtype(self.type).itemsize} bits"
        kind = bits if self.type in RANGES else f"{bits} (floating point)"
        return f"{count_noun(self.channels, 'channel')} and {kind}"


@dataclass
class SampledImages:
    """What is known of some images of a set."""

    count: int = 0
    bad: list[str] = field(default_factory=list)
    """Images that training cannot decode, but for their channels."""
    short_sides: list[int] = field(default_factory=list)
    forms: Counter[ImageForm] = field(default_factory=Counter)
    refused: Counter[ImageForm] = field(default_factory=Counter)
    """Those of `forms` that cannot be decoded to the channels of the encoder."""
    stopping: set[ImageForm] = field(default_factory=set)
    """Those of `refused` that training stops at, rather than replacing the image by another."""
    examples: dict[ImageForm, str] = field(default_factory=dict)
    """Name of an image of each form."""
    types: dict[str, str] = field(default_factory=dict)
    """Types that images are decoded to, with the name of an image of each."""
    transparent: list[str] = field(default_factory=list)
    """Names of images whose transparent parts are shown on white."""
    seconds: float = 0.0
    trained_on: "Moments" = field(default_factory=lambda: Moments())  # noqa: PLW0108 (defined below)
    """Of all images that can be decoded to the channels of the encoder, with these channels."""
    _moments: dict[ImageForm, "Moments"] = field(default_factory=dict)

    @property
    def main(self) -> ImageForm:
        """The most frequent form."""
        return self.forms.most_common(1)[0][0]

    @property
    def mixes_types(self) -> bool:
        """Whether the images are of types that cannot be in one batch."""
        return len(self.types) > 1 and not self.types.keys() <= SHARED

    def listed(self, *, examples: bool = False) -> str:
        """Return all forms with their numbers, and an example of each if asked, for a person."""
        return ", ".join(
            f"{count_noun(count, 'image')} of {form}"
            + (f" (such as {self.examples[form]})" if examples else "")
            for form, count in self.forms.most_common()
        )

    def statistics(self, form: ImageForm) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return mean and std of each channel over the images of a form, integers as 0 to 1."""
        return self._moments[form].statistics()

    def measure(self, form: ImageForm, pixels: NDArray[Any], no_data: float | None) -> None:
        """Add the pixels (rows, columns, channels) of an image of a form; see `Moments.add`."""
        self._moments.setdefault(form, Moments()).add(pixels, no_data)


@dataclass
class Moments:
    """Means of the values, and of their squares, of each channel of some images.

    NaN for a channel without any measurement.
    """

    means: list[NDArray[Any]] = field(default_factory=list)
    squares: list[NDArray[Any]] = field(default_factory=list)

    def add(self, pixels: NDArray[Any], no_data: float | None = None) -> None:
        """Add an image (rows, columns, channels).

        Args:
            pixels: the image.
            no_data: no-data value, which is left out; None for none.
        """
        step = max(1, min(pixels.shape[:2]) // MEASURED_SIDE)
        stored = pixels[::step, ::step].reshape(-1, pixels.shape[-1])
        values = stored.astype(np.float64) / RANGES.get(str(pixels.dtype), 1.0)
        if no_data is None:
            self.means.append(values.mean(axis=0))
            self.squares.append((values**2).mean(axis=0))
            return
        values[~is_measured(stored, no_data)] = np.nan
        self.means.append(_mean_of_known(values))
        self.squares.append(_mean_of_known(values**2))

    def statistics(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return mean and std of each channel, integers as 0 to 1; 0 where nothing was measured."""
        mean = np.nan_to_num(_mean_of_known(np.array(self.means)))
        squares = np.nan_to_num(_mean_of_known(np.array(self.squares)))
        return mean, np.sqrt(np.maximum(squares - mean**2, 0.0))


def _mean_of_known(values: NDArray[Any]) -> NDArray[Any]:
    """Return the mean along the first axis without NaN; NaN where there is nothing else."""
    if not np.isnan(values).any():
        return np.asarray(values.mean(axis=0))
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def sample_images(
    source: SampleSource[Any], *, channels: int, data: DecodeSettings, most: int, seconds: float
) -> SampledImages:
    """Decode samples spread evenly over a set as training does, for a limited time.

    Args:
        source: a set whose samples have an encoded `image` and an `extension`.
        channels: channels of the encoder.
        data: decoding of the images.
        most: maximum number of samples.
        seconds: time after which no further sample is read.

    Raises:
        DataError: a shard cannot be read.
    """
    found, began = SampledImages(), time.perf_counter()
    max_pixels = data.max_pixels
    for raw in _spread(source, most, lambda: time.perf_counter() - began > seconds):
        found.count += 1
        try:
            encoded = raw.image
            no_data = raw.no_data if isinstance(raw, RawSample) else no_data_in_file(encoded)
            choice = choice_for(raw, encoded, data)
            count = channels if choice is None else choice.count
            encoded = channels_last(encoded, raw.extension, count)
            form = form_of(encoded, raw.extension, max_pixels)
        except BadSampleError as error:
            found.bad.append(f"{raw.name}: {error}")
            continue
        try:
            pixels = decode_pixels(
                encoded, raw.extension, channels=count, max_pixels=max_pixels
            ).pixels
            if choice is not None:
                pixels, form = choice.take(pixels), replace(form, channels=channels)
            found.trained_on.add(pixels, no_data)
            # Channels that the image does not have: copies of grey, or opaque.
            pixels = pixels[..., : form.channels]
        except DataError as error:
            try:
                pixels = _read_stored(encoded, raw.extension, max_pixels)
            except BadSampleError:
                pixels = np.empty((0, 0, channels))
            if pixels.shape[-1] == count:
                found.bad.append(f"{raw.name}: {error}")
                continue
            found.refused[form] += 1
            if not isinstance(error, BadSampleError):
                found.stopping.add(form)
        else:
            found.types.setdefault(pixels.dtype.name, raw.name)
            if form.channels == WITH_ALPHA > channels and _shows_white(encoded, max_pixels):
                found.transparent.append(raw.name)
        found.forms[form] += 1
        found.examples.setdefault(form, raw.name)
        found.short_sides.append(min(pixels.shape[:2]))
        found.measure(form, pixels, no_data)
    found.seconds = time.perf_counter() - began
    return found


def _spread(source: SampleSource[Any], most: int, enough: Callable[[], bool]) -> Iterator[Any]:
    """Yield encoded samples spread evenly over a set, in random order, until it is enough."""
    places = source.spread(most)
    # In random order, which covers the whole set even if time runs out.
    for index in np.random.default_rng(0).permutation(len(places)).tolist():
        if enough():
            return
        yield source.read(*places[index])


def form_of(data: bytes, extension: str, max_pixels: int) -> ImageForm:
    """Return channels and type of an encoded image, from its header if that is enough.

    Raises:
        BadSampleError: it is not an image, or damaged.
    """
    if extension == ARRAY_EXTENSION:
        try:
            header = read_header(data)
        except ArrayError as error:
            raise BadSampleError(f"the array cannot be used: {error}") from None
        return ImageForm(header.channels, header.stored_type.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as opened:
                mode = "" if opened.format == "TIFF" or is_deep_png(data) else opened.mode
                has_alpha = has_transparency(opened, data)
    except Exception:  # hostile bytes raise nearly any type
        mode, has_alpha = "", False
    if mode in STORED and not has_alpha:
        return ImageForm(*STORED[mode])
    pixels = _read_stored(data, extension, max_pixels)
    if data.startswith(STARTS):  # one of many bands is stored with all of them
        has_alpha = pixels.shape[-1] <= 3 and (has_alpha or _is_tiff_with_alpha(data))
    return ImageForm(WITH_ALPHA if has_alpha else pixels.shape[-1], pixels.dtype.name)


def _is_tiff_with_alpha(data: bytes) -> bool:
    """Return whether a TIFF is a picture whose last band its tags call alpha."""
    try:
        layout = read_layout(data)
    except TiffError:
        return False
    return layout.colours.endswith("A") and layout.type == "uint8"


def _shows_white(data: bytes, max_pixels: int) -> bool:
    """Return whether parts of a picture are transparent, which fewer channels show on white."""
    try:
        alpha = decode(data, "", channels=WITH_ALPHA, max_pixels=max_pixels).pixels[..., 3]
    except DecodingError:
        return False
    return bool(alpha.min() < np.iinfo(alpha.dtype).max)


def _read_stored(data: bytes, extension: str, max_pixels: int) -> NDArray[Any]:
    """Return the pixels of an image with all its channels."""
    try:
        return read_pixels(data, extension, max_pixels=max_pixels)
    except RejectedImageError as error:
        raise BadSampleError(f"the image is damaged: {error}") from None
