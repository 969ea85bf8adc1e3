"""Files that are small and claim to be large are refused before anything is built or unpacked."""

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2 import SwinV2, SwinV2Config, load_encoder, load_video_encoder, save_encoder
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.importing.reading import read_checkpoint
from swinv2.bridges.timm import export_timm, import_timm
from swinv2.bridges.transformers import export_transformers, import_transformers
from swinv2.config import video_config
from swinv2.video import VideoSwinV2
from swinv2.weights import save_video_encoder

CONFIG = SwinV2Config(
    image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, patch_size=4
)
NORMALISATION = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
HUGE: dict[str, Any] = {
    "depths": [[1_000_000, 1], [900, 900], [1] * 1_000_000],
    "in_channels": [10**9, 60_000],
    "embed_dim": [10**9, 65_536, int("9" * 4000)],
    "num_heads": [[10**9, 1], [1] * 10**5],
    "mlp_ratio": [1e308, 1000.0],
    "patch_size": [10**9],
    "image_size": [[10**30, 10**30]],
}


@pytest.fixture
def no_large_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an encoder of many blocks is built, on whatever device."""
    build = SwinV2.__init__

    def checked(self: SwinV2, config: SwinV2Config) -> None:
        assert sum(config.depths) < 50, "it is being built"
        build(self, config)

    monkeypatch.setattr(SwinV2, "__init__", checked)


def change(file: Path, field: str, value: object, *, section: str | None = "config") -> None:
    content = json.loads(file.read_text())
    (content if section is None else content[section])[field] = value
    if section and field in ("depths", "embed_dim", "num_heads"):
        content[section]["variant"] = None
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in HUGE.items() for value in values]
)
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_a_config_of_another_size_is_compared_with_the_weights(
    tmp_path: Path, kind: str, field: str, value: object, no_large_build: None
) -> None:
    folder = tmp_path / "encoder"
    load: Callable[[Path], object]
    if kind == "images":
        load = load_encoder
        save_encoder(SwinV2(CONFIG), folder, **NORMALISATION)
    else:
        load = load_video_encoder
        clips = VideoSwinV2(video_config(CONFIG, frames=4, window_frames=2))
        save_video_encoder(clips, folder, **NORMALISATION)
    change(folder / "config.json", field, value)
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors") as caught:
        load(folder)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (
            lambda text: text.replace('"mean"', '"mean": [0.1, 0.1, 0.1], "mean"'),
            "key 'mean' twice",
        ),
        (
            lambda text: text.replace('"config": {', '"config": {"patch_size": 2,'),
            "key 'patch_size'",
        ),
        (lambda text: " " * 2**24 + text, "larger than 16 MiB"),
        (lambda text: text.replace('"variant": null', f'"variant": "{"x" * 10**6}"'), "no variant"),
        (
            lambda text: text.replace('"version": 1', f'"version": "{"x" * 10**6}"'),
            "format version",
        ),
        (lambda text: text.replace("{", f'{{"{"x" * 10**6}": 1,', 1), "unknown"),
        (lambda text: "{" + "".join(f'"{i}": 1,' for i in range(10**4)) + text[1:], "9,980 more"),
    ],
)
def test_duplicate_keys_and_large_texts_are_named_in_a_short_message(
    tmp_path: Path, edit: Callable[[str], str], word: str
) -> None:
    file = save_encoder(SwinV2(CONFIG), tmp_path / "encoder", **NORMALISATION) / "config.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(ValueError, match=word) as caught:
        load_encoder(tmp_path / "encoder")
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, f'{{"a": {"9" * 5000}}}'])
def test_a_config_of_deep_or_long_json_is_refused(tmp_path: Path, text: str) -> None:
    save_encoder(SwinV2(CONFIG), tmp_path / "encoder", **NORMALISATION)
    (tmp_path / "encoder" / "config.json").write_text(text)
    for load in (load_encoder, import_timm, import_transformers):
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            load(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depths", [1_000_000, 1]),
        ("depths", [900, 900]),
        ("depths", [1] * 10**5),
        ("embed_dim", 10**9),
        ("embed_dim", 65_536),
        ("num_channels", 10**9),
        ("num_heads", [10**9, 2]),
        ("mlp_ratio", 1e308),
        ("image_size", 10**30),
        ("window_size", 10**30),
        ("patch_size", 10**9),
    ],
)
def test_a_config_of_transformers_is_compared_with_the_weights(
    tmp_path: Path, field: str, value: object, no_large_build: None
) -> None:
    folder = tmp_path / "exported"
    export_transformers(SwinV2(CONFIG).eval(), folder, **NORMALISATION)
    change(folder / "config.json", field, value, section=None)
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors") as caught:
        import_transformers(folder)
    assert len(str(caught.value)) < 20_000


def test_a_config_of_timm_builds_nothing_large(tmp_path: Path, no_large_build: None) -> None:
    folder = tmp_path / "exported"
    export_timm(SwinV2(replace(CONFIG, num_heads=(1, 2))).eval(), folder, **NORMALISATION)
    for field, value in (("depths", [10**6, 1]), ("embed_dim", 10**9), ("in_chans", 10**9)):
        change(folder / "config.json", field, value, section="model_args")
    assert import_timm(folder).encoder.config.depths == CONFIG.depths  # from the tensors


def save(path: Path, content: object, **options: Any) -> Path:
    torch.save({"model": content}, path, **options)
    return path


def test_a_compressed_pickle_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = save(tmp_path / "stored.pth", {"a": torch.zeros(100_000)})
    with (
        zipfile.ZipFile(stored) as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is unpacked"))
    with pytest.raises(BridgeError, match=r"bomb\.pth.*compressed"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_entries_that_claim_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.pth", {"a": torch.zeros(16)})
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02")  # the last entry of the directory: its size
    data[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(BridgeError, match=r"bomb\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_claims_more_than_the_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = save(
        tmp_path / "bomb.pth",
        {"a": torch.zeros(100)},
        _use_new_zipfile_serialization=zipped,
    )
    data = path.read_bytes().replace(b"K\x64", b"K\xff", 1)
    assert read_checkpoint(path).tensors["a"].shape == (100,)
    if not zipped:
        data = path.read_bytes().replace(b"K\x64", b"J\xff\xff\xff\x7f", 1)
        path.write_bytes(data)
        with pytest.raises(BridgeError, match=r"claim 2,147,483,647 elements"):
            read_checkpoint(path)


def test_a_tensor_that_repeats_its_elements_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.pth", {"a": torch.zeros(1).expand(10**6, 10**6)})
    with pytest.raises(BridgeError, match="repeats its elements"):
        read_checkpoint(path)


def test_a_bytearray_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="bytearray"):
        read_checkpoint(save(tmp_path / "bomb.pth", bytearray(8)))


@pytest.mark.parametrize("zipped", [True, False])
def test_good_checkpoints_with_shared_storages_and_large_numbers_are_read(
    tmp_path: Path, zipped: bool
) -> None:
    shared = torch.randn(64)
    tensors = {f"part{number}": shared[number:] for number in range(50)} | {"empty": torch.zeros(0)}
    path = tmp_path / "good.pth"
    content = {"model": tensors, "step": 10**15, "seed": 2**62, "rates": [1e300]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.tensors.keys() == tensors.keys()
    assert found.extras["seed"] == 2**62


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoints_are_refused_at_every_length(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "cut.pth", {"a": torch.zeros(9)}, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for length in {*range(0, len(data) - 1, 41), len(data) - 2}:
        path.write_bytes(data[:length])
        with pytest.raises(BridgeError, match=r"cut\.pth"):
            read_checkpoint(path)
