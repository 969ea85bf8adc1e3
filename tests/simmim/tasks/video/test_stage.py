"""Fine-tuning on clips: what no single frame tells, and recipes that cannot work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from simmim.cli import main
from simmim.data.loader.batch import Batch
from simmim.engine.checkpoint.directory import best_checkpoint
from simmim.engine.checkpoint.ema import read_average
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.optimizer import Layers, parameter_groups
from simmim.engine.settings import OptimizerSettings
from simmim.recipe import RecipeError, load, parse
from simmim.tasks.classification.classifier import load_classifier
from simmim.tasks.video.recipe import VideoRecipe
from simmim.tasks.video.stage import VideoStage
from swinv2 import (
    Provenance,
    build_encoder,
    load_encoder,
    load_video_encoder,
    read_video_config,
    save_encoder,
)
from tests.simmim.tasks.meta_steps import DEVICE, take_step

pytest.importorskip("av", reason="clips need PyAV: pip install 'simmim[video]'")

CLASSES = ("leftwards", "rightwards")
SIDE, LENGTH, SQUARE = 32, 24, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def moving_square(generator: np.random.Generator) -> np.ndarray:
    """Frames of a square that goes right, and comes in again, uint8 (frames, rows, columns, 3)."""
    pixels = np.empty((LENGTH, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:] = generator.integers(0, 90, 3)
    colour = generator.integers(150, 256, 3)
    top, start = generator.integers(SIDE - SQUARE), generator.integers(SIDE)
    for number in range(LENGTH):
        columns = (start + 2 * number + np.arange(SQUARE)) % SIDE
        pixels[number, top : top + SQUARE, columns] = colour
    return pixels


def write(path: Path, frames: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.copy(), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clips of each direction, in a folder for each.

    Those that go left are the others backwards: no frame, nor all of them out of order, tells the
    class.
    """
    root, generator = tmp_path_factory.mktemp("moving"), np.random.default_rng(0)
    for number in range(16):
        frames = moving_square(generator)
        write(root / "rightwards" / f"{number:02d}.mp4", frames)
        write(root / "leftwards" / f"{number:02d}.mp4", frames[::-1])
    return root


@pytest.fixture
def values(clips: Path) -> dict[str, Any]:
    return {
        "task": "video",
        "encoder": {
            "variant": "tiny",
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
        },
        "data": {
            "clips": str(clips),
            "validation": str(clips),
            "image_size": SIDE,
            "flip": 0.0,  # a mirrored clip moves the other way
            "scale": [1.0, 1.0],
            "ratio": [1.0, 1.0],
            "workers": 0,
            "slots": 4,
        },
        "label_smoothing": 0.0,
        "training": {
            "batch_size": 16,
            "steps": 3,
            "log_every": 1,
            "checkpoint_every": 100,
            "validate_every": 100,
            "optimizer": {"lr": 2e-3},
            "schedule": {"kind": "cosine"},
        },
    }


def finetune(values: dict[str, Any], folder: Path) -> tuple[int, list[dict[str, Any]]]:
    config = folder / "video.yaml"
    config.write_text(yaml.safe_dump(values))
    code = main(["finetune", "--config", str(config), "--folder", str(folder / "run")])
    metrics = folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return code, [json.loads(line) for line in lines]


