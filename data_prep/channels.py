"""Names of the channels of images, and how two lists of them match.

Names are lower-case letters, digits and underscores: `red`, `nir`, `ct`, or any other. The names
of Sentinel-2's bands, B1 to B12 and B8A, are read as the colours they stand for, so that B4 of one
set is red of another.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:  # command lines and recipes need no NumPy
    from numpy.typing import NDArray

ChannelNames: TypeAlias = tuple[str, ...]
"""The channels of an image in the order in which they are stored."""
AdaptRule = Literal["repeat", "average", "zero"]
"""Weights of a channel that trained weights do not have; see `channel_sources`."""

GRAY: ChannelNames = ("gray",)
RGB: ChannelNames = ("red", "green", "blue")
RGBA: ChannelNames = (*RGB, "alpha")
PICTURES = {1: GRAY, 3: RGB, 4: RGBA}
"""Names of the channels that a picture is decoded to, by their number: decoders convert them into
each other."""
_SENTINEL2 = {
    "b1": "coastal",
    "b2": "blue",
    "b3": "green",
    "b4": "red",
    "b5": "rededge1",
    "b6": "rededge2",
    "b7": "rededge3",
    "b8": "nir",
    "b8a": "narrow_nir",
    "b9": "water_vapour",
    "b10": "cirrus",
    "b11": "swir1",
    "b12": "swir2",
}
SETS = {"rgb": RGB, "rgba": RGBA, "sentinel2": tuple(_SENTINEL2.values())}
"""Names that stand for several channels, where one list has nothing else."""
_ALIASES = {**_SENTINEL2, "grey": "gray", "near_infrared": "nir"}
_NAME = re.compile(r"[a-z0-9_]{1,64}")


class ChannelNameError(ValueError):
    """Names of channels that cannot be used, or that do not match."""


def read_names(names: str | Iterable[str]) -> ChannelNames:
    """Return names of channels in their canonical form.

    Args:
        names: names, or text in which commas or blanks separate them: `red,green,blue`, `B2 B3`.
            One of SETS alone stands for its channels.

    Raises:
        ChannelNameError: there are none, one is not a name, or one is given twice.
    """
    if isinstance(names, str):
        names = re.split(r"[,\s]+", names.strip(", \t\n"))
    return _read_names(tuple(names))


@lru_cache
def _read_names(parts: tuple[str, ...]) -> ChannelNames:
    if len(parts) == 1 and parts[0].lower() in SETS:
        return SETS[parts[0].lower()]
    found = tuple(read_name(part) for part in parts)
    repeated = sorted({name for name in found if found.count(name) > 1})
    if not found or repeated:
        what = f"{repeated[0]} is given twice" if repeated else "there are none"
        raise ChannelNameError(f"channels {describe(found)}: {what}; give each channel one name.")
    return found


def read_name(name: str) -> str:
    """Return one name in its canonical form: lower case, and B4 of Sentinel-2 as red.

    Raises:
        ChannelNameError: it is not a name.
    """
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    plain = re.sub(r"\Ab0(?=\d)", "b", plain)  # B04 of Sentinel-2's files
    plain = _ALIASES.get(plain, plain)
    if not _NAME.fullmatch(plain):
        raise ChannelNameError(
            f"{name!r} is not a channel name: use letters, digits and underscores, as in red, "
            "nir or B8A."
        )
    return plain


def describe(names: Sequence[str] | None) -> str:
    """Return names as text, as options take them."""
    return "without names" if names is None else f"[{', '.join(names)}]"


def are_pictures(*lists: Sequence[str]) -> bool:
    """Return whether all are grey or colour, which the decoder of pictures converts."""
    return all(tuple(names) in PICTURES.values() for names in lists)


def order_of(have: Sequence[str], want: Sequence[str]) -> tuple[int, ...]:
    """Return where the wanted channels are among those of an image.

    Raises:
        ChannelNameError: it lacks one of them.
    """
    missing = [name for name in want if name not in have]
    if missing:
        raise ChannelNameError(
            f"channels {describe(have)} lack {', '.join(missing)} of {describe(want)}"
        )
    places = {name: place for place, name in enumerate(have)}
    return tuple(places[name] for name in want)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Some of the channels of an image, in another order."""

    count: int
    """Channels that the image has."""
    order: tuple[int, ...]
    """Place of each chosen channel among them."""

    def take(self, pixels: "NDArray[Any]") -> "NDArray[Any]":
        """Return the chosen channels of pixels, (..., channels)."""
        taken: NDArray[Any] = pixels[..., list(self.order)].copy(order="C")
        return taken

    def of(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the numbers of the chosen channels, one per channel."""
        return tuple(values[place] for place in self.order)


def choose(have: ChannelNames | None, want: ChannelNames | None) -> Choice | None:
    """Return which channels of an image are taken; None: all, in their order.

    Channels without names are taken by their number, and grey and colour are converted by the
    decoder.

    Raises:
        ChannelNameError: the image lacks one.
    """
    if have is None or want is None or have == want or are_pictures(have, want):
        return None
    have = RGB if are_pictures(have) else have
    return Choice(count=len(have), order=order_of(have, want))


def compare_names(have: Sequence[str], want: Sequence[str]) -> str:
    """Return how the channels of images differ from those wanted; empty if they do not."""
    if tuple(have) == tuple(want):
        return ""
    missing = [name for name in want if name not in have]
    more = [name for name in have if name not in want]
    if not missing and not more:
        return "the same in another order"
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"additional {', '.join(more)}"] if more else []
    return ", ".join(parts)


def channel_sources(
    have: Sequence[str], want: Sequence[str], rule: AdaptRule
) -> tuple[tuple[int, ...], ...]:
    """Return for each wanted channel those of trained weights whose mean it starts from.

    A channel that both have keeps its weights. Another starts, by the rule, from one of the trained
    channels in turn (`repeat`), from the mean of all (`average`), or from zeros (`zero`: none).
    """
    sources: list[tuple[int, ...]] = []
    new = 0
    for name in want:
        if name in have:
            sources.append((list(have).index(name),))
        elif rule == "repeat":
            sources.append((new % len(have),))
        else:
            sources.append(tuple(range(len(have))) if rule == "average" else ())
        new += name not in have
    return tuple(sources)
