"""The encoder directory: round trips, window transfer, and refusal of everything else."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swinv2 import (
    Provenance,
    SwinV2,
    SwinV2Config,
    build_encoder,
    load_encoder,
    read_encoder_config,
    save_encoder,
)
from swinv2.config_file import is_encoder_directory
from swinv2.weights import load_strictly

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUMBERS: dict[str, Any] = {"mean": MEAN, "std": STD}
CONFIG = SwinV2Config(image_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def encoder(randomise: Callable[[nn.Module], None]) -> SwinV2:
    config = SwinV2Config(
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4),
        image_size=192,
        window_size=12,
        extra_norm_every=2,
        drop_path=0.1,
    )
    encoder = SwinV2(config)
    randomise(encoder)
    return encoder.eval()


@pytest.fixture
def saved(encoder: SwinV2, tmp_path: Path) -> Path:
    return save_encoder(encoder, tmp_path / "encoder", mean=MEAN, std=STD)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_round_trip_is_bit_identical(encoder: SwinV2, saved: Path) -> None:
    loaded = load_encoder(saved)
    images = torch.randn(1, 3, 192, 192)
    assert not loaded.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        for expected, found in zip(encoder.features(images), loaded.features(images), strict=True):
            assert torch.equal(expected, found)


def test_the_folder_has_safetensors_json_and_text_only(encoder: SwinV2, saved: Path) -> None:
    names = sorted(place.name for place in saved.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert load_file(saved / "model.safetensors").keys() == dict(encoder.named_parameters()).keys()


def test_the_description_has_every_size_and_the_provenance(encoder: SwinV2, tmp_path: Path) -> None:
    provenance = Provenance(step=300, samples_seen=614_400, recipe_hash="3f2a")
    path = save_encoder(encoder, tmp_path / "encoder", mean=MEAN, std=STD, provenance=provenance)
    described = read_encoder_config(path)
    assert described.provenance == provenance
    assert described.provenance.versions["torch"] == torch.__version__
    assert (described.mean, described.std) == (MEAN, STD)
    assert described.config.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert described.config.image_size == (192, 192)
    assert described.config.extra_norm_every == 2
    assert described.config.drop_path == 0.1


def test_a_variant_keeps_its_name(tmp_path: Path) -> None:
    encoder = build_encoder("tiny")
    assert encoder.config.variant == "tiny"
    path = save_encoder(encoder, tmp_path / "tiny", mean=MEAN, std=STD)
    assert load_encoder(path).config.variant == "tiny"


def test_other_sizes_keep_the_pretraining_coordinates(encoder: SwinV2, saved: Path) -> None:
    loaded = load_encoder(saved, image_size=256, window_size=16, drop_path=0.3)
    assert loaded.config.drop_path == 0.3
    assert loaded.config.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))
    encoder.set_input(image_size=256, window_size=16)
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))


def test_the_first_windows_survive_a_second_change(saved: Path, tmp_path: Path) -> None:
    wider = load_encoder(saved, image_size=256, window_size=16)
    again = save_encoder(wider, tmp_path / "again", mean=MEAN, std=STD)
    last = load_encoder(again, image_size=(64, 96), window_size=(8, 12))
    assert last.config.image_size == (64, 96)
    assert last.config.window_size == (8, 12)
    assert last.config.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))


def test_saving_does_not_change_the_encoder(encoder: SwinV2, tmp_path: Path) -> None:
    before = encoder.config
    save_encoder(encoder, tmp_path / "encoder", mean=MEAN, std=STD)
    assert encoder.config is before
    assert before.pretrained_window_sizes is None


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(
    encoder: SwinV2, saved: Path
) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["norm.weight"]
    del tensors["stages.1.blocks.0.attention.logit_scale"]
    tensors["head.weight"] = torch.zeros(3)
    tensors["norm.bias"] = torch.zeros(5)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="some source does not fit SwinV2") as caught:
        load_strictly(encoder, tensors, "some source")
    for line in (
        "missing: norm.weight",
        "missing: stages.1.blocks.0.attention.logit_scale",
        "unexpected: head.weight",
        "shape of norm.bias: (5,), expected (64,)",
    ):
        assert line in str(caught.value)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])

    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_encoder(saved)


def test_a_wrong_size_is_refused_before_memory_is_allocated(saved: Path) -> None:
    file = saved / "config.json"
    content = json.loads(file.read_text())
    content["config"] |= {"variant": None, "embed_dim": 2**25}  # petabytes of weights
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"shape of patch_embed\.projection\.weight: .*\(33554432,"
    ):
        load_encoder(saved)


def test_a_missing_or_foreign_path_is_refused(saved: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "model.pth"
    torch.save({}, pickled)
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "nowhere", "does not exist"),
        (pickled, "can run code"),
        (tmp_path / "empty", r"no config\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            load_encoder(place)
    (saved / "model.safetensors").rename(saved / "model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_encoder(saved)


def test_truncated_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    for size in (0, 5, file.stat().st_size // 2, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
            load_encoder(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="other"), "does not describe an encoder"),
        (lambda content: content.update(version=2), "format version 2"),
        (lambda content: content.update(mean=[0.5]), "3 channels"),
        (lambda content: content.update(std=[0, 1, 1]), "greater than 0"),
        (lambda content: content.update(std="abc"), "std: 'abc', expected a list"),
        (lambda content: content.update(mean=[float("nan")] * 3), "not valid JSON"),
        (lambda content: content.pop("provenance"), "provenance: missing"),
        (lambda content: content.update(extra=1), "extra: unknown"),
        (lambda content: content.update(config=[]), "config: expected fields by name"),
        (lambda content: content["config"].update(depths=[2, "x"]), "depths"),
        (lambda content: content["config"].update(embed_dim=8.0), "embed_dim"),
        (lambda content: content["config"].update(variant=["tiny"]), "config.variant"),
        (lambda content: content["config"].update(variant="vast"), "vast"),
        (lambda content: content["config"].update(depth=[2]), "config.depth: unknown"),
        (lambda content: content["config"].update(pretrained_window_sizes=None), "pretrained"),
        (lambda content: content["config"].pop("window_size"), "config.window_size: missing"),
        (lambda content: content["provenance"].update(step=True), "provenance.step: True"),
        (lambda content: content["provenance"].update(versions={"a": 1}), "versions"),
    ],
)
def test_a_wrong_description_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_all_wrong_fields_are_listed_at_once(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["mean"] = 1
        content["config"].pop("depths")
        content["provenance"]["step"] = "many"

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_encoder_config(saved)
    for name in ("mean: 1", "config.depths: missing", "provenance.step: 'many'"):
        assert name in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_invalid_json_is_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_encoder_config(saved)


def test_only_an_earlier_encoder_is_replaced(encoder: SwinV2, saved: Path, tmp_path: Path) -> None:
    save_encoder(encoder, saved, mean=(0.5,) * 3, std=STD)
    assert read_encoder_config(saved).mean == (0.5,) * 3
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not replaced"):
        save_encoder(encoder, saved, mean=MEAN, std=STD)
    assert read_encoder_config(saved).mean == (0.5,) * 3
    assert [place.name for place in tmp_path.iterdir()] == ["encoder"]


def test_an_encoder_with_heads_is_replaced_but_not_with_other_content(
    encoder: SwinV2, saved: Path
) -> None:
    def add_head() -> Path:
        head = saved / "any task"
        head.mkdir()
        save_file({"weight": torch.zeros(1)}, head / "model.safetensors")
        (head / "classes.json").write_text("{}")
        return head

    add_head()
    save_encoder(encoder, saved, mean=MEAN, std=STD)
    assert not (saved / "any task").exists()
    (add_head() / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not replaced"):
        save_encoder(encoder, saved, mean=MEAN, std=STD)
    shutil.rmtree(saved / "any task")
    save_encoder(encoder, saved / "another encoder", mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="not replaced"):
        save_encoder(encoder, saved, mean=MEAN, std=STD)


def test_a_full_disk_leaves_the_earlier_encoder(
    encoder: SwinV2, saved: Path, no_file_above: Callable[[int], AbstractContextManager[None]]
) -> None:
    with (
        no_file_above(10_000),
        pytest.raises(OSError, match=r"model\.safetensors cannot be written"),
    ):
        save_encoder(encoder, saved, mean=MEAN, std=STD)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    load_encoder(saved)


def test_a_wrong_normalisation_writes_nothing(encoder: SwinV2, tmp_path: Path) -> None:
    for mean, std in (((0.5,), (0.5,)), (MEAN, (1, 1, 0)), ((float("nan"), 0, 0), STD)):
        with pytest.raises(ValueError, match=r"mean|std"):
            save_encoder(encoder, tmp_path / "other", mean=mean, std=std)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["I32", "U32"])
def test_integers_in_place_of_weights_are_refused(saved: Path, other: str) -> None:
    """A header that calls the bytes of float32 integers has the right lengths and shapes."""
    file = saved / "model.safetensors"
    data = file.read_bytes()
    start, end = data.index(b'"patch_embed.projection.weight"'), len(data)
    file.write_bytes(data[:start] + data[start:end].replace(b'"F32"', f'"{other}"'.encode(), 1))
    with pytest.raises(ValueError, match=r"type of patch_embed\.projection\.weight.*float32"):
        load_encoder(saved)


def test_weights_of_another_type_are_converted(encoder: SwinV2, tmp_path: Path) -> None:
    path = save_encoder(encoder.to(torch.bfloat16), tmp_path / "encoder", mean=MEAN, std=STD)
    assert load_encoder(path).norm.weight.dtype == torch.float32


def test_the_readme_example_loads_it(
    encoder: SwinV2, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = re.search(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(saved)
    names: dict[str, Any] = {}
    exec(compile(lines[1], "README", "exec"), names)
    assert_same_weights(names["encoder"], encoder)
    assert (names["description"].mean, names["description"].std) == (MEAN, STD)


def test_a_directory_of_an_early_version_is_loaded_and_replaced(
    encoder: SwinV2, saved: Path
) -> None:
    (saved / "README.md").unlink()
    assert is_encoder_directory(saved)
    assert_same_weights(load_encoder(saved), encoder)
    save_encoder(encoder, saved, mean=MEAN, std=STD)
    assert (saved / "README.md").is_file()


def test_a_failed_check_keeps_the_earlier_encoder(encoder: SwinV2, saved: Path) -> None:
    before = (saved / "config.json").read_bytes()

    def check(folder: Path) -> None:
        assert_same_weights(load_encoder(folder), encoder)
        raise ValueError("not good enough")

    with pytest.raises(ValueError, match="not good enough"):
        save_encoder(encoder, saved, mean=(0.1,) * 3, std=STD, check=check)
    assert (saved / "config.json").read_bytes() == before


@pytest.mark.parametrize("names", [("red", "nir", "green"), None])
def test_names_of_the_channels_are_saved(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    path = save_encoder(SwinV2(CONFIG), tmp_path / "encoder", **NUMBERS, channels=names)
    assert read_encoder_config(path).channels == names
    assert ("(red, nir, green)" in (path / "README.md").read_text()) == (names is not None)


@pytest.mark.parametrize(
    ("count", "names"), [(1, ("gray",)), (3, ("red", "green", "blue")), (5, None)]
)
def test_files_of_earlier_versions_imply_the_names(
    tmp_path: Path, count: int, names: tuple[str, ...] | None
) -> None:
    numbers: dict[str, Any] = {"mean": [0.5] * count, "std": [0.2] * count}
    encoder = SwinV2(replace(CONFIG, in_channels=count))
    path = save_encoder(encoder, tmp_path / "encoder", **numbers)
    content = json.loads((path / "config.json").read_text())
    assert content.pop("channels") is None
    assert read_encoder_config(path).channels is None
    (path / "config.json").write_text(json.dumps(content))
    assert read_encoder_config(path).channels == names


@pytest.mark.parametrize("names", [["red"], ["red", "red", "blue"], ["red", "", "blue"], [1, 2, 3]])
def test_wrong_names_of_channels_are_refused(tmp_path: Path, names: list[Any]) -> None:
    encoder = SwinV2(CONFIG)
    path = save_encoder(encoder, tmp_path / "encoder", **NUMBERS)
    content = json.loads((path / "config.json").read_text()) | {"channels": names}
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="channels"):
        read_encoder_config(path)
    if all(isinstance(name, str) for name in names):
        with pytest.raises(ValueError, match="one name for each"):
            save_encoder(encoder, tmp_path / "other", **NUMBERS, channels=names)