def test_a_run_trains_validates_and_exports_its_encoder(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["data"] |= {"views": [2, 2], "workers": 1}
    encoder = build_encoder(
        "tiny",
        image_size=SIDE,
        patch_size=4,
        window_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
    )
    image = save_encoder(
        encoder, tmp_path / "image", mean=MEAN, std=STD, provenance=Provenance(step=5)
    )
    values["init"] = str(image)
    values["encoder"] = {"variant": "small", "window_size": 4, "drop_path": 0.2}
    values["training"]["optimizer"]["layer_decay"] = 0.8
    code, lines = finetune(values, tmp_path)
    assert code == 0
    figures = next(line for line in reversed(lines) if "top1" in line)
    assert {"top1", "validation_loss", "views_top1"} <= set(figures)
    assert not {"top5", "views_top5"} & set(figures)  # of two classes

    description = read_video_config(tmp_path / "run" / "encoder")
    assert description.mean == MEAN
    recorded = load(VideoRecipe, tmp_path / "run" / "recipe.yaml")
    assert recorded.encoder.embed_dim == 32
    assert recorded.data.mean == MEAN
    assert description.inflated_from is not None
    assert description.inflated_from.step == 5
    assert description.provenance.step == 3
    assert description.config.frames == 8
    classes = json.loads((tmp_path / "run" / "classifier" / "classes.json").read_text())
    assert classes == {"classes": list(CLASSES)}

    # The next stage begins with what this one has learned, at another size.
    values["init"] = str(tmp_path / "run")
    values["encoder"]["window_size"] = 6
    values["data"]["image_size"] = 48
    start = VideoStage.load_initial(parse(VideoRecipe, values, "recipe"))
    assert start.head == tmp_path / "run" / "classifier"
    assert start.inflated_from == description.inflated_from
    learned = load_video_encoder(tmp_path / "run" / "encoder")
    for name, tensor in start.encoder.state_dict().items():
        assert torch.equal(tensor, learned.state_dict()[name])


@pytest.mark.slow
def test_two_processes_train_in_shards(
    values: dict[str, Any],
    tmp_path: Path,
    train_in_shards: Callable[..., list[dict[str, Any]]],
) -> None:
    lines = train_in_shards(values, tmp_path / "run")
    assert any("top1" in line for line in lines)
    assert load_video_encoder(tmp_path / "run" / "encoder").config.frames == 8


def test_still_clips_have_the_features_of_the_encoder_that_a_run_starts_from(
    values: dict[str, Any], tmp_path: Path
) -> None:
    encoder = build_encoder(
        "tiny",
        image_size=SIDE,
        patch_size=4,
        window_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    values["init"] = str(save_encoder(encoder, tmp_path / "image", mean=MEAN, std=STD))
    stage = VideoStage(parse(VideoRecipe, values, "recipe"))
    still = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        found = stage.initial.encoder.eval()(stage.module.clips(still.repeat(1, 8, 1, 1)))
        image = stage.module.normalise(still)
        expected = load_encoder(tmp_path / "image")(image)
    assert found.shape[1] == 8
    for frame in found.unbind(1):
        torch.testing.assert_close(frame, expected, rtol=1e-5, atol=1e-5)


def test_all_frames_of_a_clip_are_mirrored_alike(values: dict[str, Any]) -> None:
    stage = VideoStage(parse(VideoRecipe, values, "recipe"))
    images = torch.randint(256, (2, 8 * 3, SIDE, SIDE), dtype=torch.uint8)
    plain = stage.module.clips(images)
    mirrored = stage.module.clips(images, torch.tensor([True, False]))
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.equal(mirrored[1], plain[1])
    batch = Batch(images, None, torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.int64))
    assert stage.module(batch).shape == ()


def test_every_parameter_learns_at_the_rate_of_its_layer(values: dict[str, Any]) -> None:
    stage = VideoStage(parse(VideoRecipe, values, "recipe"))
    groups = parameter_groups(stage.module, OptimizerSettings(lr=1.0, layer_decay=0.5))
    layers = Layers.of(stage.module)
    factors = {name: group.lr_factor for group in groups for name in group.names}
    decays = {name: group.weight_decay for group in groups for name in group.names}
    parameters = dict(stage.module.named_parameters())
    assert set(factors) == set(parameters)
    for name, parameter in parameters.items():
        if "patch_embed" in name:
            layer = 0
        elif ".stages." in name:
            _, _, _, number, _, block, *_ = name.split(".")
            layer = 2 * int(number) + int(block) + 1
        elif ".merges." in name:
            layer = 2
        else:
            layer = 5
        assert layers.layer_of(name) == layer
        assert factors[name] == 0.5 ** (5 - layer)
        learned_bias = "position_bias" in name or "logit_scale" in name
        assert (decays[name] == 0) == (learned_bias or parameter.ndim == 1)
    in_time = [name for name in parameters if name.endswith("position_bias.expand.weight")]
    assert len(in_time) == 4
    assert all(parameters[name].shape[1] == 3 for name in in_time)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("frame_patch", "steps", "lr", "least"),
    [(2, 200, 2e-3, 100), (1, 1000, 5e-3, 90)],
    ids=["patches", "attention"],
)
def test_it_learns_what_single_frames_do_not_show(
    values: dict[str, Any], tmp_path: Path, frame_patch: int, steps: int, lr: float, least: float
) -> None:
    """A patch of two frames sees motion; of one, attention has to, and starts blind to time."""
    values["encoder"]["frame_patch"] = frame_patch
    values["training"] |= {"steps": steps, "log_every": 10, "clip_norm": 5.0}
    values["training"]["validate_every"] = values["training"]["checkpoint_every"] = steps
    values["training"]["optimizer"]["lr"] = lr
    values["training"]["schedule"] |= {"warmup_steps": 20}
    code, lines = finetune(values, tmp_path)
    assert code == 0
    figures = next(line for line in reversed(lines) if "top1" in line)
    assert figures["top1"] >= least


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"views": [0, 5]}, r"data\.views\.0 is 0"),
        ("data", {"frames": 0}, "data.frames is 0"),
        ("data", {"frames": 7}, "frames is 7.* frame_patch 2"),
        ("data", {"slots": 3}, "multiple of data.slots 3"),
        ("encoder", {"in_channels": 1}, "encoder: in_channels is 1; .*3"),
        ("encoder", {"window_frames": 0}, "encoder.window_frames is 0"),
        ("data", {"clip": "a"}, "data.clip: unknown key; did you mean clips"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    values: dict[str, Any], section: str, changes: dict[str, Any], message: str
) -> None:
    if "frames" in changes:
        values["encoder"]["frame_patch"] = 2
    values[section] |= changes
    with pytest.raises(RecipeError, match=message):
        parse(VideoRecipe, values, "recipe")


