"""Real image files, drawn for the tests."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DrawImage = Callable[..., bytes]


def _draw(seed: int, *, image_format: str = "JPEG", mode: str = "RGB", size: int = 24) -> bytes:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=image_format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def draw_image() -> DrawImage:
    """Return a function that draws an image file: (seed, image_format, mode, size) → bytes."""
    return _draw


@pytest.fixture
def image_files(draw_image: DrawImage) -> dict[str, bytes]:
    """24 images in two splits of three classes: path → bytes."""
    return {
        f"{split}/{name}/{number}.{suffix}": draw_image(
            seed * 8 + number, image_format="PNG" if suffix == "png" else "JPEG"
        )
        for seed, (split, name, suffix) in enumerate(
            [
                ("train", "cat", "jpg"),
                ("train", "dog", "JPEG"),
                ("train", "owl", "png"),
                ("test", "cat", "jpg"),
            ]
        )
        for number in range(6)
    }


@pytest.fixture
def image_folder(tmp_path: Path, image_files: dict[str, bytes]) -> Path:
    """A folder of `image_files`."""
    for name, data in image_files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def image_zip(tmp_path: Path, image_files: dict[str, bytes]) -> Path:
    """A zip of `image_files`, half of them deflated."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, data) in enumerate(image_files.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if number % 2 else None)
    return path


@pytest.fixture
def image_tar(tmp_path: Path, image_files: dict[str, bytes]) -> Path:
    """A tar of `image_files`."""
    path = tmp_path / "images.tar"
    write_members(path, image_files)
    return path


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, dict[str, bytes]], None]:
    """Return a function that writes a tar of (path → bytes)."""
    return write_members


def write_members(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar of plain members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
