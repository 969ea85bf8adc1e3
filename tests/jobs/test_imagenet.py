"""The README's commands for ImageNet's layouts, run on small copies of the layouts."""

import os
import re
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.format.manifest import read_manifest
from simmim.data.datasets.shards import ShardSet

TEXT = (Path(__file__).parents[2] / "jobs" / "README.md").read_text()
CLASSES = [f"n{1000 + number}" for number in range(11)]  # more than ten: "10" sorts before "2"


def jpeg(number: int) -> bytes:
    """Return a JPEG of a uniform grey that identifies its class."""
    file = BytesIO()
    Image.fromarray(np.full((16, 16, 3), 10 * number, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_layouts(folder: Path) -> None:
    """Write V1's archive of archives and flat folder, and V2's numbered folders."""
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, name in enumerate(CLASSES):
            inner = BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for image in range(2):
                    entry = tarfile.TarInfo(f"{name}_{image}.JPEG")
                    entry.size = len(jpeg(number))
                    archive.addfile(entry, BytesIO(jpeg(number)))
            entry = tarfile.TarInfo(f"{name}.tar")
            entry.size = len(inner.getvalue())
            outer.addfile(entry, BytesIO(inner.getvalue()))
    order = [7, 2, 10, 0, 1, 3, 4, 5, 6, 8, 9]
    (folder / "ILSVRC2012_img_val").mkdir()
    for place, number in enumerate(order, start=1):
        file = folder / "ILSVRC2012_img_val" / f"ILSVRC2012_val_{place:08d}.JPEG"
        file.write_bytes(jpeg(number))
    labels = "".join(f"{CLASSES[number]}\n" for number in order)
    (folder / "synset_labels.txt").write_text(labels)
    for number in range(len(CLASSES)):
        (folder / "imagenetv2" / str(number)).mkdir(parents=True)
        (folder / "imagenetv2" / str(number) / "abc.jpeg").write_bytes(jpeg(number))


def test_each_image_gets_its_own_class(tmp_path: Path) -> None:
    write_layouts(tmp_path)
    script = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
    root = str(Path(__file__).parents[2])
    command = f'data-prep() {{ "{sys.executable}" -m data_prep "$@"; }}\nset -eu\n'
    command += f'python() {{ "{sys.executable}" "$@"; }}\n{script}'
    subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    for name, count in (("imagenet", 22), ("imagenet-val", 11), ("imagenet-v2", 11)):
        folder = tmp_path / "shards" / name
        assert list(read_manifest(folder).classes) == CLASSES
        shards = ShardSet(str(folder))
        assert shards.samples == count
        for shard, size in enumerate(shards.sizes):
            for sample in range(size):
                raw = shards.read(shard, sample)
                grey = np.array(Image.open(BytesIO(raw.image))).mean() / 10
                assert raw.label == round(float(grey))
