"""Trained weights for other channels: matched by name, adapted on request, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import simmim.cli
from data_prep.channels import PICTURES, RGB, AdaptRule
from simmim.engine.checkpoint.adapting import PATCH_WEIGHT
from simmim.engine.checkpoint.resume import load_initial
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.video.recipe import VideoRecipe
from simmim.tasks.video.stage import VideoStage
from swinv2 import SwinV2, SwinV2Config, load_encoder, read_encoder_config
from swinv2.config_file import IMPLIED_CHANNELS
from swinv2.weights import save_encoder
from tests.simmim.conftest import MEAN, small_encoder
from tests.simmim.tasks.channel_sets import (
    FIRES,
    SETS,
    SWAPPED,
    MakeSet,
    finetuning,
    images_of,
    pretraining,
    saved,
)


@pytest.mark.parametrize("channels", [1, 4, 5, 12])
@pytest.mark.parametrize("rule", ["repeat", "average", "zero"])
def test_an_encoder_is_adapted_by_name(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    channels: int,
    rule: AdaptRule,
) -> None:
    names, init = SETS[channels], saved(tmp_path, RGB)
    trained = load_encoder(init).state_dict()
    given = {"mean": [0.3] * channels, "std": [0.1] * channels}
    stage = finetuning(
        classification_values,
        init,
        shards=make_set(names),
        channels=list(names),
        rule=rule,
        **given,
    )
    old = trained[PATCH_WEIGHT]
    new = stage.encoder.state_dict()[PATCH_WEIGHT]
    assert new.shape[1] == channels == stage.recipe.encoder.in_channels
    unknown = iter(range(channels))
    for place, name in enumerate(names):
        if name in RGB:
            expected, mean = old[:, RGB.index(name)], MEAN[RGB.index(name)]
        else:
            number = next(unknown)
            starts = {"repeat": old[:, number % 3], "average": old.mean(1), "zero": 0 * old[:, 0]}
            expected, mean = starts[rule], 0.3
        torch.testing.assert_close(new[:, place], expected, rtol=0, atol=1e-7)
        if name in RGB:
            assert torch.equal(new[:, place], expected)
        assert stage.initial.mean[place] == mean
    others = {name: one for name, one in stage.encoder.state_dict().items() if name != PATCH_WEIGHT}
    assert all(torch.equal(one, trained[name]) for name, one in others.items())
    assert stage.initial.channels == stage.recipe.data.channels == names


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4, 5, 12])
def test_an_adapted_encoder_starts_with_the_same_features(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path, channels: int
) -> None:
    """Of the same pixels: other bands have zero weight, and those that are missing are 0."""
    init, many = saved(tmp_path, RGB), SETS[channels]
    few = finetuning(classification_values, init, shards=make_set(RGB))
    given = {"mean": [0.3] * channels, "std": [0.1] * channels}
    adapted = finetuning(
        classification_values,
        init,
        shards=make_set(many),
        channels=list(many),
        rule="zero",
        **given,
    )
    folders = [stage.training_shards.folder for stage in (few, adapted)]
    found = images_of(adapted)
    features = []
    for name, image in images_of(few).items():
        other = found[name.replace(str(folders[0]), str(folders[1]))]
        ours = few.module.normalise(image[None])
        ours[:, [name not in many for name in RGB]] = 0
        theirs = adapted.module.normalise(other[None])
        features.append([few.encoder.eval()(ours), adapted.encoder.eval()(theirs)])
    assert len(features) == 8
    for ours, theirs in features:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert float(torch.stack([one[0] for one in features]).std()) > 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing red, green, blue, additional nir; give images .* encoder.adapt_channels"),
        (
            {"channels": ["nir"]},
            r"shared: none; new: nir; left out: red, green, blue\). Say what new channels start",
        ),
        ({"channels": ["nir"], "rule": "average"}, "nir is new to the trained weights"),
        (
            {"channels": ["nir"], "rule": "zero"},
            "none is shared, so .* Set it to repeat or average",
        ),
    ],
)
def test_weights_are_never_adapted_silently(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    data: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        finetuning(classification_values, saved(tmp_path, RGB), shards=make_set(("nir",)), **data)


@torch.no_grad()
def test_images_in_another_order_than_the_weights_are_refused(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path
) -> None:
    init, folder = saved(tmp_path, RGB), make_set(("blue", "green", "red"))
    with pytest.raises(ValueError, match=r"another order; set data.channels to .red, green, blue."):
        finetuning(classification_values, init, shards=folder)
    taken = finetuning(classification_values, init, shards=folder, channels=list(RGB))
    turned = finetuning(
        classification_values, init, shards=folder, channels=["blue", "green", "red"]
    )
    first, second = (
        stage.encoder.eval()(stage.module.normalise(torch.stack(list(images_of(stage).values()))))
        for stage in (taken, turned)
    )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    more = make_set(FIRES)
    with pytest.raises(ValueError, match=r"additional nir, swir2; set data.channels to") as refused:
        finetuning(classification_values, init, shards=more)
    assert "data.channels to [blue, green, red, nir, swir2] and encoder.adapt_channels" in str(
        refused.value
    )
    assert (
        finetuning(classification_values, init, shards=more, channels=list(RGB)).initial.channels
        == RGB
    )


def test_weights_without_names_are_matched_by_number(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = saved(tmp_path, None, "unnamed")
    stage = finetuning(classification_values, init, shards=make_set(("a", "b", "c")))
    assert stage.initial.channels == ("a", "b", "c")
    assert "does not name its channels: they are taken as [a, b, c]" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"weights for 3 channels without names"):
        finetuning(
            classification_values,
            init,
            shards=make_set(FIRES),
            channels=list(FIRES),
            rule="zero",
        )


def test_an_adapted_run_goes_on_and_is_exported(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path
) -> None:
    values = classification_values | {"init": saved(tmp_path, RGB)}
    values["encoder"] |= {"adapt_channels": "average"}
    values["training"] |= {"steps": 4, "checkpoint_every": 2}
    values["data"] |= {"shards": make_set(FIRES), "slots": None, "validation_shards": 1}
    values["data"] |= {"channels": list(FIRES), "mean": [0.3] * 5, "std": [0.1] * 5}
    config, run = tmp_path / "adapted.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    command = ["finetune", "--config", str(config), "--folder", str(run)]
    assert simmim.cli.main(command) == 0
    described = read_encoder_config(run / "encoder")
    assert described.channels == FIRES
    assert described.mean == (MEAN[2], MEAN[1], MEAN[0], 0.3, 0.3)
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recorded["data"]["channels"] == list(FIRES)
    assert recorded["encoder"]["in_channels"] == 5
    assert simmim.cli.main([*command, "--resume", "auto", "--training.steps", "6"]) == 2
    again = ["finetune", "--config", str(run / "recipe.yaml"), "--folder", str(run)]
    assert simmim.cli.main([*again, "--resume", "auto"]) == 0
    assert simmim.cli.main(["evaluate", str(run)]) == 0
    swapped = ["evaluate", str(run), "--data", make_set(SWAPPED)]
    assert simmim.cli.main(swapped) == 2
    assert simmim.cli.main([*swapped, "--data.channels", json.dumps(list(FIRES))]) == 0
    for form in ("native", "torch-export"):
        folder = tmp_path / form
        assert simmim.cli.main(["export", str(run), str(folder), "--format", form]) == 0
        assert "blue, green, red, nir, swir2" in (folder / "README.md").read_text()
    assert read_encoder_config(tmp_path / "native").channels == FIRES


@pytest.mark.parametrize("source", ["run", "encoder"])
@pytest.mark.parametrize("rule", ["repeat", "average", "zero"])
def test_a_pretraining_starts_from_weights_of_other_channels(
    pretrain_values: dict[str, Any],
    pretrain_config: Path,
    make_set: MakeSet,
    tmp_path: Path,
    source: str,
    rule: str,
) -> None:
    run, folder = tmp_path / "rgb", make_set(FIRES)
    values = pretrain_values | {"training": pretrain_values["training"] | {"steps": 2}}
    values["training"]["ema_decay"] = 0.9
    pretrain_config.write_text(yaml.safe_dump(values))
    assert (
        simmim.cli.main(["pretrain", "--config", str(pretrain_config), "--folder", str(run)]) == 0
    )
    trained = load_encoder(run / "encoder").state_dict()[PATCH_WEIGHT]
    path = run if source == "run" else run / "encoder"
    stage = pretraining(pretrain_values, shards=folder)
    with pytest.raises(ValueError, match=r"new: nir, swir2"):
        load_initial(path, stage.module, stage.recipe)
    adapting = pretrain_values | {"encoder": pretrain_values["encoder"] | {"adapt_channels": rule}}
    stage = pretraining(adapting, shards=folder)
    said = load_initial(path, stage.module, stage.recipe)
    assert "blue, green, red keep their weights; nir, swir2 start from" in said
    found = stage.encoder.state_dict()[PATCH_WEIGHT]
    assert torch.equal(found[:, :3], trained.flip(1))
    starts = {
        "repeat": trained[:, :2],
        "average": trained.mean(1, keepdim=True).expand(-1, 2, -1, -1),
        "zero": torch.zeros_like(trained[:, :2]),
    }
    torch.testing.assert_close(found[:, 3:], starts[rule], rtol=0, atol=1e-7)


def test_mean_and_std_to_keep_are_matched_by_name(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    """Those of --init-from, in the order of the images; new channels keep the recipe's."""
    start = read_encoder_config(Path(saved(tmp_path, RGB)))
    values = pretrain_values | {"encoder": pretrain_values["encoder"] | {"in_channels": 5}}
    values["data"] |= {"mean": [0.1] * 5, "std": [0.2] * 5, "channels": list(FIRES)}
    red, green, blue = start.mean
    mean, std = parse(PretrainRecipe, values, "test").differences_from(start, None)
    assert mean.startswith("data.mean is [0.1, 0.1, 0.1, 0.1, 0.1]; ")
    assert mean.endswith(f"set it to {[blue, green, red, 0.1, 0.1]}")
    assert std.endswith("0.2, 0.2]")
    values["data"] |= {
        "mean": [blue, green, red, 0.1, 0.1],
        "std": [*start.std[::-1], 0.2, 0.2],
    }
    assert parse(PretrainRecipe, values, "test").differences_from(start, None) == []


