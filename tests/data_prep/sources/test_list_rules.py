"""The rules of lists: one row of the table each, for every kind of list that can hold it."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.format.index import read_index
from data_prep.format.manifest import read_manifest
from data_prep.sources.files import Selection, SourceError, SourceFile
from data_prep.sources.image_source import open_source
from data_prep.write.classes import class_name, find_classes

PATHS = ("cat/0.jpg", "dog/1.jpg", "owl/2.jpg")
NAN = float("nan")
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed"
)


@pytest.fixture
def folder(tmp_path: Path, draw_image: Callable[..., bytes]) -> Path:
    """A folder of three images, in folders that are not their classes."""
    for number, path in enumerate((*PATHS, "a b/c, d.jpg", "Krakow/3.jpg")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(draw_image(number))
    return tmp_path


def _files(path: Path, **options: Any) -> list[SourceFile]:
    with closing(open_source(path, Selection(**options))) as source:
        return list(source.files())


def _rows(path: Path, **options: Any) -> list[tuple[str, str | None]]:
    """(path, class) of every usable row."""
    return [(file.path, class_name(file)) for file in _files(path, **options) if not file.problem]


def _classes(path: Path, **options: Any) -> tuple[str, ...]:
    with closing(open_source(path, Selection(**options))) as source:
        return find_classes(source, Selection(**options)).names


def _write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


TEXTS = [
    # name, text, classes of the three images; None: unlabelled
    ("a.csv", "path,label\n{0},x\n{1},\n{2},y\n", ("x", None, "y")),
    ("a.csv", "path,label\n{0},x\n{1}\n{2},y\n", ("x", None, "y")),
    ("a.csv", "path,label\n{0},\n{1},\n{2},\n", (None, None, None)),
    ("a.csv", "path\n{0}\n{1}\n{2}\n", ("cat", "dog", "owl")),
    ("a.csv", "path,width\n{0},1\n{1},2\n{2},3\n", ("cat", "dog", "owl")),
    ("a.csv", "path, label\n{0}, x\n{1}, y\n{2}, x \n", ("x", "y", "x")),
    ("a.csv", ' Path , Label\n"{0}", x\n{1} ,"y"\n  {2},\tx\n', ("x", "y", "x")),
    ("a.csv", "file,class\n{0},x\n{1},y\n{2},x\n", ("x", "y", "x")),
    ("a.csv", "target,Image Path\nx,{0}\ny,{1}\nx,{2}\n", ("x", "y", "x")),
    ("a.csv", "filename,category\n{0},x\n{1},y\n{2},x\n", ("x", "y", "x")),
    ("a.csv", "path,label,class\n{0},x,p\n{1},y,q\n{2},x,r\n", ("x", "y", "x")),
    ("a.csv", "\ufeffpath,label\r\n{0},x\r\n\r\n{1},y\r\n{2},x\r\n\r\n", ("x", "y", "x")),
    ("a.csv", "path,label\r{0},x\r{1},y\r{2},x\r", ("x", "y", "x")),
    ("a.csv", "path;label\n{0};x\n{1};y\n{2};x\n", ("x", "y", "x")),
    ("a.csv", "path\tlabel\n{0}\tx\n{1}\ty\n{2}\tx\n", ("x", "y", "x")),
    ("a.csv", "{0},x\n{1},y\n{2},x\n", ("x", "y", "x")),
    ("a.csv", "{0}\n{1}\n{2}\n", ("cat", "dog", "owl")),
    ("a.csv", "path,label,\n{0},x,\n{1},y,\n{2},x,,,\n", ("x", "y", "x")),
    ("a.csv", 'path,label\n{0},"x, ""big"""\n{1},12" long\n{2},y\n', ('x, "big"', '12" long', "y")),
    ("a.csv", "path,label\n{0},010\n{1},2.0\n{2},10.0\n", ("10", "2", "10")),
    ("a.csv", "path,label\n{0},7\n{1},nan\n{2},-1\n", ("7", None, None)),
    ("a.csv", "path,label\n./{0},x\ncat/../{1},y\nowl\\2.jpg,x\n", ("x", "y", "x")),
    ("a.txt", "{0}\tx\n\n{1}\n  \n{2}\ty  \n", ("x", None, "y")),
    ("a.txt", "{0}\n{1}\n{2}\n", ("cat", "dog", "owl")),
    ("a.txt", "{0}\timages\n{1}\tlabel\n{2}\tpath\n", ("images", "label", "path")),
    ("a.csv", "{0},image\n{1},label\n{2},path\n", ("image", "label", "path")),
    ("a.txt", "\ufeff{0}\r\n{1} \r\n{2}\r\n", ("cat", "dog", "owl")),
    ("a.txt", "{0}\r{1}\r{2}", ("cat", "dog", "owl")),
    ("a.txt", "path\tlabel\n{0}\tx\n{1}\t\n{2}\ty\n", ("x", None, "y")),
    ("a.txt", "label\tpath\nx\t{0}\n\t{1}\ny\t{2}\n", ("x", None, "y")),
    ("a.txt", '{0}\t"x\n{1}\ty"\n{2}\t"\n', ('"x', 'y"', '"')),
    ("a.tsv", "{0}\t3\n{1}\t\n{2}\t11\n", ("3", None, "11")),
    ("a.tsv", 'file\tspecies\tclass\n{0}\tp\tx\n{1}\tq\t"y\tz"\n{2}\tr\n', ("x", "y\tz", None)),
    ("A.TSV", "{0}\tx\n{1}\ty\n{2}\n", ("x", "y", None)),
    (
        "a.jsonl",
        '{{"path": "{0}", "label": 10}}\n\n{{"path": "{1}"}}\n{{"path": "{2}", "label": null}}\n',
        ("10", None, None),
    ),
    (
        "a.ndjson",
        (
            '{{"file": "{0}", "class": "x"}}\r\n{{"file": "{1}", "class": " y "}}\r\n'
            '{{"class": NaN, "file": "{2}"}}'
        ),
        ("x", "y", None),
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), TEXTS)
def test_texts(folder: Path, name: str, text: str, expected: Sequence[str | None]) -> None:
    path = _write(folder, name, text.format(*PATHS))
    found = _files(path)
    assert [file.problem for file in found] == ["", "", ""]
    assert [class_name(file) for file in found] == list(expected)
    assert [file.path.removeprefix("./") for file in found] == list(PATHS)
    assert all(file.size > 0 for file in found)


