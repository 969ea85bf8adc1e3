"""One rule for labels in `cls`, for `index` and `reshard` alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.index import read_index
from data_prep.format.labels import MAX_CLASSES, LabelError, parse_label
from data_prep.format.manifest import read_manifest

LABELS = {
    b"0": 0,
    b"7": 7,
    b"007": 7,
    b"0000000000000000000000000012": 12,
    b" 3\n": 3,
    b"3\r\n": 3,
    b"999999": 999_999,
}
REFUSED = [
    b"",
    b" ",
    b"+1",
    b"-1",
    b"-0",
    b"1.0",
    b"1e3",
    b"1_0",
    b"0x7",
    b"1 2",
    b"cat",
    b"None",
    b"nan",
    b"true",
    b"[1]",
    b"\xef\xbb\xbf3",
    b"3\0",
    "\u0663".encode(),
    "\u00b2".encode(),
    b"\xff",
    str(MAX_CLASSES).encode(),
    b"9" * 32,
    b"9" * 5_000,
    b"0" * 33,
]


@pytest.mark.parametrize("data", LABELS)
def test_a_label_is_a_number(data: bytes) -> None:
    assert parse_label(data) == LABELS[data]


@pytest.mark.parametrize("data", REFUSED)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(LabelError, match="integer"):
        parse_label(data)


def _label_of(folder: Path) -> tuple[int, tuple[str, ...]]:
    manifest = read_manifest(folder)
    (label,) = (
        int(one) for shard in manifest.shards for one in read_index(folder, shard).labels if one
    )
    return label, manifest.classes


@pytest.mark.parametrize("data", [b"007", b" 3\n", b"0012"])
def test_index_and_reshard_read_the_same_label(
    data: bytes, tmp_path: Path, draw_image: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    (tmp_path / "a").mkdir()
    members = {"x.jpg": draw_image(0), "x.cls": data, "y.jpg": draw_image(1), "y.cls": b"00"}
    write_tar(tmp_path / "a" / "0.tar", members)
    alone = ["--workers", "1"]
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), *alone]) == 0
    assert main(["index", str(tmp_path / "a"), *alone]) == 0
    expected = parse_label(data)
    classes = tuple(map(str, range(expected + 1)))
    assert _label_of(tmp_path / "a") == _label_of(tmp_path / "b") == (expected, classes)
    # `shard` from the tar itself reads them too.
    assert main(["shard", str(tmp_path / "a" / "0.tar"), str(tmp_path / "d"), *alone]) == 0
    assert _label_of(tmp_path / "d") == (expected, classes)
    # With the manifest of `index` beside the tars, names come from there: they are the same.
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "c"), "--workers", "1"]) == 0
    assert _label_of(tmp_path / "c") == (expected, classes)


@pytest.mark.parametrize(
    "odd",
    [
        *({"o.jpg": b"", "o.cls": data} for data in (b"", b"+1", b"-1", b"1.0", b"cat", b"9" * 40)),
        {"o.jpg": b"", "o.png": b""},
        {"o.jpg": b"", "o.JPG": b""},
        {"o.jpg": b"", "o.cls": b"1", "o.CLS": b"2"},
        {"o.gif": b"", "o.bmp": b""},
        {"../o.jpg": b""},
        {"o\udcff.jpg": b""},
    ],
    ids=lambda odd: " ".join(f"{name!a}={value[:8]!r}" for name, value in odd.items()),
)
def test_index_and_reshard_refuse_the_same_samples(
    odd: dict[str, bytes],
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    write_tar: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a").mkdir()
    image = draw_image(0)
    good = {f"{number}.jpg": image for number in range(3)}
    filled = {name: data or (b"" if name.endswith("cls") else image) for name, data in odd.items()}
    write_tar(tmp_path / "a" / "0.tar", good | filled)
    assert main(["index", str(tmp_path / "a"), "--workers", "1"]) == 2
    assert "0.tar" in capsys.readouterr().err
    # What holds no cls at all is no WebDataset tar for `shard`: any name will do there.
    labelled = {"0.cls": b"0"} if any(name.endswith("cls") for name in odd) else {}
    write_tar(tmp_path / "a" / "0.tar", {"0.jpg": image} | labelled | good | filled)
    for name, source in (("reshard", tmp_path / "a"), ("shard", tmp_path / "a" / "0.tar")):
        if name == "shard" and not labelled:
            continue
        out = tmp_path / name
        command = [name, str(source), str(out), "--workers", "1"]
        assert main(command) == 2  # more than --max-rejected
        assert main([*command, "--max-rejected", "1"]) == 0
        assert read_manifest(out).samples == 3
        lines = (out / "rejected.jsonl").read_text().splitlines()
        assert lines
        assert all(json.loads(line)["path"].startswith("0.tar/") for line in lines)


def test_members_of_a_sample_that_are_apart_are_refused(
    tmp_path: Path, draw_image: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    """The image would lose its label otherwise, and the label its image."""
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a" / "0.tar", {"o.jpg": draw_image(0), "p.txt": b"x", "o.cls": b"1"})
    for command in (
        ["index", str(tmp_path / "a")],
        ["reshard", str(tmp_path / "a"), str(tmp_path / "b")],
    ):
        assert main([*command, "--workers", "1"]) == 2
