"""Damaged lists and archives, nested ones too: an error that names them, or files with problems."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep.format.tars import TarError
from data_prep.sources.files import SourceError, UnreadableFileError
from data_prep.sources.image_source import open_source

FEW, FULL = 60, 3_000


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, zipfile.ZIP_STORED if number % 2 else None)
    return stream.getvalue()


def _seeds() -> dict[str, bytes]:
    files = {"cat/0.jpg": b"a" * 700, "dog/1.png": bytes(range(256)) * 3, "x.txt": b"text"}
    inner = {"a.tgz": gzip.compress(_tar(files)), "b.zip": _zip(files), "c.tar": _tar(files)}
    inner |= {"d.tar.bz2": bz2.compress(_tar(files)), "e.txz": lzma.compress(_tar(files))}
    rows = [("a b/c.jpg", "x"), ("d,e.jpg", "y 7"), ("f'g.png", ""), ("h.webp", "nan")]
    quoted = [f'"{path}",{label}\n' for path, label in rows]
    lines = [f'{{"file": "{path}", "label": "{label}"}}\n' for path, label in rows]
    plain = "".join(f"{path}\t{label}\n" for path, label in rows)
    return {
        "a.tar": _tar(files | inner),
        "a.zip": _zip(files | inner),
        "a.tar.gz": gzip.compress(_tar(files | inner)),
        "a.csv": f"path,label\n{''.join(quoted)}".encode(),
        "a.jsonl": "".join(lines).encode(),
        "a.txt": plain.encode(),
        "a.tsv": f"image\tclass\n{plain}".encode(),
    }


def _mutate(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match int(rng.integers(4)):
        case 0:
            for _ in range(length % 5 + 1):
                damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        case 1:
            del damaged[place:]
        case 2:
            del damaged[place : place + length]
        case _:
            signs = b'"\n\r\t,;\\/ \x00\xff.:{}0-'
            damaged[place:place] = bytes(rng.choice(list(signs), length % 4 + 1).tolist())
    return bytes(damaged)


@pytest.mark.parametrize(
    "count",
    [pytest.param(FEW, id="few"), pytest.param(FULL, id="full", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", list(_seeds()))
def test_a_damaged_source_is_named_or_read(name: str, count: int, tmp_path: Path) -> None:
    seed, path = _seeds()[name], tmp_path / name
    path.write_bytes(seed)
    assert "" in _read(path) or name.endswith(("csv", "jsonl", "txt", "tsv"))
    rng = np.random.default_rng(len(seed))
    messages = []
    for _ in range(count):
        path.write_bytes(_mutate(seed, rng))
        try:
            _read(path)
        except (SourceError, TarError) as error:
            messages.append(str(error))
    assert all(str(path) in message for message in messages)


def _read(path: Path) -> set[str]:
    """Read all files of a source that can be read; return the problems found."""
    problems = set()
    with closing(open_source(path)) as source:
        for file in source.files():
            problems.add(file.problem)
            if not file.problem:
                with suppress(UnreadableFileError):
                    assert len(source.read(file)) == file.size
    return problems
