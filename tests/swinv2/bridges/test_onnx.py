"""ONNX and torch.export graphs compute what PyTorch computes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from swinv2 import SwinV2, build_encoder
from swinv2.bridges import onnx, torch_export
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.onnx import export_onnx
from swinv2.bridges.torch_export import export_program
from swinv2.bridges.verification import plain_copy

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
NARROW = {"depths": (2, 1), "num_heads": (1, 2)}


@dataclass(frozen=True)
class Graph:
    """One kind of export."""

    export: Callable[..., Path]
    file: str

    def load(self, folder: Path) -> Callable[[Tensor], Sequence[Any]]:
        if self.export is export_program:
            program: Callable[[Tensor], Sequence[Any]] = torch.export.load(
                folder / self.file
            ).module()
            return program
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(folder / self.file, options)
        return lambda images: session.run(None, {"images": images.numpy()})


@pytest.fixture(params=["onnx", "torch-export"])
def graph(request: pytest.FixtureRequest) -> Graph:
    if request.param == "torch-export":
        return Graph(export_program, "model.pt2")
    if not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("the export extra is not installed")
    return Graph(export_onnx, "model.onnx")


def reported(lines: list[str]) -> float:
    """Return the difference that an export reports."""
    (line,) = lines
    return float(line.rpartition(" ")[2])


def assert_same_maps(encoder: SwinV2, run: Callable[[Tensor], Sequence[Any]], *shape: int) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(shape[0], encoder.config.in_channels, *shape[1:], generator=generator)
    with torch.no_grad():
        ours, theirs = encoder.features(images), run(images)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        difference = (one - torch.as_tensor(other)).abs().max()
        assert difference <= 1e-4 * one.std(correction=0)


@pytest.mark.timeout(900)  # an export, on a machine that does much else
def test_a_fixed_size_from_an_encoder_in_training_mode(
    graph: Graph, build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    sizes = {"in_channels": 1, "image_size": (36, 70), "extra_norm_every": 2, "drop_path": 0.5}
    plain = build(**NARROW, window_size=(4, 3), **sizes)
    encoder = build(**NARROW, window_size=(4, 3), **sizes).train()
    encoder.set_execution(attention="sequential", checkpointing="full")
    encoder.compile_blocks()
    lines: list[str] = []
    graph.export(encoder, tmp_path / "out", mean=[0.5], std=[0.5], report=lines.append)
    assert reported(lines) < 1e-5
    assert encoder.training
    run = graph.load(tmp_path / "out")
    for batch in (1, 2, 5):
        assert_same_maps(plain, run, batch, 36, 70)
    with pytest.raises(Exception, match=r"images|dimension"):
        run(torch.zeros(1, 1, 40, 70))


@pytest.mark.timeout(900)  # an export, on a machine that does much else
def test_any_size(graph: Graph, build: Callable[..., SwinV2], tmp_path: Path) -> None:
    encoder = build(**NARROW, in_channels=4, window_size=(12, 10))
    lines: list[str] = []
    normalisation = {"mean": [0.5] * 4, "std": [0.5] * 4}
    try:
        graph.export(encoder, tmp_path / "out", **normalisation, any_size=True, report=lines.append)
    except BridgeError as error:
        if torch.__version__ < TorchVersion("2.13"):
            pytest.skip(str(error))
        raise
    assert reported(lines) < 1e-5
    run = graph.load(tmp_path / "out")
    for side in (192, 256, 384):
        assert_same_maps(encoder, run, 1, side, side)
    for shape in ((3, 64, 64), (2, 101, 67), (5, 7, 60), (1, 1, 3), (2, 1, 1)):
        assert_same_maps(encoder, run, *shape)


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.timeout(900)  # an export, on a machine that does much else
def test_a_classifier_gives_its_logits_in_another_process(
    graph: Graph,
    build: Callable[..., SwinV2],
    draw_heads: Callable[[SwinV2], dict[str, Any]],
    tmp_path: Path,
    any_size: bool,
) -> None:
    encoder = build(**NARROW, image_size=32, window_size=4)
    classifier, names = draw_heads(encoder)["classifier"], ["a", "b", "c", "d", "é"]
    normalisation = {"mean": MEAN, "std": STD}
    lines: list[str] = []
    graph.export(
        encoder,
        tmp_path / "out",
        **normalisation,
        classifier=classifier,
        classes=names,
        any_size=any_size,
        report=lines.append,
    )
    assert "maps and logits" in lines[0]
    assert reported(lines) < 1e-5
    text = (tmp_path / "out" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "*maps, logits = " in example
    assert "`logits` is (batch, 5)" in text
    description = json.loads((tmp_path / "out" / "preprocessing.json").read_text("utf-8"))
    assert [one["name"] for one in description["outputs"]] == ["stage1", "stage2", "logits"]
    assert description["outputs"][-1] == {"name": "logits", "classes": names}

    shape = (3, 3, 20, 45) if any_size else (3, 3, 32, 32)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "images.npy", images.numpy())
    loading = "np.load('../images.npy')"
    loading = loading if graph.file == "model.onnx" else f"torch.from_numpy({loading})"
    program = re.sub(r"images = .*", f"images = {loading}", example)
    script = f"import numpy as np\n{program}\nnp.save('../logits.npy', np.asarray(logits.tolist()))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path / "out",
        timeout=300,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    with torch.no_grad():
        expected = classifier.logits(encoder(images))
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy")).float()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_does_not_fit_is_refused(
    build: Callable[..., SwinV2],
    draw_heads: Callable[[SwinV2], dict[str, Any]],
    tmp_path: Path,
) -> None:
    encoder = build(**NARROW)
    classifier = draw_heads(build(embed_dim=16))["classifier"]
    options = {"mean": MEAN, "std": STD}
    with pytest.raises(BridgeError, match="does not fit the encoder"):
        export_program(encoder, tmp_path / "out", **options, classifier=classifier)
    classifier = draw_heads(encoder)["classifier"]
    with pytest.raises(BridgeError, match="2 names for 5 classes"):
        export_program(
            encoder, tmp_path / "out", **options, classifier=classifier, classes=("a", "b")
        )
    assert not (tmp_path / "out").exists()


def test_the_readme_example_runs(
    graph: Graph, build: Callable[..., SwinV2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build(**NARROW)
    graph.export(encoder, tmp_path / "out", mean=MEAN, std=STD)
    monkeypatch.chdir(tmp_path / "out")
    text = Path("README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines, names)
    images = torch.as_tensor(np.asarray(names["images"]))
    for ours, theirs in zip(encoder.features(images), names["maps"], strict=True):
        torch.testing.assert_close(torch.as_tensor(theirs), ours.detach(), rtol=1e-4, atol=1e-5)
    for name in ("`stage1`: 8 channels, at stride 4", "`stage2`: 16 channels, at stride 8"):
        assert name in text
    description = json.loads(Path("preprocessing.json").read_text())
    assert description["input"] == {
        "name": "images",
        "dtype": "float32",
        "layout": ["batch", "channels", "height", "width"],
        "channels": 3,
        "image_size": [64, 64],
        "any_size": False,
        "scale": [0.0, 1.0],
        "mean": list(MEAN),
        "std": list(STD),
    }
    assert description["outputs"][1] == {"name": "stage2", "channels": 16, "stride": 8}


def test_a_model_without_onnxruntime_names_its_axes_and_stores_large_weights_externally(
    build: Callable[..., SwinV2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx, "LARGEST_FILE", 1000)
    encoder, lines = build(**NARROW), list[str]()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "onnxruntime", None)
        export_onnx(encoder, tmp_path / "out", mean=MEAN, std=STD, report=lines.append)
    assert "onnxruntime is not installed" in lines[0]
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data", "preprocessing.json", "README.md"}
    weights = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    assert files["model.onnx.data"] > 0.9 * weights
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [(one.name, one.shape) for one in session.get_inputs()] == [
        ("images", ["batch", 3, 64, 64])
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("stage1", ["batch", 8, 16, 16]),
        ("stage2", ["batch", 16, 8, 8]),
    ]


def test_only_an_earlier_export_of_its_kind_is_replaced(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    encoder = build(**NARROW)
    for _ in range(2):
        export_program(encoder, tmp_path / "out", mean=MEAN, std=STD)
    if all(find_spec(name) for name in ("onnx", "onnxscript")):
        with pytest.raises(ValueError, match="not replaced"):
            export_onnx(encoder, tmp_path / "out", mean=MEAN, std=STD)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not replaced"):
        export_program(encoder, tmp_path / "out", mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="mean"):
        export_program(encoder, tmp_path / "other", mean=[0.5], std=[0.5])


def test_a_refused_graph_leaves_nothing(
    build: Callable[..., SwinV2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both kinds are compared and written by the same function.
    monkeypatch.setattr(torch_export, "TOLERANCE", -1.0)  # equal maps would pass any other
    with pytest.raises(ValueError, match=r"stage1 of the graph differs"):
        export_program(build(**NARROW), tmp_path / "new" / "out", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda maps: [maps[0], maps[1] + 2e-4 * maps[1].abs().max()], "stage2 of the graph"),
        (lambda maps: [maps[0], maps[1] * torch.nan], "stage2 of the graph"),
        (lambda maps: [maps[0], maps[1][:, :, :, :1]], "the graph returns"),
        (lambda maps: maps[:1], "the graph returns"),
    ],
)
def test_maps_that_differ_are_refused(
    build: Callable[..., SwinV2], change: Callable[[list[Tensor]], list[Tensor]], reason: str
) -> None:
    plain = plain_copy(build(**NARROW))
    model = torch_export.PlainModel(plain)
    assert reported([torch_export.compare_outputs(model, plain.features, None, any_size=True)]) == 0
    with pytest.raises(ValueError, match=reason):
        torch_export.compare_outputs(
            model, lambda images: change(plain.features(images)), None, any_size=True
        )


def test_a_missing_package_is_named_with_its_remedy(
    build: Callable[..., SwinV2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript.*pip install 'simmim\[export\]'"):
        export_onnx(build(**NARROW), tmp_path / "out", mean=MEAN, std=STD)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("image_size", "window_size"), [(256, 8), (192, 12)])
@pytest.mark.parametrize("any_size", [False, True])
def test_the_published_tiny(
    graph: Graph,
    randomise: Callable[[torch.nn.Module], None],
    tmp_path: Path,
    image_size: int,
    window_size: int,
    any_size: bool,
) -> None:
    encoder = build_encoder("tiny", image_size=image_size, window_size=window_size).eval()
    randomise(encoder)
    graph.export(encoder, tmp_path / "out", mean=MEAN, std=STD, any_size=any_size)
    run = graph.load(tmp_path / "out")
    for side in (192, 256, 384) if any_size else (image_size,):
        assert_same_maps(encoder, run, 2, side, side)
