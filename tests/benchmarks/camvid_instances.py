"""Convert CamVid's labels to COCO instances: connected components of its movable classes.

    python tests/benchmarks/camvid_instances.py camvid train camvid/train.json

With `--images 8 --smallest 1500` it writes the set that jobs/finetune/detection-camvid.yaml
overfits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects, label

MOVABLE = {8: "car", 9: "pedestrian", 10: "bicyclist"}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as COCO's uncompressed RLE: column-major, starting with a run of zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def objects_of(classes: np.ndarray, image: int, first: int, smallest: int) -> list[dict[str, Any]]:
    """Return instances of at least `smallest` pixels in a label image; ids start at `first`."""
    found: list[dict[str, Any]] = []
    for category in MOVABLE:
        parts, _ = label(classes == category)
        for number, (rows, columns) in enumerate(find_objects(parts), start=1):
            mask = parts == number
            if mask.sum() >= smallest:
                found.append(
                    {
                        "id": first + len(found),
                        "image_id": image,
                        "category_id": category,
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "bbox": [
                            int(columns.start),
                            int(rows.start),
                            int(columns.stop - columns.start),
                            int(rows.stop - rows.start),
                        ],
                        "segmentation": run_lengths(mask),
                    }
                )
    return found


def convert(
    folder: Path, split: str, *, count: int | None = None, smallest: int = 64
) -> dict[str, Any]:
    """Return COCO annotations for a split of CamVid, or for its first `count` images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    files = sorted((folder / "images" / split).glob("*.jpg"))
    for number, file in enumerate(files[:count], start=1):
        labels = folder / "annotations" / split / f"{file.stem}.png"
        classes = np.asarray(Image.open(labels))
        height, width = classes.shape
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        annotations += objects_of(classes, number, len(annotations) + 1, smallest)
    categories = [{"id": number, "name": name} for number, name in MOVABLE.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("split")
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--images", type=int, help="only the first N images of the split", metavar="N"
    )
    parser.add_argument(
        "--smallest", type=int, default=64, help="minimum area of an instance, in pixels"
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    content = convert(
        arguments.folder, arguments.split, count=arguments.images, smallest=arguments.smallest
    )
    arguments.destination.write_text(json.dumps(content))
    print(f"{len(content['annotations'])} objects in {len(content['images'])} images")


if __name__ == "__main__":
    main()