@needs_pyarrow
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["x", None, "y "], ("x", None, "y")),
        ([10.0, NAN, 2.0], ("10", None, "2")),
        ([10, 2, None], ("10", "2", None)),
        ([10, 2, -1], ("10", "2", None)),
        (["10.0", "nan", "002"], ("10", None, "2")),
        ([None, None, "x"], (None, None, "x")),
        ([True, False, None], ("True", "False", None)),
        ([b"x", "Łódź".encode(), b""], ("x", "Łódź", None)),
    ],
)
def test_parquet(folder: Path, labels: list[Any], expected: Sequence[str | None]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"file_name": list(PATHS), "target": labels, "x": [1.5, NAN, None]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    found = _files(folder / "a.parquet")
    assert [class_name(file) for file in found] == list(expected)
    assert [file.fields for file in found] == ['{"x": 1.5}', "", ""]


DAMAGE = [
    # name, text, encoding, words of the message
    ("a.csv", 'path,label\n{0},x\n"{1},y\n{2},x\n', "utf-8", ("damaged CSV, line 3", "quote")),
    ("a.csv", 'path,label\n{0},x\n"{1},y\n"{2}",x\n', "utf-8", ("damaged CSV, line 3", "quote")),
    (
        "a.csv",
        'path,label\n{0},"x\n{1},y\n{2},"\n',
        "utf-8",
        ("damaged CSV, line 2", "another row"),
    ),
    ("a.csv", "path,label\n{0},x\n{1},Łódź\n", "iso-8859-2", ("line 3", "UTF-8", "label")),
    ("a.txt", "{0}\tx\n{1}\tKraków\n", "latin-1", ("line 2", "UTF-8", "label")),
    ("a.csv", "path,note\n{0},naïve\n", "latin-1", ("line 2", "note", "UTF-8")),
    ("a.csv", "path,label\n{0},x\n", "utf-16", ("UTF-16",)),
    ("a.txt", "{0}\tx\n", "utf-16-be", ("UTF-16",)),
    ("a.tsv", "{0}\tx\n", "utf-16-le", ("UTF-16",)),
    ("a.jsonl", '{{"path": "{0}"}}\n', "utf-32-be", ("UTF-32",)),
    ("a.csv", "name,label\n{0},x\n", "utf-8", ("no column `path`", "--path-column", "name, label")),
    ("a.csv", "{0} 1\n{1} 2\n", "utf-8", ("'cat/0.jpg' is the path", "'1' its label", "comma")),
    ("a.jsonl", "\n\n", "utf-8", ("no rows",)),
    ("a.csv", "species;name\nx;{0}\n", "utf-8", ("no column `path`", "--path-column")),
    ("a.csv", "path,class_id,class_name\n{0},1,x\n", "utf-8", ("class_id, class_name", "--label-")),
    ("a.csv", "image,file,label\n{0},{1},x\n", "utf-8", ("image, file", "--path-column")),
    ("a.csv", "path,label,label\n{0},1,x\n", "utf-8", ("several columns", "label")),
    ("a.csv", "path,label\n{0},1\n{1},1.5\n", "utf-8", ("line 3", "1.5", "fraction")),
    ("a.csv", "path,label\n{0},1\n{1},-2\n", "utf-8", ("line 3", "-2", "negative")),
    ("a.csv", "", "utf-8", ("no column `path`", "empty")),
    ("a.txt", "{0}\tx\tz\n", "utf-8", ("line 1", "3 values")),
    ("a.txt", "name\tlabel\n{0}\tx\n", "utf-8", ("no column `path`", "--path-column")),
    (
        "a.jsonl",
        '{{"path": "{0}"}}\n{{"path": \n',
        "utf-8",
        ("line 2 is not JSON (Expecting value, character 11)",),
    ),
    ("a.jsonl", '{{"path": "{0}"}}\n["{1}"]\n', "utf-8", ("line 2", "not a JSON object")),
    ("a.jsonl", '{{"path": "{0}", "label": "ä"}}\n', "latin-1", ("line 1", "not UTF-8")),
    ("a.jsonl", '{{"path": "{0}", "label": ["x"]}}\n', "utf-8", ("line 1", "label", "list")),
    ("a.jsonl", '{{"path": "{0}", "label": "\\ud800"}}\n', "utf-8", ("line 1", "UTF-8")),
    ("a.jsonl", '{{"image": {{"bytes": 1}}}}\n', "utf-8", ("line 1", "image", "not paths")),
    ("a.jsonl", '{{"name": "{0}"}}\n', "utf-8", ("no column `path`", "--path-column")),
]


@pytest.mark.parametrize(("name", "text", "encoding", "words"), DAMAGE)
def test_damage_is_named(
    folder: Path, name: str, text: str, encoding: str, words: Sequence[str]
) -> None:
    path = _write(folder, name, text.format(*PATHS), encoding)
    with pytest.raises(SourceError) as caught:
        _files(path)
    for word in (name, *words):
        assert word in str(caught.value)


ROWS = [
    # row of a CSV, words of its problem
    ("cat/0.jpg,x,p,q", ("line 2", "4 values for 2 columns")),
    (",x", ("line 2 has no path",)),
    ("gone.jpg,x", ("No such file",)),
    ("cat/0.jpg x", ("'cat/0.jpg' is the path", "'x' its label", "tab")),
    ("cat/0.jpg;x", ("'cat/0.jpg' is the path", "'x' its label")),
    ("/etc/passwd,x", ("absolute path outside", "--root")),
    ("../other/0.jpg,x", ("leads out", "--root")),
    ("cat/../../0.jpg,x", ("leads out", "--root")),
    ("https://example.org/0.jpg,x", ("URL", "download")),
    ("C:\\images\\0.jpg,x", ("Windows path", "--root")),
    ("\\\\server\\images\\0.jpg,x", ("Windows path", "--root")),
    ("cat,x", ("not a file",)),
]


@pytest.mark.parametrize(("row", "words"), ROWS)
def test_rows_that_cannot_be_used_are_rejected(
    folder: Path, row: str, words: Sequence[str]
) -> None:
    first, good = _files(_write(folder, "a.csv", f"path,label\n{row}\ndog/1.jpg,y\n"))
    for word in words:
        assert word in first.problem
    assert (good.problem, good.label) == ("", "y")


def test_a_latin_1_path_says_so(folder: Path) -> None:
    first, _ = _files(_write(folder, "a.txt", "Kraków/3.jpg\ncat/0.jpg\n", "latin-1"))
    assert "No such file" in first.problem
    assert "UTF-8" in first.problem


def test_absolute_paths_below_the_root_are_relative_ones(folder: Path) -> None:
    link = folder.parent / f"link-{folder.name}"
    link.symlink_to(folder)
    lines = [f"{folder}/cat/0.jpg", f"{folder}/cat/../dog/1.jpg", f"{link}/owl/2.jpg"]
    lines.append(f"file://{folder}/a%20b/c, d.jpg")
    path = _write(folder, "a.txt", "\n".join(lines))
    assert _rows(path) == [
        ("cat/0.jpg", "cat"),
        ("dog/1.jpg", "dog"),
        ("owl/2.jpg", "owl"),
        ("a b/c, d.jpg", "a b"),
    ]
    elsewhere = _write(folder / "cat", "a.txt", "\n".join(lines[1:3]))
    assert _rows(elsewhere) == []
    assert len(_rows(elsewhere, root=str(folder))) == 2
    assert len(_rows(elsewhere, root="/")) == 2


def test_columns_may_be_asked_for(folder: Path) -> None:
    text = "id,where,species,label\n0,{},x,1\n1,{},y,2\n".format(*PATHS)
    path = _write(folder, "a.csv", text)
    asked = {"path_column": "where", "label_column": "Species"}
    assert _rows(path, **asked) == [("cat/0.jpg", "x"), ("dog/1.jpg", "y")]
    with pytest.raises(SourceError, match="no column `genus`"):
        _files(path, path_column="where", label_column="genus")
    with pytest.raises(SourceError, match="no column 'place'"):
        _files(path, path_column="place")
    with pytest.raises(SourceError, match="no column `split`"):
        _files(path, path_column="where", only_split="train")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10.0", "2.0", ""], tuple(map(str, range(11)))),
        (["b", "", "a"], ("a", "b")),
        (["", "", ""], ()),
    ],
)
def test_integers_keep_their_values(
    folder: Path, labels: list[str], classes: tuple[str, ...]
) -> None:
    rows = "".join(f"{path},{label}\n" for path, label in zip(PATHS, labels, strict=True))
    assert _classes(_write(folder, "a.csv", f"path,label\n{rows}")) == classes


