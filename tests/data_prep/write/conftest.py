"""A store in memory, and a folder with bad images."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep.format.storage import RemotePath


@pytest.fixture
def store() -> Iterator[RemotePath]:
    """An empty prefix of a store in memory."""
    fsspec.filesystem("memory").store.clear()
    yield RemotePath("memory://bucket/set")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def gappy(image_folder: Path) -> Path:
    """24 images of which three are bad, so that shards of one or three come out empty."""
    for name in ("test/cat/0.jpg", "test/cat/5.jpg", "train/dog/3.JPEG"):
        (image_folder / name).write_bytes(b"some text")
    return image_folder
