"""An encoder of another class goes through what SwinV2 does: only its members are asked for."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import simmim
import simmim.cli
from simmim import SimMIM
from simmim.doctor.examine import examine
from simmim.engine.checkpoint.resume import load_initial, read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.distributed.sharding import shard_by_block, sharding_units
from simmim.engine.loop import TrainingResult, train
from simmim.engine.optimizer import (
    OptimizerSettings,
    build_optimizer,
    layer_table,
    parameter_groups,
)
from simmim.engine.run import RunFolder
from simmim.export.export import Sizes, export
from simmim.export.formats import Format
from simmim.method.encoder_protocol import encoder_flops
from simmim.recipe import parse
from simmim.report.page import write_report
from simmim.tasks import all_tasks
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage, load_pretrained
from simmim.tasks.pretrained import find_weights
from simmim.tasks.probe.probe import open_probe_shards, probe
from simmim.tasks.probe.recipe import ProbeData, ProbeSettings
from swinv2 import VideoSwinV2, build_encoder, inflate
from tests.simmim.method.toy_encoder import TOY_CLASSIFICATION, ToyEncoder, build_toy


@pytest.fixture
def values(pretrain_values: dict[str, Any], shards: Path) -> dict[str, Any]:
    pretrain_values["encoder"] = {"variant": "tiny", "window_size": 4, "patch_size": 2}
    pretrain_values["probe"] = {"shards": str(shards), "validation_shards": 2, "every": 12}
    pretrain_values["probe"] |= {"kind": "both"}
    pretrain_values["training"]["optimizer"]["lr"] = 1e-2
    return pretrain_values


def build(values: dict[str, Any]) -> PretrainStage:
    return PretrainStage(parse(PretrainRecipe, values, "test"), build_toy)


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def run_training(values: dict[str, Any], folder: Path, resume: str | None = None) -> TrainingResult:
    run, accelerator = RunFolder(path=folder), build_accelerator("fp32")
    return train(build(values), run, accelerator, resume, write_report=write_report)


def test_it_trains_probes_and_reports(values: dict[str, Any], tmp_path: Path) -> None:
    values["training"] |= {"steps": 30, "look_every": 30, "validate_every": 15}
    run = RunFolder(path=tmp_path / "run")
    run_training(values, run.path)
    lines = run.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validation[-1] < validation[0]
    assert [line["step"] for line in lines if "probe_linear_top1" in line] == [0, 12, 24, 30]
    assert (run.reconstructions / "step-00000030.png").is_file()
    assert "Reconstructions, step-00000030" in run.report.read_text()


def test_it_trains_from_python(values: dict[str, Any], tmp_path: Path) -> None:
    values["training"] |= {"steps": 2}
    run = simmim.pretrain(values, tmp_path / "run", encoder=build_toy)
    assert (run.folder / "encoder" / "encoder.json").is_file()
    with pytest.raises(ValueError, match="is a ToyEncoder"):
        run.load_encoder()
    found = simmim.evaluate(run, encoder=build_toy)
    assert found.figures["validation_loss"] == next(
        line["validation_loss"] for line in run.metrics if "validation_loss" in line
    )
    with pytest.raises(ValueError, match="is a ToyEncoder, and its recipe alone builds a SwinV2"):
        simmim.evaluate(run)


def test_it_resumes_in_bits(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    values["training"] |= {"look_every": 6}
    run_training(values, whole)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PretrainStage, "visualize", die)
        with pytest.raises(KeyboardInterrupt):
            run_training(values, broken)
    assert not (broken / "checkpoints/step-00000012").exists()
    run_training(values, broken, resume="auto")
    assert_equal(*(read_model(folder / "checkpoints/step-00000012") for folder in (whole, broken)))


def test_its_weights_are_exported_and_what_needs_swinv2_says_so(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = RunFolder(path=tmp_path / "run")
    for _ in range(2):  # an earlier export is replaced
        run_training(values, run.path, resume="auto")
    trained = load_pretrained(run, encoder=build_toy).model.encoder.state_dict()
    saved = load_file(run.encoder / "model.safetensors")
    assert_equal(saved, trained)
    sources = (run.path, run.encoder, run.checkpoints / "step-00000012")
    for source in sources:
        export(source, tmp_path / "out", "native")
        for file in run.encoder.iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        for form in set(get_args(Format)) - {"native"}:
            with pytest.raises(ValueError, match=rf"is a ToyEncoder, and the format {form} needs"):
                export(source, tmp_path / "out", form)
        with pytest.raises(ValueError, match=r"window_size is for a SwinV2, .* is a ToyEncoder"):
            export(source, tmp_path / "out", "native", sizes=Sizes(window_size=4))
    for source in sources:
        with pytest.raises(ValueError, match=r"is a ToyEncoder: fine-tuning.* need a SwinV2"):
            find_weights(str(source))
    again = build(values)
    load_initial(run.encoder, again.module)
    assert torch.equal(again.encoder.stem.weight, saved["stem.weight"])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_checkpoint_of_a_training_that_has_not_ended_is_exported(
    values: dict[str, Any], tmp_path: Path, ema_decay: float | None
) -> None:
    values["training"] |= {"checkpoint_every": 6, "keep_last": 2, "ema_decay": ema_decay}
    run = RunFolder(path=tmp_path / "run")
    run_training(values, run.path)
    shutil.rmtree(run.encoder)  # the end of the training writes it
    middle = run.checkpoints / "step-00000006"
    for source, step in ((run.path, 12), (middle, 6)):
        lines = export(source, tmp_path / "out", "native")
        assert "model.safetensors and encoder.json of a ToyEncoder" in lines[1]
        trained = load_pretrained(run, str(run.checkpoints / f"step-{step:08d}"), build_toy)
        encoder = ToyEncoder()
        encoder.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
        assert_equal(encoder.state_dict(), trained.model.encoder.state_dict())
        described = json.loads((tmp_path / "out" / "encoder.json").read_text())
        assert described["class"].endswith("ToyEncoder")
        assert described["provenance"]["step"] == step
    (middle / "encoder.json").write_text("{}")
    with pytest.raises(ValueError, match=r"encoder\.json .*(differs|damaged|written)"):
        export(middle, tmp_path / "out", "native")


def test_a_damaged_description_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    run_training(values, run.path)
    for text in ("{", "[]", "{}", '{"class": 3}', '{"class": "a.B", "provenance": 1}'):
        (run.encoder / "encoder.json").write_text(text)
        with pytest.raises(ValueError, match=r"encoder\.json is damaged"):
            export(run.encoder, tmp_path / "out", "native")


def test_the_doctor_examines_it(values: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    checks = examine(build(values), run, build_accelerator("fp32"), resume=None, seconds=0.1)
    by_name = {check.name: check for check in checks}
    assert not [check for check in checks if check.verdict == "problem"]
    assert "not estimated for a ToyEncoder" in by_name["memory"].found
    assert "learning rate" not in by_name
    assert {"dry step", "compute", "duration"} <= set(by_name)


def test_layers_decay_and_exclusions_are_its_own() -> None:
    model = SimMIM(ToyEncoder(), mask_cell=4)
    settings = OptimizerSettings(lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(model, settings)
    factors = {name: group.lr_factor for group in groups for name in group.names}
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert factors.keys() == {name for name, _ in model.named_parameters()}
    assert factors["mask_token"] == factors["encoder.stem.weight"] == 0.5**3
    assert factors["encoder.halve.weight"] == factors["encoder.first.gate"] == 0.5**2
    assert factors["encoder.second.mix.bias"] == 0.5
    assert factors["encoder.norm.bias"] == factors["decoder.projection.weight"] == 1
    assert decay["encoder.first.gate"] == decay["mask_token"] == 0
    assert decay["encoder.first.reduce.weight"] == 0.1
    build_optimizer(model, settings, groups)
    rows = layer_table(model, groups).split("\n")
    assert rows[0].split() == ["layer", "lr", "factor", "parameters", "gate"]
    assert rows[1].endswith("mask_token, stem")
    assert rows[4].endswith("decoder, norm")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_its_blocks_are_sharded(one_rank: None) -> None:
    torch.manual_seed(0)
    model = SimMIM(ToyEncoder(), mask_cell=4)
    units = sharding_units(model)
    assert [unit.name for unit in units] == ["encoder.first", "encoder.second", ""]
    listed = [name for unit in units for name in unit.parameters]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    images, mask = torch.randn(2, 3, 16, 16), torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
    whole = model(images, mask).loss
    shard_by_block(model, init_device_mesh("cpu", (1,)), param_dtype=None)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert torch.equal(model(images, mask).loss, whole)


def test_its_features_are_probed(shards: Path) -> None:
    data = ProbeData(shards=str(shards), validation_shards=2, workers=0)
    training, validation = open_probe_shards(data)
    torch.manual_seed(0)
    found = probe(
        ToyEncoder(),
        training,
        validation,
        data=data,
        settings=ProbeSettings(),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    assert found.validation_samples == 24
    assert found.linear_top1 > 100 / 3


def test_its_flops_are_counted() -> None:
    blocks = sum(2 * side**2 * (9 * dim + dim * dim) for side, dim in ((8, 12), (4, 24)))
    convolutions = 2 * (8**2 * 12 * 12 + 4**2 * 24 * 48)
    assert encoder_flops(ToyEncoder()) == blocks + convolutions
    swin = build_encoder("tiny", image_size=64, window_size=4)
    assert encoder_flops(swin) == swin.forward_flops


def test_settings_of_swinv2_are_refused(values: dict[str, Any]) -> None:
    values["execution"] = {"checkpointing": "full"}
    with pytest.raises(ValueError, match=r"execution\.checkpointing .* encoder is a ToyEncoder"):
        build(values)


def test_sizes_other_than_the_recipes_are_refused(values: dict[str, Any]) -> None:
    values["encoder"]["patch_size"] = 4
    with pytest.raises(ValueError, match=r"ToyEncoder has patch_size 2, and encoder\.patch_size"):
        build(values)


def test_missing_members_are_named() -> None:
    class Half(nn.Module):
        embed_dim = 3

    with pytest.raises(TypeError, match="encoder is a Half, which lacks image_size, in_channels"):
        SimMIM(Half())


def test_an_encoder_of_clips_is_refused_when_the_model_is_built() -> None:
    images = build_encoder(
        "tiny", image_size=32, window_size=4, embed_dim=8, depths=(1,), num_heads=(1,)
    )
    clips = inflate(images, frames=2)
    assert isinstance(clips, VideoSwinV2)
    with pytest.raises(ValueError, match="VideoSwinV2, whose maps have frames, rows, columns"):
        SimMIM(clips, mask_cell=8)


@pytest.mark.timeout(900)  # two trainings in processes of their own
def test_it_is_fine_tuned_and_its_labels_compared(
    values: dict[str, Any],
    classification_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(all_tasks, "TASKS", [*all_tasks.TASKS, TOY_CLASSIFICATION])
    pretrained = tmp_path / "pretrained"
    run_training(values, pretrained)
    classification_values |= {"task": "toy-classification", "encoder": values["encoder"]}
    classification_values["training"] |= {"steps": 4, "validate_every": 4}
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(classification_values))
    start = ["--config", str(config), "--init", str(pretrained)]
    run = ["--folder", str(tmp_path / "run")]
    assert simmim.cli.main(["doctor", *start, *run, "--seconds", "0.1"]) == 0
    assert simmim.cli.main(["finetune", *start, *run]) == 0
    assert simmim.cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert "top1" in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert weights.keys() == ToyEncoder().state_dict().keys()
    assert simmim.cli.main(["export", str(tmp_path / "run"), str(tmp_path / "native")]) == 0
    assert "not exported: the head" in capsys.readouterr().out
    assert_equal(load_file(tmp_path / "native" / "model.safetensors"), weights)
    # The processes of the compared runs list the task when Python starts.
    listing = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from toy_encoder import TOY_CLASSIFICATION
from simmim.tasks.all_tasks import TASKS
TASKS.append(TOY_CLASSIFICATION)
"""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(listing)
    path = os.pathsep.join([str(tmp_path / "start"), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)
    places = ["--folder", str(tmp_path / "labels"), "--fractions", "0.5", "--seeds", "1"]
    assert simmim.cli.main(["labels", *start, *places]) == 0
    assert f"train a ToyEncoder, as in {pretrained}, on 16 pixels" in capsys.readouterr().err
    scores = json.loads((tmp_path / "labels" / "labels.json").read_text())
    assert {one["start"] for one in scores} == {"pretrained", "scratch"}