def test_a_path_with_two_labels_is_rejected_and_a_repeated_row_taken_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("cat/0.jpg", "x"), ("dog/1.jpg", "y"), ("./cat/0.jpg", "x "), ("dog\\1.jpg", "z")]
    rows += [("owl/2.jpg", "y"), ("a b/c, d.jpg", "x"), ("cat/0.jpg", " x")]
    text = "".join(f'"{path}",{label}\n' for path, label in rows)
    path = _write(folder, "a.csv", f"file,class\n{text}")
    files = _files(path)
    problem = "it is listed with different labels: 'y' in line 3, 'z' in line 5"
    assert [(file.path, file.problem) for file in files] == [
        ("cat/0.jpg", ""),
        ("dog/1.jpg", problem),
        ("dog/1.jpg", problem),
        ("owl/2.jpg", ""),
        ("a b/c, d.jpg", ""),
    ]
    assert _classes(path) == ("x", "y")
    out = folder / "out"
    command = ["shard", str(path), str(out), "--max-rejected", "0.5", "--workers", "1"]
    assert main(command) == 0
    manifest = read_manifest(out)
    assert (manifest.samples, manifest.rejected) == (3, 2)
    assert manifest.skipped == {"listed again": 2}
    assert problem in (out / "rejected.jsonl").read_text()
    printed = capsys.readouterr().out
    assert "'class'" in printed
    assert "listed again (2)" in printed


