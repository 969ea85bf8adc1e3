import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from simmim.cli import main
from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import best_checkpoint
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.export.export import export
from simmim.export.formats import GRAPHS, Format
from simmim.export.import_encoder import import_encoder
from simmim.export.load_trained import read_source
from simmim.recipe import parse
from simmim.tasks.classification.classifier import load_classifier
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.pretrained import find_weights
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.reference import import_reference
from swinv2.bridges.timm import import_timm
from swinv2.config_file import read_encoder_config
from swinv2.method_file import read_method
from swinv2.weights import load_encoder


@pytest.fixture
def pretrained(pretrain_values: dict[str, Any], tmp_path: Path) -> tuple[Path, PretrainStage]:
    """A finished pretraining run and the stage that made it."""
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    train(stage, RunFolder(path=tmp_path / "run"), build_accelerator("fp32"), None)
    stage.module.eval()
    return tmp_path / "run", stage


@pytest.fixture
def classified(
    classification_values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> tuple[Path, ClassificationStage]:
    """A finished fine-tuning run on an encoder directory, and the stage that made it."""
    values = classification_values | {"init": str(encoder_directory)}
    stage = ClassificationStage(parse(ClassificationRecipe, values, "test"))
    train(stage, RunFolder(path=tmp_path / "tuned"), build_accelerator("fp32"), None)
    return tmp_path / "tuned", stage


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_method(folder: Path, stage: PretrainStage | None, lines: list[str]) -> None:
    """Mask token and decoder of an encoder directory are those of a model, or there are none."""
    found = read_method(folder)
    assert any("simmim.safetensors: mask token" in line for line in lines) == (stage is not None)
    assert (found is not None) == (stage is not None)
    if found is not None and stage is not None:
        ours = stage.model.state_dict()
        assert all(torch.equal(ours[name], one) for name, one in found.named().items())


def test_native_export_of_a_run_is_its_trained_encoder(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path
) -> None:
    run, stage = pretrained
    lines = export(run, tmp_path / "out", "native")
    assert_same_weights(load_encoder(tmp_path / "out"), stage.model.encoder)
    assert "step-00000012" in lines[0]
    assert lines[-2].startswith("  compared on shard-000000/")
    assert lines[-1].endswith("0.0e+00")
    ours, handed_on = read_encoder_config(tmp_path / "out"), read_encoder_config(run / "encoder")
    assert ours == handed_on
    assert_method(tmp_path / "out", stage, lines)
    (run / "checkpoints").rename(run / "gone")
    assert_method(tmp_path / "out", stage, export(run, tmp_path / "out", "native"))


def test_native_export_of_an_unfinished_run(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path
) -> None:
    run, _ = pretrained
    (run / "checkpoints" / "step-00000012" / "complete").unlink()
    (run / "encoder").rename(tmp_path / "ended")
    export(run, tmp_path / "out", "native")
    provenance = read_encoder_config(tmp_path / "out").provenance
    assert (provenance.step, provenance.samples_seen) == (8, 64)


def test_a_run_without_checkpoints_gives_its_encoder_directory(
    pretrained: tuple[Path, PretrainStage],
) -> None:
    run, stage = pretrained
    (run / "checkpoints").rename(run / "gone")
    found = read_source(run)
    assert found.masked_image is not None
    assert torch.equal(found.masked_image.mask_token, stage.model.mask_token)
    assert found.masked_image.norm_target is False
    assert_same_weights(found.encoder, stage.model.encoder)


def test_native_export_of_a_directory_keeps_its_config(
    encoder_directory: Path, tmp_path: Path
) -> None:
    export(encoder_directory, tmp_path / "out", "native")
    assert read_encoder_config(tmp_path / "out") == read_encoder_config(encoder_directory)
    assert_same_weights(load_encoder(tmp_path / "out"), load_encoder(encoder_directory))


@pytest.mark.parametrize("ended", [True, False])
def test_native_export_of_a_fine_tuned_encoder(
    classified: tuple[Path, ClassificationStage], tmp_path: Path, ended: bool
) -> None:
    run, stage = classified
    if ended:
        (tmp_path / "encoder").rename(tmp_path / "the start is gone")
    else:
        (run / "encoder").rename(tmp_path / "not yet written")
    export(run, tmp_path / "out", "native")
    assert_same_weights(load_encoder(tmp_path / "out"), stage.model.encoder)
    description = read_encoder_config(tmp_path / "out")
    assert description.mean == (0.4, 0.5, 0.6)
    assert description.config.pretrained_window_sizes == ((4, 4), (4, 4))
    assert description.provenance.step == 8


@pytest.mark.parametrize("ended", [True, False])
def test_a_native_export_has_the_classifier_too(
    classified: tuple[Path, ClassificationStage], tmp_path: Path, ended: bool
) -> None:
    run, stage = classified
    if not ended:
        (run / "encoder").rename(tmp_path / "not yet written")
    for _ in range(2):  # the second takes the place of the first
        lines = export(run, tmp_path / "out", "native")
    assert "  classifier: the head with 3 classes" in lines
    assert lines[-1] == "  largest difference of its logits after loading: 0.0e+00"
    trained = load_classifier(tmp_path / "out", tmp_path / "out" / "classifier")
    assert trained.classes == ("circle", "square", "stripe")
    assert_same_weights(trained.model, stage.model)
    assert "load_classifier" in (tmp_path / "out" / "README.md").read_text()
    again = read_source(tmp_path / "out")
    assert again.classifier is not None
    assert torch.equal(again.classifier.weight, stage.model.head.weight)
    assert find_weights(str(tmp_path / "out")).head == tmp_path / "out" / "classifier"


def test_the_best_checkpoint_is_exported_unless_the_last_is_asked_for(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "tuned"
    training = {"validate_every": 2, "checkpoint_every": 2, "keep_last": 1, "keep_best": True}
    # What is learned at first is unlearned again.
    training |= {"steps": 12, "schedule": {"kind": "multistep", "milestones": [0.5], "gamma": 1.0}}
    values = classification_values | {"training": classification_values["training"] | training}
    stage = ClassificationStage(parse(ClassificationRecipe, values, "test"))
    train(stage, RunFolder(path=run), build_accelerator("fp32"), None)
    best = best_checkpoint(run)
    step = int(best.name.removeprefix("step-"))
    assert main(["export", str(run), str(tmp_path / "last"), "--last"]) == 0
    assert read_encoder_config(tmp_path / "last").provenance.step == 12
    last = load_classifier(tmp_path / "last", tmp_path / "last" / "classifier").model
    final = read_model(run / "checkpoints" / "step-00000012")
    assert torch.equal(last.head.weight, final["model.head.weight"])
    for chosen in (["--best"], []):
        title = export(run, tmp_path / "out", "native", best=bool(chosen) or None)[0]
        assert f"step {step}, the best: top1" in title
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    found = load_classifier(tmp_path / "out", tmp_path / "out" / "classifier").model
    kept = {name.removeprefix("model."): part for name, part in read_model(best).items()}
    assert all(torch.equal(part, kept[name]) for name, part in found.state_dict().items())
    assert read_encoder_config(tmp_path / "out").provenance.step == step
    export(best, tmp_path / "named", "native")
    assert read_encoder_config(tmp_path / "named") == read_encoder_config(tmp_path / "out")
    assert chosen_checkpoint(run) == chosen_checkpoint(best, best=False)


def test_there_is_no_best_checkpoint_without_validation(
    pretrained: tuple[Path, PretrainStage], encoder_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="names no best checkpoint"):
        export(pretrained[0], tmp_path / "out", "native", best=True)
    for best in (True, False):
        with pytest.raises(ValueError, match="not a run folder"):
            export(encoder_directory, tmp_path / "out", "native", best=best)


@pytest.mark.peer
def test_transformers_loads_a_run_with_its_decoder(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run, stage = pretrained
    lines = export(run, tmp_path / "out", "transformers")
    assert float(lines[-1].split()[-1]) < 1e-4
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    peer, report = transformers.Swinv2ForMaskedImageModeling.from_pretrained(
        tmp_path / "out" / "masked-image-modeling", output_loading_info=True
    )
    assert not any(report.values())
    tokens = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    with torch.no_grad():
        theirs = peer.eval()(images, bool_masked_pos=tokens)
        ours = stage.model(images, hidden)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.peer
def test_transformers_export_of_a_directory_has_no_heads(
    encoder_directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    lines = export(encoder_directory, tmp_path / "out", "transformers")
    assert "  compared on a drawn image:" in lines
    assert sum("largest difference of Swinv2" in line for line in lines) == 2
    held = {place.name for place in (tmp_path / "out").iterdir() if place.is_dir()}
    assert held == {"backbone"}


@pytest.mark.peer
@pytest.mark.parametrize("left", ["all", "no-encoder", "no-checkpoints", "no-shards"])
def test_transformers_loads_a_fine_tuned_run_with_its_classifier(
    classified: tuple[Path, ClassificationStage], tmp_path: Path, left: str
) -> None:
    transformers = pytest.importorskip("transformers")
    run, stage = classified
    match left:
        case "no-encoder":
            (run / "encoder").rename(tmp_path / "gone")
        case "no-checkpoints":
            (run / "checkpoints").rename(tmp_path / "gone")
        case "no-shards":
            (run / "encoder").rename(tmp_path / "gone")
            (run / "classifier").rename(tmp_path / "gone too")
            Path(stage.recipe.data.shards).rename(tmp_path / "shards")
    try:
        lines = export(run, tmp_path / "out", "transformers")
    finally:
        if left == "no-shards":
            (tmp_path / "shards").rename(stage.recipe.data.shards)
    assert sum("largest difference of Swinv2" in line for line in lines) == 3
    real = left != "no-shards"
    assert any("compared on shard-000000/" in line for line in lines) == real
    assert float(lines[-1].split()[-1]) < 1e-4
    peer, report = transformers.Swinv2ForImageClassification.from_pretrained(
        tmp_path / "out" / "image-classification", output_loading_info=True
    )
    assert not any(report.values())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stage.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(peer(images).logits, stage.model(images), rtol=1e-4, atol=1e-5)
    named = dict(enumerate(("circle", "square", "stripe")))
    unnamed = {number: f"LABEL_{number}" for number in named}
    assert peer.config.id2label == (unnamed if left == "no-shards" else named)


@pytest.mark.parametrize("form", ["reference", "timm"])
def test_a_fine_tuned_run_is_exported_with_its_classifier(
    classified: tuple[Path, ClassificationStage], tmp_path: Path, form: Any
) -> None:
    run, stage = classified
    export(run, tmp_path / "out", form)
    read = {"reference": import_reference, "timm": import_timm}[form]
    imported = read(tmp_path / "out")
    assert imported.classifier is not None
    assert torch.equal(imported.classifier.weight, stage.model.head.weight)
    assert torch.equal(imported.classifier.bias, stage.model.head.bias)
    lines = import_encoder(tmp_path / "out", tmp_path / "back", form, ImportOptions())
    assert any("not imported: the classifier of 3 classes" in line for line in lines)


def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last = list(tensors)[-1]
    return {**tensors, last: tensors[last] + 1e-3}


@pytest.mark.parametrize("form", [form for form in get_args(Format) if form not in GRAPHS])
def test_a_wrong_export_is_not_kept(
    encoder_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def save_wrong_file(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(spoilt(tensors), path, metadata)

    def save_wrong_pickle(content: Any, path: Path) -> None:
        save(content | {"model": spoilt(content["model"])}, path)

    out, save = tmp_path / "out", torch.save
    export(encoder_directory, out, form)
    before = contents()
    monkeypatch.setattr("swinv2.weights.save_file", save_wrong_file)
    monkeypatch.setattr("swinv2.bridges.timm.save_file", save_wrong_file)
    monkeypatch.setattr(torch, "save", save_wrong_pickle)
    with pytest.raises(ValueError, match="not exported: "):
        export(encoder_directory, out, form)
    assert contents() == before
    assert {place.name for place in tmp_path.iterdir()} == {"encoder", "out"}


@pytest.mark.parametrize("form", get_args(Format))
def test_every_export_has_a_readme_with_lines_to_load_it(
    encoder_directory: Path, tmp_path: Path, form: Any
) -> None:
    lines = export(encoder_directory, tmp_path / "out", form)
    assert "```python\n" in (tmp_path / "out" / "README.md").read_text()
    assert any("README.md shows how to load" in line for line in lines)
    assert float(lines[-1].split()[-1]) < 1e-4


@pytest.mark.peer
def test_a_run_goes_to_transformers_and_back(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path
) -> None:
    run, stage = pretrained
    export(run, tmp_path / "out", "transformers")
    for folder in (".", "masked-image-modeling"):
        lines = import_encoder(
            tmp_path / "out" / folder, tmp_path / "back", "transformers", ImportOptions()
        )
        assert_method(tmp_path / "back", stage if folder != "." else None, lines)
        assert lines[-1].endswith("0.0e+00")
        assert_same_weights(load_encoder(tmp_path / "back"), stage.model.encoder)
        ours, back = read_encoder_config(run / "encoder"), read_encoder_config(tmp_path / "back")
        assert (back.config, back.mean, back.std) == (ours.config, ours.mean, ours.std)
    lines = import_encoder(
        tmp_path / "out" / "backbone", tmp_path / "back", "transformers", ImportOptions()
    )
    assert "norm.weight, norm.bias" in "\n".join(lines)
    with pytest.raises(ValueError, match="architecture is for the timm format"):
        import_encoder(
            tmp_path / "out", tmp_path / "back", "transformers", ImportOptions(architecture="tiny")
        )


@pytest.mark.parametrize("form", ["reference", "timm"])
def test_an_exported_run_is_imported_again(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path, form: Any
) -> None:
    run, stage = pretrained
    lines = export(run, tmp_path / "out", form)
    assert float(lines[-1].split()[-1]) < 1e-5
    assert any("mask token and decoder" in line for line in lines)
    lines = import_encoder(tmp_path / "out", tmp_path / "back", form, ImportOptions())
    assert lines[-1].endswith("0.0e+00")
    assert_method(tmp_path / "back", stage if form == "reference" else None, lines)
    assert_same_weights(load_encoder(tmp_path / "back"), stage.model.encoder)
    ours, back = read_encoder_config(run / "encoder"), read_encoder_config(tmp_path / "back")
    assert (back.config, back.mean, back.std) == (ours.config, ours.mean, ours.std)


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        export(tmp_path / "nowhere", tmp_path / "out", "native")
    with pytest.raises(ValueError, match="has no trained weights"):
        export(tmp_path, tmp_path / "out", "native")
    (tmp_path / "recipe.yaml").write_text("task: pretrain\n")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        export(tmp_path, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", get_args(Format))
def test_an_occupied_destination_is_left_alone(
    encoder_directory: Path, tmp_path: Path, form: Any
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="occupied"):
        export(encoder_directory, occupied, form)
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]


def test_a_graph_export_of_a_pretraining_says_that_it_has_no_decoder(
    pretrained: tuple[Path, PretrainStage], tmp_path: Path
) -> None:
    lines = export(pretrained[0], tmp_path / "out", "torch-export")
    assert "  not exported: mask token and decoder (graphs have the encoder only)" in lines


def test_a_graph_export_of_a_fine_tuned_classifier_gives_logits(
    classified: tuple[Path, ClassificationStage], tmp_path: Path
) -> None:
    run, stage = classified
    lines = export(run, tmp_path / "out", "torch-export")
    assert "feature maps of all stages, and logits, for images of 16x16 pixels" in lines[1]
    assert not any("not exported" in line for line in lines)
    description = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert description["outputs"][-1] == {
        "name": "logits",
        "classes": ["circle", "square", "stripe"],
    }
    *_, logits = torch.export.load(tmp_path / "out" / "model.pt2").module()(
        torch.ones(2, 3, 16, 16)
    )
    with torch.no_grad():
        expected = stage.model.eval()(torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "file"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")])
def test_a_graph_export_reports_its_difference(
    encoder_directory: Path, tmp_path: Path, form: Any, file: str
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    lines = export(encoder_directory, tmp_path / "out", form)
    assert file in lines[1]
    assert "16x16 pixels" in lines[1]
    assert float(lines[-1].split()[-1]) < 1e-5
    assert (tmp_path / "out" / file).is_file()
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["input"]["mean"] == [
        0.4,
        0.5,
        0.6,
    ]


def test_the_command_exports_dynamic_sizes_for_graphs(
    encoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(encoder_directory), str(tmp_path / "out"), "--any-size"]
    assert main([*arguments, "--format", "torch-export"]) == 0
    assert "images of any size" in capsys.readouterr().out
    assert main([*arguments, "--format", "timm"]) == 2
    assert "any_size is for the formats onnx and torch-export" in capsys.readouterr().err
