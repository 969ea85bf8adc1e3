"""Images annotated with objects in COCO's JSON format."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, with_config
from typing_extensions import TypedDict

from data_prep.bounds import Bounds
from data_prep.channels import ChannelNames
from data_prep.format.text import count_noun
from data_prep.validation import parse_json
from simmim.data.datasets.local_files import FileSet, list_files, read_bytes

MAX_COORDINATE = 100_000
"""Largest coordinate of a polygon, in pixels."""


def _as_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integer: TypeAlias = Annotated[int, Bounds(), BeforeValidator(_as_integer)]
_Side: TypeAlias = Annotated[int, Bounds(ge=1), BeforeValidator(_as_integer)]


@with_config({"extra": "allow"})
class _Image(TypedDict):
    id: _Integer
    file_name: str
    height: _Side
    width: _Side


@with_config({"extra": "allow"})
class _Category(TypedDict):
    id: _Integer
    name: Any


class _Content(TypedDict):
    images: list[_Image]
    annotations: list[dict[str, Any]]
    """Checked one by one, by `CocoSet`: messages name them by their ids."""
    categories: list[_Category]


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """An encoded image and its annotated objects."""

    key: str
    shard_name: str
    image: bytes
    extension: str
    channels: ChannelNames | None = None
    """Names of its channels; None if only the file itself may have them."""
    number: int
    """Image id."""
    size: tuple[int, int]
    """Height and width according to the JSON file."""
    objects: tuple[dict[str, Any], ...]
    """Annotations of the image."""

    @property
    def name(self) -> str:
        """Name in messages, and random seed."""
        return f"{self.shard_name}/{self.key}"


class CocoSet(FileSet[CocoImage, _Image]):
    """The images of a COCO JSON file.

    Args:
        images: folder of the images.
        annotations: the JSON file.
        only_with_objects: skip images without objects other than crowds.

    Raises:
        ValueError: a file is missing or malformed, or no image is left.
    """

    def __init__(
        self, images: str | Path, annotations: str | Path, *, only_with_objects: bool
    ) -> None:
        self.folder, self.file = Path(images), Path(annotations)
        if not self.folder.is_dir():
            raise ValueError(f"{images} is not a folder: give the folder of the images.")
        self.content = _read(self.file)
        self.class_names = _names(self.content)
        self.category_ids = tuple(sorted(int(one["id"]) for one in self.content["categories"]))
        self._objects = self._sorted_objects()
        self._items = [
            image
            for image in sorted(self.content["images"], key=lambda one: one["id"])
            if not only_with_objects
            or any(not one.get("iscrowd", 0) for one in self._objects.get(image["id"], ()))
        ]
        if not any(map(_counts, self._objects_of_items())):
            raise ValueError(
                f"{annotations} has no images with objects, other than crowds and empty boxes: "
                f"there is nothing to {'learn' if only_with_objects else 'measure'}. Give another "
                "file."
            )
        self._check_shared()
        missing = [
            str(self.folder / image["file_name"])
            for image in self._items
            if not (self.folder / image["file_name"]).is_file()
        ]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._items)} images of {annotations} are missing: "
                f"{list_files(missing)}. Add the files, or correct data.images."
            )

    def _objects_of_items(self) -> Iterator[dict[str, Any]]:
        for image in self._items:
            yield from self._objects.get(image["id"], ())

    def _check_shared(self) -> None:
        first: dict[Path, Any] = {}
        for image in self._items:
            other = first.setdefault(Path(os.path.normpath(image["file_name"])), image)
            if other is not image:
                raise ValueError(
                    f"{self.file}: the images {other['id']} and {image['id']} share the file "
                    f"{image['file_name']}: give all its objects one image_id."
                )

    def _sorted_objects(self) -> dict[int, list[dict[str, Any]]]:
        known = {image["id"] for image in self.content["images"]}
        found: dict[int, list[dict[str, Any]]] = {}
        for index, one in enumerate(self.content["annotations"]):
            number = repr(one["id"]) if "id" in one else f"at index {index}"
            what = f"{self.file}: annotation {number}"
            if one.get("category_id") not in self.category_ids:
                raise ValueError(
                    f"{what} has the unknown category_id {_shown(one.get('category_id'))}: choose "
                    f"from {', '.join(map(str, self.category_ids))}."
                )
            image = one.get("image_id")
            if not isinstance(image, int | float) or image not in known:
                raise ValueError(
                    f"{what} has the image_id {_shown(image)}, which is not in images."
                )
            box: Any = one.get("bbox")
            if not _numbers(box, 4) or min(box[2:]) < 0:
                raise ValueError(
                    f"{what} has the bbox {box}; it must be [left, top, width, height]."
                )
            if one.get("iscrowd") not in (None, 0, 1):
                raise ValueError(
                    f"{what} has the iscrowd {_shown(one['iscrowd'])}; it must be 0 or 1."
                )
            found.setdefault(int(image), []).append(one)
        return found

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield the categories, and the entries of the images and their objects."""
        yield repr((self.class_names, self.category_ids)).encode()
        for image in self._items:
            entries = [image, self._objects.get(image["id"], [])]
            yield json.dumps(entries, sort_keys=True).encode()

    def require_masks(self) -> None:
        """Drop polygons of fewer than three points, and check all segmentations.

        Raises ValueError unless every object then has a valid segmentation.
        """
        for image in self.content["images"]:
            for one in self._objects.get(image["id"], ()):
                wrong = _wrong_mask(one, (image["height"], image["width"]))
                if wrong:
                    what = f"an annotation (id {one.get('id')}) of image {image['id']}"
                    raise ValueError(f"{self.file}: {what} has a segmentation {wrong}.")
        bare = Counter(
            image for image, ones in self._objects.items() for one in ones if not has_mask(one)
        )
        total = bare.total()
        if total:
            raise ValueError(
                f"{count_noun(total, 'object')} of {self.file}"
                f" {'has' if total == 1 else 'have'} no segmentation (the first in image "
                f"{next(iter(bare))}), which masks are learned from: choose head.kind rt_detr, "
                "which needs only boxes."
            )

    def files(self) -> Iterator[Path]:
        """Yield all image files."""
        return (self.folder / image["file_name"] for image in self._items)

    def name(self, shard: int, sample: int) -> str:
        """Return file and image of a sample, for messages."""
        return f"{self.file.stem}/{self.item(shard, sample)['file_name']}"

    def read(self, shard: int, sample: int) -> CocoImage:
        """Return a sample. Raises DataError naming a file that cannot be read."""
        image = self.item(shard, sample)
        file = self.folder / image["file_name"]
        return CocoImage(
            key=str(image["file_name"]),
            shard_name=self.file.stem,
            image=read_bytes(file),
            extension=file.suffix[1:].lower(),
            number=int(image["id"]),
            size=(int(image["height"]), int(image["width"])),
            objects=tuple(self._objects.get(image["id"], ())),
        )

    def objects_of(self, image: int) -> tuple[dict[str, Any], ...]:
        """Return the annotations of the image with this id."""
        return tuple(self._objects.get(image, ()))

    def ground_truth(self) -> dict[str, Any]:
        """Return the JSON content for these images, with the fields that the metric needs."""
        images = {image["id"] for image in self._items}
        of_these = [one for image in sorted(images) for one in self._objects.get(image, ())]
        objects = [  # renumbered: the metric takes the id 0 for "not found"
            {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} | one | {"id": number}
            for number, one in enumerate(of_these, start=1)
        ]
        return {
            "info": {},
            "images": self._items,
            "annotations": objects,
            "categories": self.content["categories"],
        }


