"""What is refused of checkpoints of the published code, and for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.reference import (
    export_reference,
    import_reference,
    to_reference,
)
from tests.swinv2.bridges.drawn_heads import MEAN, STD, Build, Same, draw_classifier, draw_head

SIZES = {"image_size": 64, "window_size": 8, "pretrained_window_sizes": "same"}


def test_unknown_sizes_are_asked_for(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder, file = build(), tmp_path / "bare.pth"
    tensors = {f"module.{name}": part for name, part in to_reference(encoder).items()}
    torch.save(tensors, file)
    with pytest.raises(BridgeError, match=r"image_size, window_size, pretrained_window_sizes"):
        import_reference(file)
    with pytest.raises(BridgeError, match=r"pretrained_window_sizes: give"):
        import_reference(file, ImportOptions(image_size=64, window_size=8))
    back = import_reference(file, ImportOptions(**SIZES))
    assert_same_weights(encoder, back.encoder)
    assert back.encoder.config == encoder.config
    assert back.mean == (0.485, 0.456, 0.406)


def test_a_size_that_contradicts_the_file_is_refused(build: Build, tmp_path: Path) -> None:
    path = export_reference(build(), tmp_path / "out", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match=r"image_size is \(128, 128\).* and \(64, 64\)"):
        import_reference(path, ImportOptions(image_size=128))
    with pytest.raises(BridgeError, match="pretrained_window_sizes"):
        import_reference(path, ImportOptions(pretrained_window_sizes=[4, 4, 4, 2]))
    assert import_reference(path, ImportOptions(pretrained_window_sizes=[8, 8, 4, 2]))


def test_a_tensor_that_does_not_fit_is_named(
    build: Build, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], str]
) -> None:
    tensors = to_reference(build())
    message = spoil(tensors)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=message):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # by torch 2.14
@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (torch.full((64,), torch.nan), "values that are not finite"),
        (torch.full((64,), torch.inf, dtype=torch.float16), "values that are not finite"),
        (torch.ones(64, dtype=torch.int64), r".*torch\.int64"),
        (torch.ones(64, dtype=torch.complex64), r".*torch\.complex64"),
        (torch.ones(64).to_sparse(), "not stored as plain values"),
        (torch.ones(64, device="meta"), "not stored as plain values"),
    ],
    ids=["nan", "inf", "whole", "complex", "sparse", "meta"],
)
def test_tensors_that_are_not_finite_are_named(
    build: Build, tmp_path: Path, spoilt: Tensor, reason: str
) -> None:
    tensors = to_reference(build()) | {"norm.weight": spoilt}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=rf"finite.*:\n  norm\.weight: {reason}"):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


def test_an_empty_tensor_is_refused(build: Build, tmp_path: Path) -> None:
    tensors = to_reference(build()) | {"patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=r"shape of patch_embed\.proj\.weight: \(0, 3, 4, 4\)"):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


@pytest.mark.parametrize("lost", ["encoder.mask_token", "decoder.0.bias", "encoder.norm.bias"])
def test_a_simmim_checkpoint_must_be_complete(build: Build, tmp_path: Path, lost: str) -> None:
    encoder = build()
    tensors = to_reference(encoder, head=draw_head(encoder))
    del tensors[lost]
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=f"missing: {lost}"):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


def test_a_pickle_that_runs_code_is_refused(malicious: tuple[Path, Path]) -> None:
    file, folder = malicious
    with pytest.raises(BridgeError, match=r"mkdir.*would run code"):
        import_reference(file, ImportOptions(**SIZES))
    assert not folder.exists()


def test_other_architectures_are_refused_by_name(other_model: tuple[Path, str]) -> None:
    file, reason = other_model
    with pytest.raises(BridgeError, match=reason):
        import_reference(file, ImportOptions(**SIZES))


def test_files_that_are_not_checkpoints_are_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="does not exist"):
        import_reference(tmp_path / "none.pth")
    cut = tmp_path / "cut.pth"
    torch.save({"model": to_reference(build())}, cut)
    whole = cut.read_bytes()
    for length in (*range(0, len(whole), len(whole) // 40), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(BridgeError, match=r"truncated|cut short"):
            import_reference(cut)
    cut = cut.rename(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"truncated.*: copy it again"):
        import_reference(cut)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BridgeError, match="holds a list"):
        import_reference(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(BridgeError, match="no tensors by name"):
        import_reference(tmp_path / "empty.pth")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"window_size": (8, 4)}, "not square"),
        ({"image_size": (64, 96), "window_size": 16}, "from the shorter one"),
        ({"image_size": 66}, "multiple of the patch size"),
        ({"image_size": 80}, "odd maps"),
        ({"image_size": 96, "window_size": 7}, "padding that fills"),
        ({"extra_norm_every": 2}, "norm after every 2 blocks"),
    ],
)
def test_an_encoder_unsupported_by_the_published_code_is_refused(
    build: Build, tmp_path: Path, sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BridgeError, match=reason):
        export_reference(build(**sizes), tmp_path / "out", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_fit_are_refused(build: Build, tmp_path: Path) -> None:
    encoder, grey = build(), build(in_channels=1)
    with pytest.raises(BridgeError, match=r"decoder\.0\.weight is"):
        to_reference(encoder, head=draw_head(build(patch_size=2)))
    with pytest.raises(BridgeError, match="3 channels, not 1"):
        to_reference(grey, head=draw_head(grey))
    with pytest.raises(BridgeError, match=r"head\.weight is"):
        to_reference(encoder, classifier=draw_classifier(build(embed_dim=16)))
    with pytest.raises(BridgeError, match="leave one of them out"):
        to_reference(encoder, head=draw_head(encoder), classifier=draw_classifier(encoder))
