"""Frames of a video file, decoded at the numbers that are asked for and at no others' cost.

PyAV (the extra `simmim[video]`) brings FFmpeg with it, as a wheel for every platform. Frames are
decoded one after the other up to the last that is asked for, and only those asked for are turned
into pixels: so a number means the same frame in every container, also where time stamps are missing
or in disorder, and nothing depends on the places of key frames. torchcodec is built for one version
of torch each, and takes the FFmpeg that it finds installed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simmim.data.order.errors import BadSampleError
from simmim.data.transforms.pillow_decoding import MAX_PIXELS


def require_decoder() -> Any:
    """Return PyAV.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av  # noqa: PLC0415
    except ImportError:
        raise ValueError(
            "clips are decoded with PyAV, which is missing: pip install 'simmim[video]'"
        ) from None
    return av


class Video:
    """One open video file.

    Args:
        path: of the file.
        max_pixels: pixels of the largest frame that is decoded.

    Raises:
        BadSampleError: there is no such file, no video in it, or its frames are too large.
    """

    def __init__(self, path: Path, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        with self._opened() as (container, stream):
            width, height = stream.width, stream.height
            if width * height > max_pixels:
                raise BadSampleError(
                    f"{path} has frames of {width}x{height}, more than the {max_pixels} pixels of "
                    "data.max_pixels"
                )
            self._length: int = sum(
                packet.size > 0 and not packet.is_discard for packet in container.demux(stream)
            )
        if not self._length:
            raise BadSampleError(f"{path} holds no frame")

    def __len__(self) -> int:
        """Return the number of frames that the file holds, without decoding any."""
        return self._length

    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Return the frames of these numbers, uint8 (rows, columns, 3) each, in their order.

        Args:
            numbers: from 0, in any order; a frame may be asked for more than once.

        Raises:
            BadSampleError: a frame cannot be decoded, or frames differ in size.
        """
        wanted, last = set(numbers), max(numbers)
        found: dict[int, np.ndarray] = {}
        with self._opened() as (container, stream):
            stream.codec_context.thread_count = 1  # workers share the processors already
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _upright(frame)
                if number == last:
                    break
        missing = sorted(wanted - set(found))
        if missing:
            raise BadSampleError(f"{self.path} ends or is damaged before frame {missing[0]}")
        if len({frame.shape for frame in found.values()}) > 1:
            raise BadSampleError(f"{self.path} changes the size of its frames")
        return [found[number] for number in numbers]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the file at its start: container and video stream."""
        av = require_decoder()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BadSampleError(f"{self.path} holds no video")
                yield container, container.streams.video[0]
        except (av.FFmpegError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadSampleError(f"{self.path} cannot be decoded: {reason}") from None


def _upright(frame: Any) -> np.ndarray:
    """Return the pixels of a frame, turned as its display matrix says (cameras held upright)."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))
