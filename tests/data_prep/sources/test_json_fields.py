"""Whatever is in the JSON of a sample, its image is kept, and what is lost is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.inspect.verify import verify_shards
from data_prep.sources.json_fields import (
    DAMAGED,
    LONG_NUMBERS,
    NOT_FINITE,
    NOT_UTF8,
    REPEATED,
    SURROGATES,
    TOO_DEEP,
    TOO_LONG,
    parse_fields,
)
from simmim.data.datasets.shards import ShardSet

DIGITS = "1" * 5_000
CASES: dict[str, tuple[bytes, dict[str, Any], tuple[str, ...]]] = {
    "plain": (b'{"caption": "an owl", "n": [1, 2.5, null, true]}', {"n": [1, 2.5, None, True]}, ()),
    "long": (json.dumps({"text": "x" * 3 * 2**20}).encode(), {"text": "x" * 3 * 2**20}, ()),
    "byte order mark": (b"\xef\xbb\xbf" + b'{"a": 1}', {"a": 1}, ()),
    "utf-16": ('{"a": "\u00e9"}'.encode("utf-16"), {"a": "\u00e9"}, ()),
    "not an object": (b"[1]", {"json": [1]}, ()),
    "pair": (b'{"a": "\\ud83e\\udd89"}', {"a": "\U0001f989"}, ()),
    "lone surrogate": (b'{"a": "x\\ud800"}', {"a": "x\ufffd"}, (SURROGATES,)),
    "surrogate in a path": (b'{"path": "\\udfff.jpg"}', {"path": "\ufffd.jpg"}, (SURROGATES,)),
    "surrogate in a name": (
        b'{"\\udc00": {"b": ["\\udc00"]}}',
        {"\ufffd": {"b": ["\ufffd"]}},
        (SURROGATES,),
    ),
    "nan": (
        b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1e999}',
        {"a": None, "b": [None] * 2, "c": None},
        (NOT_FINITE,),
    ),
    "latin-1": (b'{"a": "caf\xe9"}', {"a": "caf\ufffd"}, (NOT_UTF8,)),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', {"a": "\ufffd" * 3}, (NOT_UTF8,)),
    "huge integer": (
        f'{{"a": {DIGITS}, "b": -{DIGITS}}}'.encode(),
        {"a": DIGITS, "b": f"-{DIGITS}"},
        (LONG_NUMBERS,),
    ),
    "large integer": (f'{{"a": {2**70}}}'.encode(), {"a": 2**70}, ()),
    "repeated": (b'{"a": 1, "a": 2}', {"a": 2}, (REPEATED,)),
    "deep": (b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", {}, (TOO_DEEP,)),
    "deep objects": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, {}, (TOO_DEEP,)),
    "not so deep": (b'{"a": ' + b"[" * 90 + b"]" * 90 + b"}", {}, ()),
    "cut": (b'{"a": 1', {}, (DAMAGED,)),
    "two": (b'{"a": 1}{"a": 2}', {}, (DAMAGED,)),
    "empty": (b"", {}, (DAMAGED,)),
    "binary": (bytes(range(256)), {}, (DAMAGED, NOT_UTF8)),
}


@pytest.mark.parametrize("name", CASES)
def test_fields_are_what_standard_json_can_hold(name: str) -> None:
    data, expected, notes = CASES[name]
    found = parse_fields(data)
    assert found.notes[:1] == notes[:1]
    assert {key: found.values[key] for key in expected} == expected
    text = json.dumps(found.values, ensure_ascii=False, allow_nan=False)
    assert json.loads(text.encode()) == found.values


def test_reshard_keeps_every_sample(
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    write_tar: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_prep.sources.shard_source.MAX_JSON_BYTES", 4 * 2**20)
    (tmp_path / "a").mkdir()
    members = {}
    for number, (data, _, _) in enumerate(CASES.values()):
        members |= {f"{number:02d}.jpg": draw_image(number), f"{number:02d}.json": data}
    members |= {"99.jpg": draw_image(99), "99.json": b" " * (4 * 2**20 + 1)}
    write_tar(tmp_path / "a" / "0.tar", members)
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "b")
    assert manifest.samples == len(CASES) + 1
    assert manifest.rejected == 0
    counts = {DAMAGED: 4, TOO_DEEP: 2, TOO_LONG: 1, SURROGATES: 3, NOT_FINITE: 1, NOT_UTF8: 2}
    assert manifest.notes == counts | {LONG_NUMBERS: 1, REPEATED: 1}
    assert f"{SURROGATES}: 3" in capsys.readouterr().out
    assert verify_shards(manifest, decode=True).count == 0
    shards = ShardSet(tmp_path / "b")
    about = [
        json.loads(shards.read(shard, row).about or b"")
        for shard, size in enumerate(shards.sizes)
        for row in range(size)
    ]
    by_key = {one["key"]: one for one in about}
    for number, (_, expected, notes) in enumerate(CASES.values()):
        found = by_key[f"{number:02d}"]
        assert {key: found[key] for key in expected} == expected
        assert bool(found.get("notes")) == bool(notes)
    # Once more: what was mended stays so, and is not counted again.
    assert main(["reshard", str(tmp_path / "b"), str(tmp_path / "c"), "--workers", "1"]) == 0
    assert read_manifest(tmp_path / "c").notes == {}


def test_a_sample_of_an_unknown_split_is_listed(
    tmp_path: Path, draw_image: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    (tmp_path / "a").mkdir()
    members = {"0.jpg": draw_image(0), "0.json": b'{"split": "train"}'}
    members |= {"1.jpg": draw_image(1), "1.json": b'{"split": "test"}'}
    members |= {"2.jpg": draw_image(2), "2.json": b'{"split": "train"'}
    write_tar(tmp_path / "a" / "0.tar", members)
    command = ["reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--only-split", "train"]
    assert main([*command, "--max-rejected", "1", "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.samples, manifest.rejected) == (1, 1)
    assert "2.jpg" in (tmp_path / "b" / "rejected.jsonl").read_text()
