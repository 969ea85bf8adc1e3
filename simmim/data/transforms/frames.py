"""Decoding of selected frames of a video file.

PyAV (the extra `simmim[video]`) ships FFmpeg in a wheel for every platform. Frames are decoded in
sequence up to the last requested one, and only requested frames are converted to pixels: so an
index means the same frame in every container, even if time stamps are missing or unordered, and
independent of key frames. torchcodec is tied to a version of torch and uses the system's FFmpeg.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.order.source import BadSampleError
from simmim.data.transforms.settings import MAX_PIXELS


def require_decoder() -> Any:
    """Return PyAV.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av  # noqa: PLC0415
    except ImportError:
        raise ValueError(
            "decoding clips needs PyAV, which is not installed: pip install 'simmim[video]'."
        ) from None
    return av


class Video:
    """A video file.

    Args:
        path: the file.
        max_pixels: pixels of the largest frame that is decoded.

    Raises:
        BadSampleError: no such file, no video in it, or frames that are too large.
    """

    def __init__(self, path: Path, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        with self._opened() as (container, stream):
            width, height = stream.width, stream.height
            if width * height > max_pixels:
                raise BadSampleError(
                    f"{path} has frames of {width}x{height} pixels, more than data.max_pixels "
                    f"{max_pixels}"
                )
            self._length: int = sum(
                packet.size > 0 and not packet.is_discard for packet in container.demux(stream)
            )
        if not self._length:
            raise BadSampleError(f"{path} contains no frames")

    def __len__(self) -> int:
        """Return the number of frames, without decoding any."""
        return self._length

    def frames(self, numbers: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the requested frames, each uint8 (rows, columns, 3), in the requested order.

        Args:
            numbers: frame indices from 0, in any order, with repetitions allowed.

        Raises:
            BadSampleError: a frame cannot be decoded, or frames differ in size.
        """
        requested, last = set(numbers), max(numbers)
        found: dict[int, NDArray[np.uint8]] = {}
        with self._opened() as (container, stream):
            stream.codec_context.thread_count = 1  # data workers already use all cores
            for number, frame in enumerate(container.decode(stream)):
                if number in requested:
                    found[number] = _upright(frame)
                if number == last:
                    break
        missing = sorted(requested - set(found))
        if missing:
            raise BadSampleError(f"{self.path} ends or is damaged before frame {missing[0]}")
        if len({frame.shape for frame in found.values()}) > 1:
            raise BadSampleError(f"{self.path} has frames of different sizes")
        return [found[number] for number in numbers]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the file; yield container and video stream."""
        av = require_decoder()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BadSampleError(f"{self.path} contains no video")
                yield container, container.streams.video[0]
        except (av.FFmpegError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadSampleError(f"{self.path} cannot be decoded: {reason}") from None


def _upright(frame: Any) -> NDArray[np.uint8]:
    """Return the pixels of a frame, rotated by its display matrix (portrait recordings)."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))