def test_unlabelled_stays_unlabelled_in_the_shards(folder: Path) -> None:
    """One unlabelled row once took the class of its folder, which renumbered every class."""
    text = "path,label\n{},1\n{},\n{},0\n".format(*PATHS)
    path, out = _write(folder, "a.csv", text), folder / "out"
    for option in ("--seed=0", "--no-shuffle"):
        assert main(["shard", str(path), str(out), "--workers", "1", "--overwrite", option]) == 0
        manifest = read_manifest(out)
        assert manifest.classes == ("0", "1")
        labels = np.concatenate([read_index(out, shard).labels for shard in manifest.shards])
        assert sorted(labels.tolist()) == [-1, 0, 1]


def test_lists_of_captions_keep_their_lines(folder: Path) -> None:
    text = 'path,caption\ncat/0.jpg,"a cat,\nsleeping"\ncat/0.jpg,a cat\n'
    files = _files(_write(folder, "a.csv", text))
    assert [json.loads(file.fields)["caption"] for file in files] == ["a cat,\nsleeping", "a cat"]


def test_blanks_around_a_path_are_dropped_unless_the_name_has_them(
    image_files: dict[str, bytes], tmp_path: Path
) -> None:
    names = {"a.jpg": "train/cat/0.jpg", " a.jpg": "train/cat/1.jpg", "b.jpg ": "train/cat/2.jpg"}
    for name, image in names.items():
        (tmp_path / name).write_bytes(image_files[image])
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\tx\n a.jpg\ty\nb.jpg \tz\n")
    assert [(file.path, file.label, file.problem) for file in _files(path)] == [
        ("a.jpg", "x", ""),
        (" a.jpg", "y", ""),
        ("b.jpg ", "z", ""),
    ]
    path.write_text("a.jpg \tx\n")
    assert _files(path)[0].path == "a.jpg"
