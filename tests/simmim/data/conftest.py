"""Real shards for the tests: small images in WebDataset tars with manifest and indexes."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.format.index import ShardIndex, write_index
from data_prep.format.manifest import Manifest, ShardEntry, write_manifest
from simmim.data.transforms.settings import RandomCropSettings

WriteShards = Callable[..., Path]


def crop(side: int) -> RandomCropSettings:
    """Settings of random crops of SimMIM's scale."""
    return RandomCropSettings(image_size=side, scale=(0.67, 1.0))


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def random_images(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 24, (count, 2))
    return [encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def write_shard(
    folder: Path, number: int, images: Sequence[bytes], labels: list[int], extension: str = "png"
) -> ShardEntry:
    path = folder / f"shard-{number:06d}.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            sample = {"__key__": f"{number:03d}{row:06d}", extension: image}
            writer.write(sample if label < 0 else sample | {"cls": str(label).encode()})
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(f".{extension}")]
    index = ShardIndex(
        offsets=np.array([member.offset_data for member in members]),
        sizes=np.array([member.size for member in members]),
        labels=np.array(labels),
        keys=np.array([member.name.split(".")[0] for member in members]),
        extensions=np.array([extension] * len(members)),
    )
    write_index(path.with_suffix(".npy"), index)
    content = path.read_bytes()
    return ShardEntry(
        name=path.name,
        samples=len(images),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        index=path.with_suffix(".npy").name,
    )


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Write shards of these sizes; the label of an image is its place modulo the classes."""

    def write(
        sizes: Sequence[int],
        classes: tuple[str, ...] = (),
        images: Sequence[bytes] | None = None,
        *,
        name: str = "shards",
        extension: str = "png",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        images = random_images(sum(sizes)) if images is None else images
        entries = []
        for number, size in enumerate(sizes):
            first = sum(sizes[:number])
            places = range(first, first + size)
            labels = [place % len(classes) if classes else -1 for place in places]
            entries.append(
                write_shard(folder, number, images[first : first + size], labels, extension)
            )
        write_manifest(Manifest(folder=folder, shards=tuple(entries), classes=classes))
        return folder

    return write