def test_libraries_that_hand_over_colour_get_no_other_order(tmp_path: Path) -> None:
    init = saved(tmp_path, ("blue", "green", "red"))
    command = ["export", init, str(tmp_path / "out"), "--format"]
    assert simmim.cli.main([*command, "reference"]) == 2
    assert simmim.cli.main([*command, "native"]) == 0


def test_names_of_pictures_agree_with_the_encoder_directory() -> None:
    assert {count: PICTURES[count] for count in IMPLIED_CHANNELS} == dict(IMPLIED_CHANNELS)
    assert PATCH_WEIGHT in SwinV2(small_encoder().config).state_dict()


@pytest.mark.parametrize("form", ["reference", "timm"])
def test_names_come_back_from_exports(tmp_path: Path, form: str) -> None:
    config = SwinV2Config(
        image_size=64, in_channels=5, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    encoder = SwinV2(replace(config, window_size=(8, 8)))
    numbers = {"mean": [0.5] * 5, "std": [0.2] * 5}
    save_encoder(encoder, tmp_path / "five", **numbers, channels=FIRES)
    out, back = tmp_path / form, tmp_path / "back"
    command = ["export", str(tmp_path / "five"), str(out), "--format", form]
    assert simmim.cli.main(command) == 0
    assert "blue, green, red, nir, swir2" in (out / "README.md").read_text()
    source = out / "checkpoint.pth" if form == "reference" else out
    assert simmim.cli.main(["import", str(source), str(back), "--format", form]) == 0
    assert read_encoder_config(back).channels == FIRES
    given = ["import", str(source), str(back), "--format", form, "--channels", "a,b,c,d,e"]
    assert simmim.cli.main(given) == 0
    assert read_encoder_config(back).channels == ("a", "b", "c", "d", "e")


def test_clips_take_weights_of_their_channels_by_name(tmp_path: Path) -> None:
    pytest.importorskip("av")
    swapped = saved(tmp_path, ("blue", "green", "red"), "swapped")
    video = {"clips": str(tmp_path), "image_size": 16, "frames": 4}
    values: dict[str, Any] = {"task": "video", "init": swapped, "data": video}
    values |= {"encoder": {"window_size": 4}, "training": {"batch_size": 2, "steps": 2}}
    values["training"]["optimizer"] = {"lr": 1e-3}
    with pytest.raises(ValueError, match=r"clips have channels \[red, green, blue\], and data"):
        VideoStage.resolve(parse(VideoRecipe, values, "test"))
    values["data"] = video | {"channels": list(RGB)}
    recipe = VideoStage.resolve(parse(VideoRecipe, values, "test"))
    assert recipe.data.mean == MEAN[::-1]
    initial = VideoStage.load_initial(recipe)
    plain = load_encoder(swapped).state_dict()[PATCH_WEIGHT]
    found = initial.encoder.state_dict()[PATCH_WEIGHT]
    shape = (*found.shape[:1], 3, -1, *found.shape[2:])
    assert torch.allclose(found.reshape(shape).sum(2), plain.flip(1), atol=1e-5)
