"""Lists of clips, exact frames, and their views."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim.data.datasets.clips import ClipSet, RawClip, open_clips
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batches import TrainingBatches, evaluation_batches
from simmim.data.order.order import Address, SampleOrder
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.clip_transforms import (
    EvalClipTransform,
    TrainClipTransform,
    frame_numbers,
    spatial_boxes,
    unfold_frames,
)
from simmim.data.transforms.frames import Video
from simmim.data.transforms.settings import RandomCropSettings

av = pytest.importorskip("av", reason="clips need PyAV: pip install 'simmim[video]'")

CLIPS = Path(__file__).parents[5] / "shared" / "data" / "clips.zip"
ROWS, COLUMNS, LENGTH = 24, 40, 30


def numbered(count: int) -> np.ndarray:
    """Frames that tell their number by the grey they are, uint8 (count, rows, columns, 3)."""
    greys = np.linspace(20, 230, count).round().astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, ROWS, COLUMNS, 3))


def write(path: Path, frames: np.ndarray, codec: str = "mpeg4", **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three clips, with files that are no clips beside them."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("jump", "run"):
        for number in range(3):
            write(root / name / f"{number}.mp4", numbered(LENGTH))
    (root / "jump" / "notes.txt").write_text("no clip")
    (root / ".hidden").mkdir()
    (root / "readme.mp4").write_bytes(b"in no class")
    return root


@pytest.fixture(scope="module")
def real_clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if not CLIPS.is_file():
        pytest.skip(f"{CLIPS} is not here: real clips to decode")
    root = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(CLIPS) as archive:
        archive.extractall(root)
    found = sorted(path for path in root.rglob("*") if path.suffix in {".mp4", ".avi"})
    assert len(found) == 5
    return found


def in_order(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def test_frames_of_real_clips_are_those_of_decoding_all_in_order(real_clips: list[Path]) -> None:
    for path in real_clips:
        expected = list(in_order(path))
        video = Video(path)
        assert len(video) == len(expected)
        numbers = frame_numbers(len(video), np.random.default_rng(0).random(8))
        numbers += [len(video) - 1, 0, numbers[3]]
        for number, frame in zip(numbers, video.frames(numbers), strict=True):
            assert np.array_equal(frame, expected[number]), (path.name, number)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "mpeg4", {}),
        ("b.avi", "mpeg4", {"bf": "2"}),  # frames that stand in another order than they are shown
        ("c.mkv", "mpeg4", {"g": "5"}),
        ("d.mp4", "libx264", {"g": "6"}),
    ],
)
def test_frames_have_the_requested_indices(
    name: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / name, numbered(LENGTH), codec, **options)
    video = Video(path)
    assert len(video) == LENGTH
    numbers = [29, 0, 7, 7, 16]
    greys = numbered(LENGTH)[:, 0, 0, 0].astype(int)
    found = [int(frame.mean()) for frame in video.frames(numbers)]
    assert [int(np.abs(greys - grey).argmin()) for grey in found] == numbers


def test_every_segment_gives_one_frame() -> None:
    for length in (8, 9, 64, 301):
        for phase in (0.0, 0.5, 0.999):
            numbers = frame_numbers(length, np.full(8, phase))
            assert [number * 8 // length for number in numbers] == pytest.approx(range(8), abs=1)
            assert numbers == sorted(numbers)
            assert len(set(numbers)) == 8
    assert frame_numbers(16, np.full(8, 0.5)) == [1, 3, 5, 7, 9, 11, 13, 15]


def test_a_short_clip_repeats_frames() -> None:
    assert frame_numbers(3, np.full(8, 0.5)) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert frame_numbers(1, np.full(4, 0.99)) == [0, 0, 0, 0]


def test_spatial_views_lie_along_the_longer_axis() -> None:
    boxes = spatial_boxes((240, 400, 3), (224, 224), 5)
    assert [box.left for box in boxes] == [0, 40, 80, 120, 160]
    assert {(box.top, box.height, box.width) for box in boxes} == {(0, 240, 240)}
    (middle,) = spatial_boxes((400, 240, 3), (224, 224), 1)
    assert (middle.top, middle.left) == (80, 0)


def raw(folder: Path) -> RawClip:
    return open_clips(str(folder)).read(1, 0)


CROP = RandomCropSettings(image_size=16, scale=(0.3, 1.0), ratio=(0.75, 1.33))


def train_clip(seed: int = 3) -> TrainClipTransform:
    return TrainClipTransform(data=CROP, frames=4, seed=seed)


def test_a_training_clip_depends_on_seed_epoch_and_clip_alone(folder: Path) -> None:
    clip = raw(folder)
    first = train_clip()(clip, Address(0, 1, 0))
    assert first.image.shape == (4 * 3, 16, 16)
    assert first.image.dtype == torch.uint8
    assert first.label == 1
    assert torch.equal(train_clip()(clip, Address(0, 1, 0)).image, first.image)
    others = [
        train_clip()(clip, Address(1, 1, 0)),
        train_clip(seed=4)(clip, Address(0, 1, 0)),
        train_clip()(open_clips(str(folder)).read(1, 1), Address(0, 1, 0)),
    ]
    for other in others:
        assert not torch.equal(other.image, first.image)


def test_training_clips_take_every_frame_in_time(folder: Path) -> None:
    clip, greys = raw(folder), numbered(LENGTH)[:, 0, 0, 0].astype(int)
    seen: Counter[int] = Counter()
    for epoch in range(20):
        image = train_clip()(clip, Address(epoch, 1, 0)).image
        shown = unfold_frames(image[None], 4)[0].float().mean((1, 2, 3))
        numbers = [int(np.abs(greys - float(grey)).argmin()) for grey in shown]
        assert all(
            segment * LENGTH / 4 - 1 <= number <= (segment + 1) * LENGTH / 4
            for segment, number in enumerate(numbers)
        )
        seen.update(numbers)
    assert len(seen) > 0.8 * LENGTH


def test_views_are_ordered_and_the_single_one_is_the_middle(folder: Path) -> None:
    clip, greys = raw(folder), numbered(LENGTH)[:, 0, 0, 0].astype(int)
    views = EvalClipTransform(data=CROP, frames=4, temporal=2, spatial=3)
    image = views(clip, Address(0, 1, 0)).image
    assert image.shape == (2 * 3 * 4 * 3, 16, 16)
    found = unfold_frames(image[None], 4)
    assert found.shape == (6, 4, 3, 16, 16)
    shown = found.float().mean((2, 3, 4))
    for view, phase in ((0, 0.25), (3, 0.75)):
        expected = frame_numbers(LENGTH, np.full(4, phase))
        assert [int(np.abs(greys - float(grey)).argmin()) for grey in shown[view]] == expected
    one = EvalClipTransform(data=CROP, frames=4)(clip, Address(0, 1, 0)).image
    assert torch.equal(one, EvalClipTransform(data=CROP, frames=4)(clip, Address(5, 1, 0)).image)


def test_folders_are_classes(folder: Path) -> None:
    clips = open_clips(str(folder))
    assert clips.classes == ("jump", "run")
    assert clips.sizes == [3, 3]
    assert clips.read(1, 2).name == "run/2.mp4"
    assert clips.read(1, 2).label == 1
    assert clips.name(0, 1) == "jump/1.mp4"
    assert open_clips(str(folder)).digest == clips.digest


def test_a_share_of_each_class_is_within_every_larger_one(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    names = [(f"{label}-{number:02d}.mp4", label) for label in (0, 1, 3) for number in range(20)]
    file.write_text("".join(f"{name},{label}\n" for name, label in names))
    clips = open_clips(str(file))
    kept = []
    for share, sizes in ((0.01, [1, 1, 0, 1]), (0.25, [5, 5, 0, 5]), (1.0, [20, 20, 0, 20])):
        part = clips.share(share, seed=3)
        assert part.sizes == sizes
        assert part.classes == clips.classes
        kept.append({part.name(shard, one) for shard, n in enumerate(sizes) for one in range(n)})
    assert kept[0] < kept[1] < kept[2]
    assert clips.share(0.25, seed=3).digest == clips.share(0.25, seed=3).digest
    assert clips.share(0.25, seed=3).digest != clips.share(0.25, seed=4).digest
    assert clips.share(1.0, seed=3).digest == clips.digest


@pytest.mark.parametrize("header", ["", "path,label\n"])
def test_csv_files_name_clips(folder: Path, tmp_path: Path, header: str) -> None:
    (tmp_path / "clips").symlink_to(folder)
    file = tmp_path / "train.csv"
    file.write_text(f"{header}clips/run/0.mp4,running\nclips/jump/0.mp4,a jump\n\n")
    clips = open_clips(str(file))
    assert clips.classes == ("a jump", "running")
    assert clips.read(1, 0).path.is_file()
    file.write_text("clips/run/0.mp4,10\nclips/jump/0.mp4,2\n")
    numbers = open_clips(str(file))
    assert numbers.classes == tuple(map(str, range(11)))
    assert numbers.sizes == [0, 0, 1, *[0] * 7, 1]
    assert numbers.read(10, 0).label == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,run\nb.mp4\n", r"line 2: 'b\.mp4' is not a path and a label"),
        ("a.mp4,run,3\n", r"line 1: 'a\.mp4,run,3' is not a path and a label"),
        ("a.mp4,\n", "line 1: .* is not a path and a label"),
        ("path,label\n", "contains no clips.*a path and a label"),
        ("a.mp4,run\nb.mp4,hop\n", r"line 2, has the class 'hop'.*run, jump"),
    ],
)
def test_lists_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "list.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        open_clips(str(file), classes=("run", "jump"))


def test_numeric_labels_with_too_many_gaps_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("a.mp4,0\nb.mp4,2000000\n")
    with pytest.raises(DataError, match=r"label 2000000.* 2,000,001 classes for 2"):
        open_clips(str(file))


def test_missing_or_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        open_clips(str(tmp_path / "nowhere"))
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"contains no clips.*\.avi"):
        open_clips(str(tmp_path))
    (tmp_path / "clips.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(DataError, match=r"clips\.zip is an archive: unpack it"):
        open_clips(str(tmp_path / "clips.zip"))


def damaged(folder: Path, kind: str) -> Path:
    good = (folder / "run" / "0.mp4").read_bytes()
    path = folder / "run" / "0.mp4"
    match kind:
        case "absent":
            path.unlink()
        case "no video":
            path.write_bytes(b"<html>not found</html>" * 50)
        case "cut off":
            path.write_bytes(good[: len(good) // 2])
        case "empty":
            path.write_bytes(b"")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name in ("jump", "run"):
        for number in range(2):
            write(tmp_path / "set" / name / f"{number}.mp4", numbered(6))
    return tmp_path / "set"


@pytest.mark.parametrize("kind", ["absent", "no video", "cut off", "empty"])
def test_a_damaged_clip_is_replaced_by_one_of_its_class_or_left_out(small: Path, kind: str) -> None:
    clips = open_clips(str(small))
    path = damaged(small, kind)
    with pytest.raises(BadSampleError, match=str(path)):
        Video(path).frames([0])

    account = BadSamples()
    batches = TrainingBatches(
        clips,
        SampleOrder(clips.sizes, seed=0, slots=4),
        train_clip(),
        batch_size=4,
        start_position=0,
        end_position=4,
        bad_samples=account,
    )
    (batch,) = batches
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    assert [(bad.kind, bad.shard, bad.key) for bad in batch.bad] == [("replaced", "run", "0.mp4")]

    view = EvalClipTransform(data=CROP, frames=4)
    held_out = list(evaluation_batches(clips, view, batch_size=4, bad_samples=account))
    assert [len(batch) for batch in held_out] == [3]
    assert [bad.kind for bad in held_out[0].bad] == ["skipped"]
    assert account.bad == 2


def test_workers_change_nothing(folder: Path) -> None:
    clips = open_clips(str(folder))
    streams = [
        TrainingBatches(
            clips,
            SampleOrder(clips.sizes, seed=0, slots=2),
            train_clip(),
            batch_size=2,
            start_position=0,
            end_position=6,
            workers=workers,
        )
        for workers in (0, 2)
    ]
    for alone, together in zip(*streams, strict=True):
        assert torch.equal(alone.images, together.images)
        assert torch.equal(alone.addresses, together.addresses)


def test_large_frames_are_refused_before_they_are_decoded(folder: Path) -> None:
    with pytest.raises(BadSampleError, match=r"40x24 pixels, more than data\.max_pixels 100"):
        Video(folder / "run" / "0.mp4", max_pixels=100)


def test_a_set_of_clips_is_a_sample_source() -> None:
    clip = RawClip(key="a.mp4", path=Path("a.mp4"), label=0, shard_name="run")
    clips = ClipSet(Path("here"), ("run",), [[clip]])
    assert clips.samples == 1
    assert clips.folder_of(0) == "here"
    assert not clips.fetches_whole_shards


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('cat/0.mp4,cat\n"dog/0.mp4,dog\ncat/1.mp4,cat\n', ("line 2", "quote")),
        ('"cat/0.mp4,cat\ncat/1.mp4",cat\n', ("line 1", "quote")),
        ("cat/0.mp4,cat\ncat/0.mp4,dog\n", ("line 2", "'dog'", "'cat' in line 1")),
        ("cat/0.mp4,Łódź\n", ("line 1", "UTF-8")),
    ],
)
def test_damage_in_a_csv_file_is_named(tmp_path: Path, rows: str, words: tuple[str, ...]) -> None:
    (tmp_path / "list.csv").write_bytes(rows.encode("iso-8859-2"))
    with pytest.raises(DataError) as caught:
        open_clips(str(tmp_path / "list.csv"))
    for word in words:
        assert word in str(caught.value)
