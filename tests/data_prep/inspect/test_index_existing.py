"""Existing tars become a set without being changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.index import index_tar, read_index, write_index
from data_prep.format.manifest import Manifest, ManifestError, read_manifest, write_manifest
from data_prep.format.tars import TarError
from data_prep.inspect.index_existing import IndexingOptions, index_existing
from data_prep.inspect.verify import verify_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions
from simmim.data.datasets.shards import ShardSet
from simmim.data.transforms.decoding import decode_pixels

WriteTar = Callable[[Path, dict[str, bytes]], None]


@pytest.fixture
def foreign(tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]) -> Path:
    """Two tars with images, one of them with labels, and one without images."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    write_tar(folder / "b.tar", {"x.jpg": draw_image(0), "x.cls": b"2", "y.txt": b"text"})
    write_tar(folder / "a.tar", {"x.png": draw_image(1, image_format="PNG")})
    write_tar(folder / "c.tar", {"z.txt": b"text"})
    return folder


def test_foreign_tars_become_a_set(foreign: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    indexed = index_existing(foreign)
    manifest = read_manifest(foreign)
    assert indexed.manifest == manifest
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    assert manifest.classes == ("0", "1", "2")
    assert [read_index(foreign, shard).labels.tolist() for shard in manifest.shards] == [[-1], [2]]
    assert (indexed.without_image, indexed.empty) == (2, ("c.tar",))
    assert {name: (foreign / name).read_bytes() for name in before} == before
    assert {path.name for path in foreign.iterdir()} == {
        *before,
        "manifest.json",
        "a.index.npy",
        "b.index.npy",
    }
    assert verify_shards(manifest, decode=True).count == 0


def test_a_hostile_tar_leaves_nothing_behind(foreign: Path, write_tar: WriteTar) -> None:
    write_tar(foreign / "d.tar", {"../up.jpg": b"x"})
    before = sorted(foreign.iterdir())
    with pytest.raises(TarError, match="leads out"):
        index_existing(foreign)
    assert sorted(foreign.iterdir()) == before


def test_a_manifest_is_not_replaced_without_overwrite(foreign: Path) -> None:
    first = index_existing(foreign).manifest
    with pytest.raises(ManifestError, match="--overwrite"):
        index_existing(foreign)
    assert index_existing(foreign, overwrite=True).manifest == first
    (foreign / "manifest.json").write_text("damaged")
    assert index_existing(foreign, overwrite=True).manifest == first


def test_a_manifest_written_while_tars_are_read_is_kept(foreign: Path) -> None:
    def write_manifest(_samples: int) -> None:
        (foreign / "manifest.json").write_text("of another process")

    with pytest.raises(ManifestError, match="--overwrite"):
        index_existing(foreign, tick=write_manifest)
    assert (foreign / "manifest.json").read_text() == "of another process"
    assert not list(foreign.glob("*.npy"))


def test_our_own_sets_keep_their_class_names(image_zip: Path, tmp_path: Path) -> None:
    build_shards(image_zip, tmp_path / "out", ShardOptions())
    with pytest.raises(ManifestError, match="class names"):
        index_existing(tmp_path / "out", overwrite=True)


def test_tars_without_images_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(ManifestError, match="not a folder"):
        index_existing(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="no tars"):
        index_existing(tmp_path)
    write_tar(tmp_path / "a.tar", {"z.txt": b"text"})
    with pytest.raises(ManifestError, match="no images"):
        index_existing(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.fixture
def splits(tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]) -> Path:
    """Three tars of a training split and two of validation, in one folder."""
    folder = tmp_path / "splits"
    folder.mkdir()
    for number, name in enumerate(("train-0", "train-1", "train-2", "val-0", "val-1")):
        write_tar(folder / f"{name}.tar", {"x.jpg": draw_image(number), "x.cls": b"1"})
    return folder


def _indexed(source: Path, *options: str) -> list[str]:
    out = source.parent / "out"
    command = ["index", str(source), "--output", str(out), "--overwrite", "--workers", "1"]
    assert main([*command, *options]) == 0
    return [shard.name for shard in read_manifest(out).shards]


def test_two_splits_are_not_merged_without_a_word(
    splits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = splits.parent / "resharded"
    for command in (["index", str(splits)], ["reshard", str(splits), str(out)]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "train (3)" in message
        assert "val (2)" in message
    assert not (splits / "manifest.json").exists()
    assert not out.exists()


def test_one_split_is_chosen_by_name(splits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _indexed(splits, "--include", "val-*") == ["val-0.tar", "val-1.tar"]
    assert _indexed(splits, "--exclude", "val-*", "--exclude", "*-{0..1}.tar") == ["train-2.tar"]
    assert _indexed(splits / "train-{0..1}.tar") == ["train-0.tar", "train-1.tar"]
    assert _indexed(splits / "train-*.tar") == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert capsys.readouterr().err == ""
    assert len(_indexed(splits, "--include", "*")) == 5
    assert "train-* (3), val-* (2)" in capsys.readouterr().err
    built = build_shards(
        splits / "train-{0..1}.tar", splits.parent / "again", ShardOptions(), shards=True
    )
    assert built.manifest is not None
    assert (built.manifest.samples, built.manifest.classes) == (2, ("0", "1"))


@pytest.mark.parametrize("names", [("train", "val"), ("training/x", "test/x"), ("dev", "train")])
def test_splits_by_folder_are_sets_of_their_own(
    names: tuple[str, str],
    tmp_path: Path,
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, name in enumerate(names):
        (tmp_path / "j" / name).mkdir(parents=True)
        write_tar(tmp_path / "j" / name / f"{'ab'[number]}0.tar", {"x.jpg": draw_image(number)})
    below = "/x" if "/" in names[0] else ""
    pattern = f"{tmp_path}/j/{{{names[0].split('/')[0]},{names[1].split('/')[0]}}}{below}/*.tar"
    places = [str(tmp_path / "j" / name) for name in names]
    for source in [pattern] if below else [pattern, str(tmp_path / "j")]:
        command = ["index", source, "--output", str(tmp_path / "all"), "--workers", "1"]
        assert main(command) == 2
        message = capsys.readouterr().err
        assert all(place in message for place in places)
        assert "set of its own" in message
    assert [_indexed(Path(place)) for place in places] == [["a0.tar"], ["b0.tar"]]
    assert len(_indexed(Path(pattern), "--include", "*")) == 2


def test_members_beside_the_image_are_counted(
    tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]
) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    members: dict[str, bytes] = {}
    for number in range(3):
        members |= {f"{number}.jpg": draw_image(number), f"{number}.txt": b"a caption"}
        members |= {f"{number}.cls": b"1", f"{number}.mask.png": b"?", f"{number}.label": b"x"}
        members |= {f"{number}.json": b"{}", f"{number}.npy": b"depth"}
    write_tar(folder / "0.tar", members)
    expected = {".txt": 3, ".mask.png": 3, ".label": 3, ".npy": 3}
    assert _indexed(folder) == ["0.tar"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped == expected
    assert manifest.skipped_examples[".mask.png"] == [
        f"0.tar/{number}.mask.png" for number in range(3)
    ]
    for number, command in enumerate((["reshard", str(folder)], ["shard", str(folder / "0.tar")])):
        assert main([*command, str(tmp_path / f"b{number}"), "--workers", "1"]) == 0
        manifest = read_manifest(tmp_path / f"b{number}")
        assert (manifest.samples, manifest.skipped) == (3, expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_samples_that_are_refused_are_named(
    foreign: Path, write_tar: WriteTar, draw_image: Callable[..., bytes], workers: int
) -> None:
    image = draw_image(0)
    write_tar(foreign / "d.tar", {"1.jpg": b"", "2.jpg": image, "3.jpg": image, "3.cls": b"cat"})
    write_tar(foreign / "e.tar", {f"{number}.jpg": b"" for number in range(30)})
    before = sorted(foreign.iterdir())
    with pytest.raises(TarError, match=r"32 samples are refused\.") as raised:
        index_existing(foreign, workers=workers)
    _, *named, last = str(raised.value).split("\n  ")
    assert named[0] == f"{foreign / 'd.tar'}: sample '1' is refused: it is empty"
    assert "d.tar: sample '3' is refused: its label" in named[1]
    assert [f"e.tar: sample '{number}'" in named[2 + number] for number in range(18)] == [True] * 18
    assert last == "and 12 more"
    assert sorted(foreign.iterdir()) == before


def test_images_with_a_second_dot_in_their_names_are_counted_with_a_remedy(
    tmp_path: Path,
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dots"
    folder.mkdir()
    members = {f"img.{number}.jpg": draw_image(number) for number in range(3)}
    members |= {"0.png": draw_image(0, image_format="PNG"), "0.mask.png": b"?"}
    members |= {"1.image.png": b"?", "1.cls": b"1", "2.txt": b"a"}
    write_tar(folder / "0.tar", members)
    assert main(["index", str(folder), "--workers", "1"]) == 0
    manifest = read_manifest(folder)
    assert manifest.samples == 1
    dotted = {".jpg after a second dot": 3, ".png after a second dot": 1}
    assert manifest.skipped == {**dotted, ".mask.png": 1, ".txt": 1}
    assert manifest.skipped_examples[".jpg after a second dot"] == [
        f"0.tar/img.{n}.jpg" for n in range(3)
    ]
    printed = capsys.readouterr().out
    assert "write tars of names with one dot" in printed
    assert "\n  .png after a second dot: 0.tar/1.image.png\n" in printed


def test_several_beginnings_are_said(
    tmp_path: Path,
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "two").mkdir()
    for name in ("cars-0", "pets-0", "pets-1"):
        write_tar(tmp_path / "two" / f"{name}.tar", {"x.jpg": draw_image(0)})
    assert main(["index", str(tmp_path / "two"), "--workers", "1"]) == 0
    assert "cars-* (1), pets-* (2)" in capsys.readouterr().err


def test_pictures_of_every_format_that_is_read_are_indexed(
    tmp_path: Path,
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    formats = {"gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "bmp": "BMP", "ppm": "PPM"}
    formats |= {"jp2": "JPEG2000", "tga": "TGA", "TIF": "TIFF", "avif": "AVIF"}
    members = {}
    for number, (extension, name) in enumerate(formats.items()):
        members |= {f"{number}.{extension}": draw_image(number, image_format=name)}
        members |= {f"{number}.cls": b"2"}
    members |= {"h.heic": b"?", "h.cls": b"1", "i.heic": b"?", "j.jxl": b"?", "k.dcm": b"?"}
    members |= {"l.txt": b"x", "m.json": b"{}", "noextension": b"x", ".hidden.jpg": b"x"}
    members |= {"x.jpg": draw_image(0), "x.tif": b"a mask", "x.gif": b"another"}
    write_tar(folder / "0.tar", members)
    (folder / "1.tar.gz").write_bytes(b"x")
    assert main(["index", str(folder), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert manifest.samples == len(formats) + 1
    assert manifest.skipped == {
        ".heic": 2,
        ".jxl": 1,
        ".dcm": 1,
        ".txt": 1,
        ".json": 1,
        ".tif": 1,
        ".gif": 1,
        "no suffix": 1,
        "hidden": 1,
        ".tar.gz": 1,
    }
    assert ".heic (2)" in printed
    index = read_index(folder, manifest.shards[0])
    assert index.extensions.tolist() == [*(name.lower() for name in formats), "jpg"]
    verified = verify_shards(manifest, decode=True)
    assert (verified.problems, verified.notes) == ((), {})
    shards = ShardSet(folder)
    for row in range(manifest.samples):
        raw = shards.read(0, row)
        assert decode_pixels(raw.image, raw.extension).pixels.shape == (24, 28, 3)
    assert main(["info", str(folder), "--statistics", "--workers", "1"]) == 0
    assert main(["reshard", str(folder), str(tmp_path / "b"), "--max-rejected", "1"]) == 0
    assert read_manifest(tmp_path / "b").samples == manifest.samples


def test_sets_of_before_are_verified_as_they_were_indexed(
    tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]
) -> None:
    """A manifest that names no extensions is of the time when only five were read."""
    folder = tmp_path / "old"
    folder.mkdir()
    write_tar(
        folder / "0.tar", {"a.jpg": draw_image(0), "b.gif": draw_image(1, image_format="GIF")}
    )
    indexed = index_tar(folder / "0.tar", lambda _: None)
    write_index(folder / "0.index.npy", indexed.index)
    write_manifest(Manifest(folder=folder, shards=(indexed.entry("0.tar"),)))
    manifest = read_manifest(folder)
    assert manifest.samples == 1
    assert verify_shards(manifest, decode=True).problems == ()


def test_tars_of_several_folders_need_a_place_for_the_manifest(
    tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / f"{name}-0.tar", {"x.jpg": draw_image(0)})
    pattern = tmp_path / "{a/a,b/b}-0.tar"
    with pytest.raises(ManifestError, match="--output"):
        index_existing(pattern)
    manifest = index_existing(pattern, output=tmp_path / "out").manifest
    assert [shard.name for shard in manifest.shards] == ["a-0.tar", "b-0.tar"]
    assert ShardSet(tmp_path / "out").read(1, 0).image == draw_image(0)


def test_images_of_another_name_are_indexed_by_image_key(
    tmp_path: Path,
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, image = tmp_path / "foreign", draw_image(0, image_format="PNG")
    folder.mkdir()
    members = {"x.image.png": image, "x.mask.png": draw_image(1), "x.cls": b"1", "y.mask.png": b"?"}
    write_tar(folder / "a.tar", members)
    assert main(["index", str(folder)]) == 2
    assert "--image-key" in capsys.readouterr().err
    assert main(["index", str(folder), "--image-key", "Image.PNG"]) == 0
    assert "1 sample without an image" in capsys.readouterr().out
    sample = ShardSet(folder).read(0, 0)
    assert (sample.key, sample.extension, sample.image, sample.label) == ("x", "png", image, 1)
    assert main(["verify", str(folder), "--deep"]) == 0
    assert main(["reshard", str(folder), str(tmp_path / "out"), "--max-rejected", "1"]) == 0
    assert ShardSet(tmp_path / "out").read(0, 0).image == image


@pytest.mark.parametrize("key", ["", "image", "json", "a/b.png", "image.pyd"])
def test_an_image_key_that_no_image_has_is_refused(
    foreign: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(foreign), "--image-key", key]) == 2
    assert "KEY.image.png" in capsys.readouterr().err


def test_an_image_key_that_no_sample_has_is_refused(foreign: Path) -> None:
    with pytest.raises(ManifestError, match=r"no member KEY\.input\.jpeg, only \.txt"):
        index_existing(foreign, options=IndexingOptions(image_key="input.jpeg"))
