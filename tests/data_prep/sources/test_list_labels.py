"""Labels of lists keep their values: what would renumber classes is refused by line."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.sources.files import Selection, SourceError
from data_prep.sources.image_source import open_source
from data_prep.write.classes import class_name, find_classes

PATHS = tuple(f"f/{number}.jpg" for number in range(4))
WORDS = ("NA", "N/A", "n/a", "null", "NULL", "None", "<NA>", "nan", "NaN", "NAN", "#N/A", "#NA")
LARGE = ("1000000", str(2**40), "9" * 19, "9" * 30)
MIXED = ("unknown", "?", "inf", "1e3", "\uff11", "True")


@pytest.fixture
def folder(tmp_path: Path, draw_image: Callable[..., bytes]) -> Path:
    """A folder of four images."""
    (tmp_path / "f").mkdir()
    for number, path in enumerate(PATHS):
        (tmp_path / path).write_bytes(draw_image(number))
    return tmp_path


def _write_csv(folder: Path, labels: Sequence[str], more: str = "") -> Path:
    rows = zip(PATHS, labels, strict=False)
    (folder / "a.csv").write_text(
        "path,label\n" + "".join(f'{path},"{label}"\n' for path, label in rows) + more
    )
    return folder / "a.csv"


def _labels(path: Path) -> list[str | None]:
    return [class_name(file) for file in open_source(path).files()]


@pytest.mark.parametrize("word", [*WORDS, "#N/A N/A"])
def test_words_for_missing_values_are_unlabelled(folder: Path, word: str) -> None:
    path = _write_csv(folder, ["1", "2", word, "10"])
    assert _labels(path) == ["1", "2", None, "10"]
    source = open_source(path)
    assert find_classes(source, Selection()).names == tuple(str(number) for number in range(11))
    assert f"1 of 4 rows unlabelled: {word!r} (1)" in source.describe_columns()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("first", [True, False])
def test_a_name_among_integers_is_named_by_line(folder: Path, name: str, first: bool) -> None:
    labels = [name, "1", "2", "10"] if first else ["1", "2", "10", name]
    with pytest.raises(SourceError) as caught:
        _labels(_write_csv(folder, labels))
    for word in (repr(name), f"line {2 if first else 5}", "integers", "names", "empty"):
        assert word in str(caught.value)


@pytest.mark.parametrize("label", LARGE)
def test_integers_beyond_the_classes_are_named_by_line(folder: Path, label: str) -> None:
    for others in (["1", "2"], []):
        with pytest.raises(SourceError) as caught:
            _labels(_write_csv(folder, [label, *others]))
        for word in (label, "line 2", "1,000,000", "names"):
            assert word in str(caught.value)
    assert _labels(_write_csv(folder, [f"n{label}", "n2"])) == [f"n{label}", "n2"]
    assert _labels(_write_csv(folder, ["999999"])) == ["999999"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("[1, 2, true]", ("'True'", "line 3")),
        ('[1, 2, "[1, 2]"]', ("'[1, 2]'", "line 3")),
        ("[1, 1099511627776]", ("1099511627776", "line 2")),
    ],
)
def test_json_and_the_command(
    folder: Path, labels: str, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:

    rows = zip(PATHS, json.loads(labels), strict=False)
    text = "".join(json.dumps({"path": path, "label": label}) + "\n" for path, label in rows)
    (folder / "a.jsonl").write_text(text)
    for order in ([], ["--no-shuffle"]):
        assert main(["shard", str(folder / "a.jsonl"), str(folder / "out"), *order]) == 2
        shown = capsys.readouterr().err
        assert all(word in shown for word in words)
        assert not (folder / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
@pytest.mark.parametrize("labels", [[2**40, 1, 2], ["1", "2", "unknown"], [1.0, 2.0, 1e15]])
def test_parquet(folder: Path, labels: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"path": list(PATHS[:3]), "label": labels})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pytest.raises(SourceError, match="row"):
        _labels(folder / "a.parquet")


def test_labels_of_rows_that_are_not_used_do_not_matter(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_csv(folder, ["1", "NA", "unknown", "10"], ",unknown\n")
    command = ["shard", str(path), str(folder / "out"), "--exclude", "f/2.jpg", "--workers", "1"]
    assert main([*command, "--max-rejected", "1"]) == 0
    assert len(read_manifest(folder / "out").classes) == 11
    assert "1 of 3 rows unlabelled: 'NA' (1)" in capsys.readouterr().out


def test_numbers_of_rows_add_up_to_the_images_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = f"{PATHS[0]},a\n{PATHS[3]},a\n{PATHS[3]},a\n"
    path = _write_csv(folder, ["a", "b", "NA", "a"], f"{again},b\n../x.jpg,b\n1.jpg,b,c\n")
    command = [
        "shard",
        str(path),
        str(folder / "out"),
        "--exclude",
        PATHS[3],
        "--max-rejected",
        "1",
    ]
    assert main([*command, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    rows = "1 of 4 rows unlabelled: 'NA' (1); 3 more rows cannot be used; 1 row listed again\n"
    assert rows in printed
    assert "found 6 images and 2 classes" in printed  # 4 + 3 - 1
    assert read_manifest(folder / "out").skipped == {"listed again": 1, "matches --exclude": 3}


def test_odd_fields_of_json_lines_are_replaced_and_noted(folder: Path) -> None:
    digits = "7" * 5_000
    lines = [
        f'{{"path": "{PATHS[0]}", "label": 1, "a": "x\\ud83d", "b": {{"\\udc00": [NaN, 1e999]}}}}',
        f'{{"path": "{PATHS[1]}", "label": 2, "n": {digits}, "d": 1, "d": 2}}',
        f'{{"path": "{PATHS[2]}", "label": 3, "n": [1, "ä", null, true]}}',
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    for order in ([], ["--no-shuffle"]):
        out = folder / f"out{len(order)}"
        command = ["shard", str(folder / "a.jsonl"), str(out), "--workers", "1", *order]
        assert main(command) == 0
        manifest = read_manifest(out)
        assert manifest.samples == 3
        assert set(manifest.notes.values()) == {1}
        assert {note.split(" ")[2] for note in manifest.notes} == {
            "lone",
            "NaN",
            "numbers",
            "repeated",
        }
    fields = [json.loads(file.fields) for file in open_source(folder / "a.jsonl").files()]
    assert fields == [
        {"a": "x\ufffd", "b": {"\ufffd": [None, None]}},
        {"n": digits, "d": 2},
        {"n": [1, "ä", None, True]},
    ]
    (folder / "a.jsonl").write_text(f'{{"path": "{PATHS[0]}", "label": {digits}}}')
    with pytest.raises(SourceError, match="in line 1 as label"):
        _labels(folder / "a.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_fields_of_parquet_are_standard_json(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    odd = [{"x": float("nan")}, {"x": float("inf")}]
    table = pyarrow.table({"path": list(PATHS[:2]), "odd": odd, "raw": [b"\xff", b"ab"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    files = list(open_source(folder / "a.parquet").files())
    assert [json.loads(file.fields, parse_constant=pytest.fail) for file in files] == [
        {"odd": {"x": None}, "raw": "\ufffd"},
        {"odd": {"x": None}, "raw": "ab"},
    ]
    assert all("NaN or Infinity" in file.notes for file in files)
