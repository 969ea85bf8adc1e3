"""Damaged archives and lists: no crash, no hang; every file is accepted or listed as rejected."""

import csv
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from data_prep.format.index import index_tar
from data_prep.format.manifest import READ_EXTENSIONS
from data_prep.format.tars import TarError
from data_prep.sources.image_source import open_source
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions

MUTANTS = 75


def _mutate(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat or remove, mostly where headers are."""
    mutant = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(mutant))
        match draw.randrange(6):
            case 0:
                mutant[place] ^= 1 << draw.randrange(8)
            case 1:
                mutant[place] = draw.choice(b"\x00\xff0179/.,\n\t")
            case 2:
                place = place // 512 * 512 + draw.randrange(512)
                mutant[place : place + 4] = draw.randbytes(4)
            case 3:
                del mutant[place : place + draw.randrange(1, 600)]
            case 4:
                mutant[place:place] = mutant[place : place + 512]
            case _:
                tail = len(mutant) - draw.randrange(1, min(len(mutant), 2000))
                mutant[tail] = draw.randrange(256)
        if not mutant:
            break
    return bytes(mutant)


def _write_sources(
    folder: Path, files: dict[str, bytes], write_tar: Callable[..., None]
) -> dict[str, bytes]:
    few = dict(list(files.items())[:6])
    write_tar(folder / "inner.tar", {Path(path).name: data for path, data in few.items()})
    inner = (folder / "inner.tar").read_bytes()
    write_tar(folder / "nested.tar", {"cat.tar": inner, "dog.tar": inner})
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", "note"])
        rows.writerows([f"images/{path}", "1", "train", "a, b"] for path in files)
    names = ("\n".join(f"images/{path}\t{number}" for number, path in enumerate(files))).encode()
    return {
        "nested.tar": (folder / "nested.tar").read_bytes(),
        "list.csv": (folder / "list.csv").read_bytes(),
        "list.txt": names,
        "images.zip": (folder / "images.zip").read_bytes(),
        "images.tar": (folder / "images.tar").read_bytes(),
    }


@pytest.mark.parametrize("name", ["nested.tar", "list.csv", "list.txt", "images.zip", "images.tar"])
def test_accepted_plus_rejected_is_found(
    name: str,
    image_folder: Path,
    image_files: dict[str, bytes],
    image_zip: Path,
    image_tar: Path,
    tmp_path: Path,
    write_tar: Callable[..., None],
) -> None:
    whole = _write_sources(tmp_path, image_files, write_tar)[name]
    draw = random.Random(name)
    messages, built_sets = [], 0
    for mutant in range(MUTANTS):
        (tmp_path / name).write_bytes(_mutate(whole, draw))
        folder = tmp_path / f"out-{mutant}"
        try:
            built = build_shards(tmp_path / name, folder, ShardOptions(samples_per_shard=30))
        except (ValueError, TarError) as error:
            messages.append(str(error))
            assert not folder.exists()
        else:
            assert built.manifest is not None
            rejected = folder / "rejected.jsonl"
            lines = rejected.read_text().splitlines() if rejected.exists() else []
            assert built.manifest.rejected == len(lines)
            assert built.manifest.samples + len(lines) == built.found
            built_sets += 1
    assert all(messages)
    assert built_sets > 1  # few tars: one that is longer or shorter than it says is refused
    assert built_sets + len(messages) == MUTANTS


def _mutate_header(data: bytes, draw: random.Random) -> bytes:
    """Change bytes and put the checksums of their headers right, so that readers take them."""
    mutant = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(mutant)) // 512 * 512
        mutant[place + draw.randrange(512)] = draw.randrange(256)
        header = mutant[place : place + 512]
        if header[257:262] == b"ustar":
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            mutant[place + 148 : place + 156] = b"%06o\0 " % total
    return bytes(mutant)


def _index(folder: Path) -> int | None:
    """Return the number of samples in the index of the only tar, None if it is refused."""
    try:
        return len(index_tar(folder / "a.tar", lambda _: None, extensions=READ_EXTENSIONS).index)
    except TarError:
        return None


def _reshard(folder: Path) -> int | None:
    try:
        with closing(open_source(folder, shards=True)) as source:
            files = [file for file in source.files() if file.problem != "its sample has no image"]
    except TarError:
        return None
    return None if any(file.problem for file in files) else len(files)


@pytest.mark.parametrize(
    "count", [400, pytest.param(30_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_index_and_reshard_agree_on_every_mutant(
    count: int, tmp_path: Path, write_tar: Callable[..., None]
) -> None:
    members = {}
    for number in range(4):
        key = "x/" * 60 + "2" if number == 2 else str(number)
        picture = {f"{key}.{'jpg' if number else 'gif'}": bytes([number]) * 300}
        about = b'{"path": "a/b.jpg", "caption": "an owl"}'
        members |= {f"{key}.cls": b"3", **picture, f"{key}.json": about}
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    draw = random.Random(7)
    accepted = 0
    for number in range(count):
        mutant = (_mutate, _mutate_header)[number % 2](whole, draw)
        (tmp_path / "a.tar").write_bytes(mutant)
        found = _index(tmp_path)
        assert _reshard(tmp_path) == found, number
        accepted += found is not None
    assert count // 20 < accepted < count - count // 20
