"""Tars equal webdataset's byte for byte, and indexes what a reader finds."""

import hashlib
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.format.index import index_tar
from data_prep.write.shard import ShardWriter

SAMPLES = st.lists(
    st.tuples(st.sampled_from(["jpg", "png", "webp"]), st.binary(min_size=1, max_size=2000)),
    max_size=12,
)


@pytest.mark.peer
@given(samples=SAMPLES, first=st.integers(0, 10**9 - 100))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_are_those_of_webdataset(
    samples: list[tuple[str, bytes]], first: int, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset.writer import TarWriter

    path = tmp_path / "ours.tar"
    with closing(ShardWriter(path)) as ours, (tmp_path / "stock.tar").open("wb") as stream:
        with TarWriter(stream, user="", group="", mtime=0, encoder=False) as stock:
            for number, (extension, data) in enumerate(samples):
                key, label = f"{first + number:09d}", number % 3 - 1
                members = {extension: data, "json": b"{}" * number}
                if label >= 0:
                    members["cls"] = str(label).encode()
                ours.write(key, members, label)
                stock.write({"__key__": key, **members})
        finished = ours.finish()
    assert path.read_bytes() == (tmp_path / "stock.tar").read_bytes()
    assert finished.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    read = index_tar(path, lambda _: None)
    assert finished.entry("a.tar") == read.entry("a.tar")
    for name, column in vars(read.index).items():
        assert column.tolist() == getattr(finished.index, name).tolist()


def test_a_member_too_large_for_a_tar_is_refused(tmp_path: Path) -> None:
    class Endless(bytes):
        def __len__(self) -> int:
            return 8**11

    with (
        closing(ShardWriter(tmp_path / "a.tar")) as writer,
        pytest.raises(ValueError, match="8 GiB"),
    ):
        writer.write("0", {"jpg": Endless()}, -1)