def _counts(annotation: dict[str, Any]) -> bool:
    """Return whether an object is learned from and measured: no crowd, no empty box."""
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0


def _shown(number: Any) -> str:
    """Return an id as in the JSON file, for a message: text in quotes, with what it should be."""
    if isinstance(number, str):
        return f"{number!r} (text: write the number without quotes)"
    return repr(number)


def category_names(annotations: str | Path) -> tuple[str, ...]:
    """Return the names of the categories of a COCO file, in the order of their ids.

    Raises:
        ValueError: it is missing or malformed.
    """
    return _names(_read(Path(annotations)))


def _names(content: _Content) -> tuple[str, ...]:
    return tuple(
        str(one["name"]) for one in sorted(content["categories"], key=lambda one: one["id"])
    )


def has_mask(annotation: dict[str, Any]) -> bool:
    """Return whether an object has polygons or a run-length mask."""
    return bool(annotation.get("segmentation"))


def _read(file: Path) -> _Content:
    try:
        content = parse_json(file.read_bytes(), _Content)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: give the JSON file of the annotations.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a COCO file of objects: {error}.") from None
    for part, entries in (("images", content["images"]), ("categories", content["categories"])):
        for number, count in Counter(one["id"] for one in entries).most_common(1):
            if count > 1:
                raise ValueError(f"{file}: {part} has the id {number} more than once.")
    return content


def _numbers(found: Any, count: int | None = None) -> bool:
    """Return whether a value is a list of finite numbers, of the given length."""
    if not isinstance(found, list) or (count is not None and len(found) != count):
        return False
    try:
        return all(map(math.isfinite, found))  # there are tens of millions in COCO
    except (TypeError, OverflowError):
        return False


def _wrong_mask(annotation: dict[str, Any], size: tuple[int, int]) -> str:
    """Describe the defect of an object's segmentation; empty if it is valid or missing."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        return _wrong_polygons(annotation)
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return _wrong_run_lengths(segmentation, size)
    return "that is neither a list of polygons nor a run-length mask with size and counts"


def _wrong_polygons(annotation: dict[str, Any]) -> str:
    polygons = annotation["segmentation"]
    if not all(_numbers(one) and not len(one) % 2 for one in polygons):
        return "that is not a list of polygons [x, y, x, y, x, y, ...]"
    if any(max(map(abs, one), default=0) > MAX_COORDINATE for one in polygons):
        return f"with a coordinate beyond {MAX_COORDINATE:,} pixels"
    annotation["segmentation"] = [one for one in polygons if len(one) >= 6]
    return "" if annotation["segmentation"] else "without a polygon of three points or more"


def _wrong_run_lengths(encoded: dict[str, Any], size: tuple[int, int]) -> str:
    if encoded["size"] != list(size):
        return f"of size {encoded['size']}, but its image is of size {list(size)} (rows, columns)"
    counts = encoded["counts"]
    if isinstance(counts, str):
        counts = run_lengths(counts)
    right = isinstance(counts, list) and all(isinstance(one, int) and one >= 0 for one in counts)
    if right and sum(counts) == math.prod(size):
        return ""
    return f"whose counts do not add up to {math.prod(size)} pixels"


def run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths; an empty list if the text is invalid or truncated.

    A number is a sequence of characters of five bits each, lowest first, with a sixth bit set if
    more follow; from the fourth number on, it is the difference to the number two before.
    """
    found: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            return []
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    return [] if shift else found
