"""Shards by name: braces as in webdataset, globs, and what names say of splits."""

from pathlib import Path

import pytest
from webdataset.shardlists import expand_urls

from data_prep.format.patterns import (
    Names,
    PatternError,
    describe_prefixes,
    describe_splits,
    expand_braces,
    is_pattern,
    list_tars,
    split_pattern,
)
from data_prep.format.storage import locate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-00.tar", "train-01.tar", "train-02.tar", "val-00.TAR"):
        (tmp_path / name).touch()
    for name in ("a.tar.gz", "b.tgz", "._train-00.tar", "c.zip", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def _found(place: Path, **names: tuple[str, ...]) -> list[str]:
    return [tar.name for tar in list_tars(place, Names(**names)).tars]


@pytest.mark.parametrize(
    "pattern",
    [
        "a/b.tar",
        "s-{000000..000012}.tar",
        "s-{8..11}.tar",
        "s-{0..8..4}.tar",
        "{train,val}-{00..01}.tar",
        "{a,b{1..2}}/x.tar",
        "s-{03..01}.tar",
    ],
)
def test_braces_are_those_of_webdataset(pattern: str) -> None:
    assert sorted(expand_braces(pattern)) == sorted(expand_urls(pattern))


@pytest.mark.parametrize(
    "pattern", ["a{0..9", "{0..99999999999}.tar", "{0..1000}-{0..1000}.tar", "{" * 5_000]
)
def test_braces_that_do_not_match_or_say_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"match|more than"):
        expand_braces(pattern)


def test_tars_of_a_folder_and_of_patterns(folder: Path) -> None:
    every = ["train-00.tar", "train-01.tar", "train-02.tar", "val-00.TAR"]
    assert _found(folder) == every
    assert list_tars(folder).skipped == {".tar.gz": 1, ".tgz": 1, ".zip": 1, "hidden": 1}
    assert _found(folder / "train-*.tar") == every[:3]
    assert _found(folder / "train-{00..01}.tar") == every[:2]
    assert _found(folder / "{train,val}-*") == every
    assert _found(folder / "train-01.tar") == ["train-01.tar"]
    assert _found(folder, include=("train-*",), exclude=("*-{00,02}.tar",)) == ["train-01.tar"]
    assert _found(folder, exclude=("val*",)) == every[:3]
    assert list_tars(folder, Names(exclude=("val*",))).skipped["tars not chosen"] == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"include": ("trian-*",)}, "trian"),
        ({"exclude": ("trian-*",)}, "trian"),
        ({"include": ("train-{00..05}.tar",)}, r"lacks train-03\.tar, train-04\.tar, train-05"),
        ({"exclude": ("*",)}, "excluded"),
        ({"include": ("a{",)}, "braces"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(
    folder: Path, names: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(PatternError, match=message):
        _found(folder, **names)


def test_what_is_there_instead_of_tars_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(PatternError, match=r"no tars, only \.tar\.gz \(1\)"):
        list_tars(tmp_path)
    with pytest.raises(PatternError, match="has no tars"):
        list_tars(tmp_path / "train-*.tar")


def test_tars_in_subfolders_are_pointed_at(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.tar").touch()
    with pytest.raises(PatternError) as error:
        list_tars(tmp_path)
    advice = str(error.value).split("'")[1]
    assert [tar.name for tar in list_tars(Path(advice)).tars] == ["a.tar", "b.tar"]
    with pytest.raises(PatternError, match="in braces"):
        list_tars(tmp_path / "*" / "a.tar")


def test_a_folder_is_no_pattern_whatever_its_name(tmp_path: Path) -> None:
    for name in ("set{1..2}", "set.tar", "a*"):
        (tmp_path / name).mkdir()
        assert not is_pattern(tmp_path / name)
    assert is_pattern(tmp_path / "x.tar")
    assert is_pattern(locate("s3://bucket/train-{000..099}.tar"))
    assert not is_pattern(locate("https://host/set?list=1"))


def test_the_folder_and_names_of_a_pattern() -> None:
    folder, names = split_pattern(locate("s3://bucket/set/train-{0..1}.tar"))
    assert str(folder) == "s3://bucket/set"
    assert names.include == ("train-0.tar", "train-1.tar")
    with pytest.raises(PatternError, match="several folders"):
        split_pattern(Path("/data/{a,b}/0.tar"))


@pytest.mark.parametrize(
    ("names", "splits", "prefixes"),
    [
        (["shard-000000.tar", "shard-000001.tar"], "", ""),
        (["00000.tar", "00001.tar"], "", ""),
        (["n01440764.tar", "n01443537.tar"], "", ""),
        (["train-0.tar", "val-0.tar"], "train (1), val (1)", "train-* (1), val-* (1)"),
        (["cc3m-train-0.tar", "cc3m-validation-0.tar"], "train (1), val (1)", None),
        (["imagenet_0.tar", "imagenet_test_0.tar"], "others (1), test (1)", None),
        (["a-0.tar", "b-0.tar", "b-1.tar"], "", "a-* (1), b-* (2)"),
        (["cat.tar", "dog.tar"], "", ""),
        (["constrained-0.tar", "constrained-1.tar"], "", ""),
    ],
)
def test_splits_and_prefixes_are_read_from_names(
    names: list[str], splits: str, prefixes: str | None
) -> None:
    assert describe_splits(names) == splits
    if prefixes is not None:
        assert describe_prefixes(names) == prefixes