def test_bad_input_ends_with_2_and_a_message(
    values: dict[str, Any], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write(other / "upwards" / "0.mp4", moving_square(np.random.default_rng(0)))
    cases = {
        str(tmp_path / "nowhere.csv"): "does not exist: give a folder",
        str(other): "all clips of",
    }
    for path, message in cases.items():
        code, _ = finetune({**values, "data": values["data"] | {"clips": path}}, tmp_path)
        assert code == 2
        assert message in capsys.readouterr().err
    data = values["data"] | {"validation": str(other)}
    assert finetune({**values, "data": data}, tmp_path)[0] == 2
    assert "has the class 'upwards', which no training clip has" in capsys.readouterr().err


def test_encoder_and_head_of_any_checkpoint_are_exported(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["training"] |= {"checkpoint_every": 1, "validate_every": 1, "keep_best": True}
    values["training"] |= {"keep_last": 3, "ema_decay": 0.5}
    assert finetune(values, tmp_path)[0] == 0
    run, out = tmp_path / "run", tmp_path / "out"

    def written(*arguments: str) -> dict[str, torch.Tensor]:
        assert main(["export", str(run), str(out), *arguments]) == 0
        assert "its logits after loading: 0.0e+00" in capsys.readouterr().out
        trained = load_classifier(out, out / "classifier")
        assert trained.classes == CLASSES
        encoder = load_video_encoder(out).state_dict()
        weights = trained.model.state_dict()
        assert all(torch.equal(part, weights[f"encoder.{name}"]) for name, part in encoder.items())
        return weights

    def kept(checkpoint: Path) -> dict[str, torch.Tensor]:
        tensors = read_model(checkpoint) | read_average(checkpoint)
        return {name.removeprefix("model."): part for name, part in tensors.items()}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        equal = (torch.equal(part, other[name]) for name, part in one.items())
        return one.keys() == other.keys() and all(equal)

    last, best = run / "checkpoints" / "step-00000003", best_checkpoint(run)
    assert same(written("--last"), kept(last))
    assert same(written(), kept(best))
    assert read_video_config(out).provenance.step == int(best.name[-8:])
    (run / "encoder").rename(tmp_path / "gone")
    assert same(written("--last"), kept(last))
    assert main(["export", str(run), str(tmp_path / "timm"), "--format", "timm"]) == 2
    assert "as native" in capsys.readouterr().err

    # What was exported is a start, with its head.
    stage = VideoStage(parse(VideoRecipe, values | {"init": str(out)}, "recipe"))
    assert same(dict(stage.model.state_dict()), kept(last))


def test_a_step_waits_for_nothing(values: dict[str, Any]) -> None:
    waits, optimizer = take_step(values)
    assert not waits.copies
    assert not waits.reads
    assert optimizer.seen == DEVICE
