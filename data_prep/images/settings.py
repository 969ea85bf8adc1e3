"""Settings of image checks and encoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from data_prep.bounds import Bounds, Count, check_bounds

MAX_PIXELS = 89_478_485
"""Default of the largest accepted image, in pixels."""
MAX_READ_PIXELS = 178_956_970
"""Default of the largest image that is read back from shards, in pixels."""
Format = Literal["keep", "jpeg", "png", "webp"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""Valid values of `Encoding.format`."""


def read_limit(options: Mapping[str, Any]) -> int:
    """Return the largest image to read back, in pixels, of a set written with these options."""
    limit = options.get("max_pixels")
    return max(MAX_READ_PIXELS, limit) if isinstance(limit, int) else MAX_READ_PIXELS


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Size and format of stored pictures; the defaults keep the bytes of JPEG, PNG and WebP."""

    max_side: Count | None = None
    """Shrink pictures whose longer side has more pixels."""
    short_side: Count | None = None
    """Shrink pictures whose shorter side has more pixels."""
    format: Format = "keep"
    """Format of all pictures; keep: JPEG, PNG and WebP byte for byte, others as PNG."""
    quality: Annotated[int, Bounds(ge=1, le=100)] = 95
    """Quality of new JPEG, WebP; 4:4:4 from 90."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")
        if self.format not in FORMATS:
            raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}.")

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the stored (width, height) of a picture of this size."""
        if self.max_side is None and self.short_side is None:
            return width, height
        long, short = max(width, height), min(width, height)
        # The limit that shrinks more counts; (wanted, present) avoids fractions.
        ratios = [(1, 1)]
        if self.max_side is not None:
            ratios.append((self.max_side, long))
        if self.short_side is not None:
            ratios.append((self.short_side, short))
        wanted, present = min(ratios, key=lambda ratio: ratio[0] / ratio[1])
        sides = (max(1, (2 * side * wanted + present) // (2 * present)) for side in (width, height))
        return next(sides), next(sides)

    def target_format(self, own: str | None) -> str:
        """Return the stored format, jpeg, png or webp, of a picture with this format."""
        return self.format if self.format != "keep" else own or "png"
