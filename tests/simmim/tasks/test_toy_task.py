"""A task in one file: nothing else knows it but the list of tasks, to which the tests add it.

It predicts the brightness of each cell of an image, in place of a depth.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

import simmim.cli
from simmim.data.datasets.mixture import Shards
from simmim.data.loader.batch import Batch
from simmim.data.settings import AugmentedDataSettings
from simmim.data.transforms.image_transforms import EvalTransform, TrainTransform
from simmim.engine.generators import seeded
from simmim.engine.run import RunFolder
from simmim.export.load_trained import read_source
from simmim.recipe import settings
from simmim.report.section import ReportSection, Tile
from simmim.tasks.all_tasks import TASKS
from simmim.tasks.features import Normalise
from simmim.tasks.fine_tuning import FineTuningStage
from simmim.tasks.recipe import FineTuningRecipe
from simmim.tasks.task import Task
from simmim.tasks.trained import PlainHead
from swinv2.flops import forward_flops


@settings
class DepthData(AugmentedDataSettings):
    """Images; their depth is how bright they are."""

    image_size: int = 16
    """Side of the square images in pixels."""


@settings
class DepthRecipe(FineTuningRecipe):
    """Depth from images."""

    HEAD: ClassVar[str] = "depth"
    task: Literal["depth"]
    data: DepthData
    """The images."""

    @property
    def best_metric(self) -> str:
        """Accuracy of the depth, in percent."""
        return "depth_accuracy"


class DepthModel(nn.Module):
    """Encoder and a linear head on its last map."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the depth of each cell, (batch, rows, columns)."""
        depth: Tensor = self.head(self.encoder(images)).squeeze(-1)
        return depth


class DepthModule(nn.Module):
    """The model over stored batches."""

    def __init__(self, model: DepthModel, normalise: Normalise) -> None:
        super().__init__()
        self.model, self.normalise = model, normalise

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean absolute error over a batch."""
        images = self.normalise(batch.images, batch.flips)
        depth = self.model(images)
        bright = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), depth.shape[1:])
        return F.l1_loss(depth.float(), bright.squeeze(1))


class DepthStage(FineTuningStage[DepthRecipe, Shards]):
    """Training of a depth model."""

    def __init__(self, recipe: DepthRecipe) -> None:
        training, held_out = recipe.data.split_shards()
        super().__init__(recipe, training, held_out if held_out.samples else None)
        self.initial = self.load_initial(self.recipe)
        recipe.execution.apply(self.initial.encoder)
        with seeded(recipe.training.seed):
            self.model = DepthModel(self.initial.encoder)
        self.module = DepthModule(self.model, Normalise(self.initial.mean, self.initial.std))

    @staticmethod
    def class_names(recipe: DepthRecipe) -> tuple[str, ...]:
        """Return no classes."""
        del recipe
        return ()

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of the encoder."""
        return forward_flops(self.initial.encoder.config)

    def training_transform(self) -> TrainTransform:
        """Return the transform: crop and flip."""
        return TrainTransform(data=self.recipe.data, seed=self.recipe.training.seed)

    def validation_transform(self) -> EvalTransform:
        """Return the transform: centre crop."""
        data = self.recipe.data
        return EvalTransform(size=data.size, data=data)

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return loss and accuracy on held-out images."""
        if self.validation_shards is None:
            return {}
        batches = self.held_out(rank=accelerator.process_index, world=accelerator.num_processes)
        losses = [float(self.module(batch.to(accelerator.device))) for batch in batches]
        loss = sum(losses) / len(losses)
        return {"depth_accuracy": 100 / (1 + loss), "validation_loss": loss}


DEPTH = Task(
    name="depth",
    recipe=DepthRecipe,
    load_stage=lambda: DepthStage,
    report=ReportSection(tiles=(Tile(key="depth_accuracy", title="depth %"),)),
)


@pytest.fixture(autouse=True)
def listed() -> Iterator[None]:
    """List the task, the one line that a new task needs."""
    TASKS.append(DEPTH)
    yield
    TASKS.remove(DEPTH)


@pytest.fixture
def config(classification_values: dict[str, Any], encoder_directory: Path, tmp_path: Path) -> Path:
    values = classification_values | {"task": "depth", "init": str(encoder_directory)}
    for absent in ("encoder", "augmentation", "label_smoothing", "init_head"):
        values.pop(absent, None)
    values["data"].pop("multi_label", None)
    path = tmp_path / "depth.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_is_trained_examined_exported_and_reported(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(path=tmp_path / "run")
    command = ["--config", str(config), "--folder", str(run.path)]
    assert simmim.cli.main(["doctor", *command, "--seconds", "0.2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the papers have no learning rate for the task depth" in printed
    assert simmim.cli.main(["finetune", *command]) == 0
    printed = capsys.readouterr().out
    assert f"Head     {run.path / 'depth'}" in printed
    assert "depth_accuracy" in printed
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert simmim.cli.main(["evaluate", str(run.path)]) == 0
    assert "depth_accuracy" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 90, 200)).save(other / f"{number}.png")
    assert simmim.cli.main(["evaluate", str(run.path), "--data", str(other)]) == 0
    assert f"on 3 images of {other}" in capsys.readouterr().out
    assert simmim.cli.main(["report", str(run.path)]) == 0
    assert "</b>depth %" in run.report.read_text()
    for form in ("native", "onnx"):
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        assert (
            simmim.cli.main(["export", str(run.path), str(tmp_path / form), "--format", form]) == 0
        )
    printed = capsys.readouterr().out
    assert "depth: weights of the head" in printed
    assert "not exported: the head" in printed


def test_its_head_is_read_from_run_checkpoint_and_export(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert simmim.cli.main(["finetune", "--config", str(config), "--folder", str(run)]) == 0
    assert simmim.cli.main(["export", str(run), str(tmp_path / "native")]) == 0
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    heads = [read_source(place).head for place in (run, last, tmp_path / "native")]
    assert all(isinstance(head, PlainHead) for head in heads)
    tensors = [head.tensors for head in heads if isinstance(head, PlainHead)]
    assert tensors[0].keys() == {"head.weight", "head.bias"}
    for other in tensors[1:]:
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


def test_mistakes_in_its_recipe_are_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simmim.cli.main(["finetune", "--config", str(config), "--data.crop_pct", "0.5"]) == 2
    assert "crop_pct" in capsys.readouterr().err


@pytest.mark.timeout(900)  # two trainings in processes of their own
def test_labels_compares_its_runs(
    config: Path,
    encoder_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The processes of the runs list the task when Python starts.
    listing = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_toy_task import DEPTH
from simmim.tasks.all_tasks import TASKS
TASKS.append(DEPTH)
"""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(listing)
    path = os.pathsep.join([str(tmp_path / "start"), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)
    command = ["labels", "--config", str(config), "--init", str(encoder_directory)]
    command += ["--folder", str(tmp_path / "labels"), "--fractions", "0.5", "--seeds", "1"]
    assert simmim.cli.main([*command, "--training.steps", "2"]) == 0
    scores = json.loads((tmp_path / "labels" / "labels.json").read_text())
    assert {one["start"] for one in scores} == {"pretrained", "scratch"}
    head, row = capsys.readouterr().out.splitlines()[-3:-1]
    scores_of_start = [one["values"][0] for one in scores]
    columns = [head.index(name) for name in ("pretrained, ", "scratch, ")]
    assert [float(row[column:].split()[0]) for column in columns] == pytest.approx(
        scores_of_start, abs=0.05
    )
