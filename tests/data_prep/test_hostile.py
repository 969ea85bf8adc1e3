"""Damaged archives and lists: no crash, no hang; every file is accepted or listed as rejected."""

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.format.tars import TarError
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
