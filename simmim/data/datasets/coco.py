"""Images with objects, as the JSON files of COCO describe them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim.data.datasets.label_maps import NAMED, FileSet, read_bytes

FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {},
    "categories": {"id": int, "name": object},
}
"""What each part of a file must have, besides what is looked at object by object."""

FARTHEST = 100_000
"""Pixels from the corner of an image that a point of a polygon may be away."""


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """An image and the objects in it, as they lie on disk; `image` is the encoded file."""

    key: str
    shard_name: str
    image: bytes
    extension: str
    number: int
    """The image's id."""
    size: tuple[int, int]
    """Rows and columns, as the JSON file says."""
    objects: tuple[dict[str, Any], ...]
    """Its annotations."""

    @property
    def name(self) -> str:
        """What messages call it, and what seeds its randomness."""
        return f"{self.shard_name}/{self.key}"


class CocoSet(FileSet[dict[str, Any]]):
    """Images of a COCO JSON file; read as shards are.

    Args:
        images: folder of the images.
        annotations: the JSON file.
        only_with_objects: leave out images in which nothing is annotated but crowds.

    Raises:
        ValueError: a file is absent or not what it must be, or no image is left.
    """

    def __init__(
        self, images: str | Path, annotations: str | Path, *, only_with_objects: bool
    ) -> None:
        self.folder, self.file = Path(images), Path(annotations)
        if not self.folder.is_dir():
            raise ValueError(f"{images} is no folder: give the folder of the images.")
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
        if not self._items:
            raise ValueError(f"{annotations} describes no images with objects: give another file.")
        missing = [
            str(self.folder / image["file_name"])
            for image in self._items
            if not (self.folder / image["file_name"]).is_file()
        ]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._items)} images of {annotations} are absent: there "
                f"is no {', '.join(missing[:NAMED])}{' ...' if missing[NAMED:] else ''}."
            )

    def _sorted_objects(self) -> dict[int, list[dict[str, Any]]]:
        known = {image["id"] for image in self.content["images"]}
        found: dict[int, list[dict[str, Any]]] = {}
        for place, one in enumerate(self.content["annotations"]):
            what = f"{self.file}: annotation {one.get('id', f'in place {place}')}"
            if one.get("category_id") not in self.category_ids:
                raise ValueError(
                    f"{what} has the category_id {one.get('category_id')}, and there is no such "
                    f"category: they are {', '.join(map(str, self.category_ids))}."
                )
            image = one.get("image_id")
            if not isinstance(image, int | float) or image not in known:
                raise ValueError(f"{what} is of the image {image}, which is not in.")
            box = one.get("bbox")
            if not _numbers(box, 4) or min(box[2:]) < 0:
                raise ValueError(
                    f"{what} has the bbox {box}; it must be [left, top, width, height]."
                )
            found.setdefault(int(image), []).append(one)
        return found

    @property
    def digest(self) -> str:
        """SHA-256 over the descriptions of these images and their objects."""
        digest = hashlib.sha256(repr((self.class_names, self.category_ids)).encode())
        for image in self._items:
            described = [image, self._objects.get(image["id"], [])]
            digest.update(json.dumps(described, sort_keys=True).encode())
        return digest.hexdigest()

    def require_masks(self) -> None:
        """Leave polygons of under three points out, which cover nothing.

        Raises ValueError unless every object then has a segmentation that is right.
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
        if bare:
            raise ValueError(
                f"{bare.total()} objects of {self.file} have no segmentation (the first in image "
                f"{next(iter(bare))}), which masks are learnt from: choose head.kind rt_detr, "
                "which needs boxes alone."
            )

    def files(self) -> Iterator[Path]:
        """Yield the files of all images."""
        return (self.folder / image["file_name"] for image in self._items)

    def name(self, shard: int, sample: int) -> str:
        """Return file and image of a sample, as messages call it."""
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
        """Return the content of the file for these images, with the fields the metric needs."""
        images = {image["id"] for image in self._items}
        of_these = [one for image in sorted(images) for one in self._objects.get(image, ())]
        objects = [  # numbered anew: the metric takes the id 0 for "not found"
            {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} | one | {"id": number}
            for number, one in enumerate(of_these, start=1)
        ]
        return {
            "info": {},
            "images": self._items,
            "annotations": objects,
            "categories": self.content["categories"],
        }


def category_names(annotations: str | Path) -> tuple[str, ...]:
    """Return the names of the categories of a COCO file, in the order of their ids.

    Raises:
        ValueError: it is absent or not what it must be.
    """
    return _names(_read(Path(annotations)))


def _names(content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(one["name"]) for one in sorted(content["categories"], key=lambda one: one["id"])
    )


def has_mask(annotation: dict[str, Any]) -> bool:
    """Tell whether an object has polygons or a run-length mask."""
    return bool(annotation.get("segmentation"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is absent: give the JSON file of the annotations.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no JSON file that can be read: {error}.") from None
    missing = [part for part in FIELDS if not isinstance(content, dict) or part not in content]
    if missing:
        raise ValueError(f"{file} is no COCO file of objects: it has no {', '.join(missing)}.")
    assert isinstance(content, dict)
    for part, fields in FIELDS.items():
        if not isinstance(content[part], list):
            raise ValueError(f"{file}: {part} is no list.")
        for one in content[part]:
            _check_fields(one, fields, f"{file}: one of the {part}")
        if "id" in fields:
            for number, count in Counter(one["id"] for one in content[part]).most_common(1):
                if count > 1:
                    raise ValueError(f"{file}: {part} has the id {number} more than once.")
    return content


def _check_fields(one: Any, fields: Mapping[str, type], what: str) -> None:
    """Look at a part's fields; whole numbers that are written as fractions become whole ones."""
    if not isinstance(one, dict):
        raise ValueError(f"{what} is no object: {one}.")
    absent = [field for field in fields if field not in one]
    if absent:
        raise ValueError(f"{what} has no {', '.join(absent)}: {one}.")
    for field, kind in fields.items():
        value = one[field]
        if kind is int and isinstance(value, float) and value.is_integer():
            one[field] = value = int(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            named = "a whole number" if kind is int else "text"
            raise ValueError(f"{what} has the {field} {value!r}, which is not {named}: {one}.")
    lengths = [one[field] for field in ("height", "width") if field in fields]
    if lengths and min(lengths) < 1:
        raise ValueError(f"{what} has no pixels: {one}.")


def _numbers(found: Any, count: int | None = None) -> bool:
    """Tell whether this is a list of finite numbers, of some length."""
    if not isinstance(found, list) or (count is not None and len(found) != count):
        return False
    try:
        return all(map(math.isfinite, found))  # there are tens of millions in COCO
    except (TypeError, OverflowError):
        return False


def _wrong_mask(annotation: dict[str, Any], size: tuple[int, int]) -> str:
    """Say what is wrong with an object's segmentation; nothing where it is right, or absent."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        return _wrong_polygons(annotation)
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return _wrong_run_lengths(segmentation, size)
    return "that is neither a list of polygons nor a run-length mask of size and counts"


def _wrong_polygons(annotation: dict[str, Any]) -> str:
    polygons = annotation["segmentation"]
    if not all(_numbers(one) and not len(one) % 2 for one in polygons):
        return "that is not a list of polygons [x, y, x, y, x, y, ...]"
    if any(max(map(abs, one), default=0) > FARTHEST for one in polygons):
        return f"with a point more than {FARTHEST:,} pixels away"
    annotation["segmentation"] = [one for one in polygons if len(one) >= 6]
    return "" if annotation["segmentation"] else "without a polygon of three points or more"


def _wrong_run_lengths(described: dict[str, Any], size: tuple[int, int]) -> str:
    if described["size"] != list(size):
        found, wanted = described["size"], list(size)
        return f"of the size {found}, and its image is of {wanted}, rows and columns"
    counts = described["counts"]
    if isinstance(counts, str):
        counts = run_lengths(counts)
    right = isinstance(counts, list) and all(isinstance(one, int) and one >= 0 for one in counts)
    if right and sum(counts) == math.prod(size):
        return ""
    return f"whose counts are not those of {math.prod(size)} pixels"


def run_lengths(text: str) -> list[int]:
    """Return the run lengths that COCO writes as text; none where it breaks off or is no such text.

    Each number is of groups of five bits, the lowest first, a character for each, with a sixth bit
    where more follow; from the fourth number on it is the difference to the last but one.
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
