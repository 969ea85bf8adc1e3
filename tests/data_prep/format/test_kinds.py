"""Files that are not taken have few kinds, whatever their names."""

from collections import Counter

import pytest

from data_prep.format.kinds import count_kind, describe_kinds, kind_of


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("cat/a.HEIC", ".heic"),
        ("a.jxl", ".jxl"),
        ("a.npz", ".npz"),
        ("scan.dcm", ".dcm"),
        ("favicon.ico", ".ico"),
        ("c.TAR", ".tar"),
        ("a.tar.gz", ".tar.gz"),
        ("a.b.tar.ZST", ".tar.zst"),
        ("a.tgz", ".tgz"),
        ("a.zip", ".zip"),
        ("a.7z", ".7z"),
        ("photo.jpg?width=100", ".jpg with a query"),
        ("photo.JPEG?width=1.5&x=/2", "no suffix"),  # the slash ends the name
        ("photo.png@2x", ".png with a query"),
        ("ILSVRC2012", "no suffix"),
        ("a.b/ILSVRC2012", "no suffix"),
        ("version 1.2 final", "no suffix"),
        ("IM.0001", "numbered suffix"),
        (".DS_Store", "hidden"),
        (".cache/a.jpg", "hidden"),
        ("__MACOSX/._a.jpg", "hidden"),
        ("./a.txt", ".txt"),
    ],
)
def test_the_kind_of_a_name(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_kinds_stay_few_and_none_is_lost() -> None:
    counts: Counter[str] = Counter()
    for number in range(200):
        count_kind(counts, f".a{number}")
    assert len(counts) == 51
    assert counts.total() == 200
    assert describe_kinds(counts, most=2) == "other kinds (150), .a0 (1), 49 more kinds (49)"
    assert describe_kinds({".heic": 12, "no suffix": 1_300}) == "no suffix (1,300), .heic (12)"
    assert describe_kinds({".a": 2, ".b": 1}, most=1) == ".a (2), 1 more kind (1)"
