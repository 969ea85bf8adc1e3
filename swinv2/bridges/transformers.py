"""Hugging Face transformers: folders that its classes load, written and read.

One file cannot be loaded by several classes without a missing or an unexpected key, so an export
has a folder for each: the encoder (``Swinv2Model``), ``backbone`` (``Swinv2Backbone``, which has no
final norm), with a decoder ``masked-image-modeling`` (``Swinv2ForMaskedImageModeling``) and with a
classifier ``image-classification`` (``Swinv2ForImageClassification``). Writing and reading need no
transformers; where it is installed, it has to agree before an export is kept.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import (
    BridgeError,
    Classifier,
    Imported,
    MaskedImageHead,
    read_checkpoint,
    read_json,
)
from swinv2.bridges.conversion import (
    RECORD,
    Found,
    assemble,
    checked_head,
    classifier_shapes,
    convert,
    decoder_shapes,
)
from swinv2.bridges.layer_names import refuse_other_models, without_buffers
from swinv2.bridges.sizes import PretrainedWindows, given_sizes
from swinv2.bridges.transformers_layout import (
    FOLDERS,
    WEIGHTS_FILE,
    ModelClass,
    layout_of,
    obstacles,
    read_their_config,
    refuse_other_configs,
    split,
    transformers_config,
)
from swinv2.bridges.verification import (
    Report,
    check_read_back,
    check_transformers_export,
    compare_read_back,
    compare_transformers,
    ignore,
)
from swinv2.config import Pair, SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2
from swinv2.weights import write_tensors

_CONFIG_FILE = "config.json"
_SHARDS_FILE = "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"
_PROCESSOR_FILE = "preprocessor_config.json"
_README_FILE = "README.md"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as the file stores it


def to_transformers(encoder: SwinV2) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of ``Swinv2Model``, on the CPU.

    Raises:
        BridgeError: transformers has no such model.
    """
    transformers_config(encoder)
    return convert(encoder, split)


def to_transformers_masked(encoder: SwinV2, head: MaskedImageHead) -> dict[str, Tensor]:
    """Return all tensors under the names of ``Swinv2ForMaskedImageModeling``, on the CPU.

    Raises:
        BridgeError: transformers has no such model, or the head is not one of this encoder.
    """
    height, width = encoder.config.image_size
    stride = encoder.strides[-1]
    if height != width or height % stride:
        raise BridgeError(
            "transformers' Swinv2ForMaskedImageModeling decodes square images of a multiple of "
            f"{stride} pixels, not {height}x{width}: set another image_size, or leave the head out."
        )
    layout = layout_of("Swinv2ForMaskedImageModeling")
    added = {
        f"{layout.mask}": head.mask_token.reshape(1, 1, -1),
        "decoder.0.weight": head.weight,
        "decoder.0.bias": head.bias,
    }
    return {
        **{layout.prefix + name: tensor for name, tensor in to_transformers(encoder).items()},
        **checked_head(added, decoder_shapes(encoder.config, layout)),
    }


def to_transformers_classifier(encoder: SwinV2, classifier: Classifier) -> dict[str, Tensor]:
    """Return all tensors under the names of ``Swinv2ForImageClassification``, on the CPU.

    Raises:
        BridgeError: transformers has no such model, or the classifier is not one of this encoder.
    """
    layout = layout_of("Swinv2ForImageClassification")
    added = {
        f"{layout.classifier}weight": classifier.weight,
        f"{layout.classifier}bias": classifier.bias,
    }
    shapes = classifier_shapes(encoder.config, layout.classifier, len(classifier.bias))
    return {
        **{layout.prefix + name: tensor for name, tensor in to_transformers(encoder).items()},
        **checked_head(added, shapes),
    }


def export_transformers(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    head: MaskedImageHead | None = None,
    classifier: Classifier | None = None,
    classes: Sequence[str] = (),
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write ``encoder`` as folders that transformers loads with no missing and no unexpected key.

    ``path`` is for ``Swinv2Model`` (and ``AutoModel``), ``path/backbone`` for ``Swinv2Backbone``,
    with ``head`` ``path/masked-image-modeling`` for ``Swinv2ForMaskedImageModeling``, and with
    ``classifier`` ``path/image-classification`` for ``Swinv2ForImageClassification``. Each also
    describes how its images are prepared (``ViTImageProcessor``), and ``README.md`` has the lines
    that load them. Before the folder takes its place it is read back; transformers, where it is
    installed, has to compute the same from it.

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        head: mask token and decoder.
        classifier: a linear head on average-pooled features.
        classes: names of its classes, if they have some.
        images: normalised (batch, channels, height, width), to compare features on; by default a
            chart.
        report: is told how far they are apart.

    Raises:
        BridgeError: transformers has no such model, or computes something else.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    config = transformers_config(encoder) | {RECORD: asdict(encoder.config)}
    contents = _contents(encoder, config, head, classifier, classes)
    with atomic_folder(path, may_replace=is_transformers_export) as folder:
        for name, (described, tensors) in contents.items():
            place = folder / FOLDERS[name]
            _write_model(place, name, described, tensors)
            _write_processor(place, encoder.config, mean, std)
        text = _readme(encoder.config, tuple(contents))
        (folder / _README_FILE).write_text(text, encoding="utf-8")
        back = import_transformers(folder).encoder
        check_read_back(encoder, back)
        if find_spec("transformers") is None:
            report("not compared: transformers is not installed (pip install 'simmim[export]')")
            report(compare_read_back(encoder, back, images))
        else:
            check_transformers_export(folder)
            compare_transformers(
                folder, encoder, head=head, classifier=classifier, images=images, report=report
            )
    return Path(path)


def import_transformers(
    path: str | os.PathLike[str],
    *,
    image_size: int | Pair | None = None,
    window_size: int | Pair | None = None,
    pretrained_window_sizes: PretrainedWindows = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Imported:
    """Read a folder that ``save_pretrained`` of a Swin Transformer V2 class wrote.

    ``config.json`` tells every size and which class it is: one of ``Swinv2Model``,
    ``Swinv2Backbone``, ``Swinv2ForMaskedImageModeling`` and ``Swinv2ForImageClassification``. A
    backbone has no final norm; ours starts with ones and zeros then, as `Imported.fresh` tells.

    Args:
        path: with config.json and model.safetensors, in one file or in shards, or
            pytorch_model.bin.
        image_size: (height, width) in pixels; here and below, what contradicts config.json is
            refused.
        window_size: (height, width) in tokens.
        pretrained_window_sizes: of each stage, in tokens; "same" for the present ones.
        mean: of each channel; by default what preprocessor_config.json says, or ImageNet's.
        std: of each channel, in the same way.

    Raises:
        BridgeError: it is of another model, a field asks for what this encoder has not, a tensor is
            missing, unexpected or misshapen, or reading a file would run code.
    """
    folder = Path(path)
    content = read_json(folder / _CONFIG_FILE, "give a folder that save_pretrained wrote")
    given = given_sizes(image_size, window_size, pretrained_window_sizes)
    imported = assemble(_find(folder, content), given, mean=mean, std=std)
    problems = obstacles(imported.encoder.config)
    if problems:
        raise BridgeError(
            f"{folder / _CONFIG_FILE}: at its image_size {content.get('image_size')} and "
            f"window_size {content.get('window_size')} this encoder computes something else than "
            "transformers; change them there if other sizes will do:\n  " + "\n  ".join(problems)
        )
    return imported


def _find(folder: Path, content: Mapping[str, Any]) -> Found:
    """Read what stands beside a ``config.json`` of that content."""
    config_source = str(folder / _CONFIG_FILE)
    refuse_other_configs(content, config_source)
    source, named = _read_weights(folder)
    tensors, dropped = without_buffers(named)
    refuse_other_models(tensors, source, "transformers")
    told = read_their_config(content, tensors.keys(), config_source)
    mean, std = _read_processor(folder / _PROCESSOR_FILE)
    features = told.architecture["embed_dim"] * 2 ** (len(told.architecture["depths"]) - 1)
    norm = {"norm.weight": torch.ones(features), "norm.bias": torch.zeros(features)}
    return Found(
        source=source,
        tensors=tensors,
        dropped=dropped,
        layout=layout_of(told.model),
        architecture=told.architecture,
        known=[told.sizes],
        drop_path=told.drop_path,
        recorded=content.get(RECORD),
        num_classes=told.num_classes,
        mean=mean,
        std=std,
        classes=told.classes if told.num_classes else (),
        fresh=norm if told.model == "Swinv2Backbone" else None,
    )


def is_transformers_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_transformers` wrote, and holds nothing else."""
    files = {_CONFIG_FILE, WEIGHTS_FILE, _PROCESSOR_FILE}
    places = {place for name, place in FOLDERS.items() if name != "Swinv2Model"}
    names = {place.name for place in path.iterdir()} if path.is_dir() else set()
    required = {_CONFIG_FILE, WEIGHTS_FILE, FOLDERS["Swinv2Backbone"]}
    if not required <= names <= files | places | {_README_FILE}:
        return False
    inside = {part.name for name in names & places for part in (path / name).iterdir()}
    if not inside <= files:
        return False
    try:
        content = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("model_type") == "swinv2"


def _contents(
    encoder: SwinV2,
    config: Mapping[str, Any],
    head: MaskedImageHead | None,
    classifier: Classifier | None,
    classes: Sequence[str],
) -> dict[ModelClass, tuple[Mapping[str, Any], dict[str, Tensor]]]:
    """Return config and tensors of each class that is written."""
    tensors = to_transformers(encoder)
    backbone = {name: part for name, part in tensors.items() if not name.startswith("layernorm.")}
    stages = [f"stage{index + 1}" for index in range(len(encoder.config.depths))]
    contents: dict[ModelClass, tuple[Mapping[str, Any], dict[str, Tensor]]] = {
        "Swinv2Model": (config, tensors),
        "Swinv2Backbone": ({**config, "out_features": stages}, backbone),
    }
    if head is not None:
        contents["Swinv2ForMaskedImageModeling"] = (config, to_transformers_masked(encoder, head))
    if classifier is not None:
        count = len(classifier.bias)
        if classes and len(classes) != count:
            raise BridgeError(
                f"there are {len(classes)} names for {count} classes: give one for each, or none."
            )
        names = list(classes) or [f"LABEL_{number}" for number in range(count)]
        labels = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
        contents["Swinv2ForImageClassification"] = (
            {**config, **labels},
            to_transformers_classifier(encoder, classifier),
        )
    return contents


def _write_model(
    folder: Path, architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    folder.mkdir(exist_ok=True)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    content = {"architectures": [architecture], **config}
    if len(dtypes) == 1:
        content["dtype"] = dtypes.pop()
    write_tensors(folder / WEIGHTS_FILE, tensors)
    _write_json(folder / _CONFIG_FILE, content)


def _write_processor(
    folder: Path, config: SwinV2Config, mean: Sequence[float], std: Sequence[float]
) -> None:
    height, width = config.image_size
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in mean],
        "image_std": [float(value) for value in std],
    }
    _write_json(folder / _PROCESSOR_FILE, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Return where the tensors of a folder stand, for messages, and all of them by name."""
    entries = ("state_dict", "model")
    shards = folder / _SHARDS_FILE
    if (folder / WEIGHTS_FILE).is_file() or not shards.is_file():
        pickled = not (folder / WEIGHTS_FILE).is_file() and (folder / _PICKLE_FILE).is_file()
        checkpoint = read_checkpoint(folder / (_PICKLE_FILE if pickled else WEIGHTS_FILE), entries)
        return checkpoint.source, checkpoint.tensors
    places = read_json(shards, "copy the folder again").get("weight_map")
    files = sorted(set(places.values())) if isinstance(places, Mapping) else []
    if not files or any(Path(str(name)).name != name for name in files):
        raise BridgeError(f"{shards} does not name files beside it: copy the folder again.")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read_checkpoint(folder / name, entries).tensors
    return str(shards), tensors


def _read_processor(file: Path) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std of each channel, for images in [0, 1], where the file tells them."""
    if not file.is_file():
        return None, None
    content = read_json(file, "copy it again, or remove it and give mean and std")
    if not content.get("do_normalize", True):
        raise BridgeError(
            f"{file} normalises no images (do_normalize is false): give mean and std."
        )
    factor = content.get("rescale_factor", 1 / 255)
    if not content.get("do_rescale", True) or factor != 1 / 255:
        raise BridgeError(
            f"{file} scales images by rescale_factor {factor!r}, and here mean and std are for "
            "images in [0, 1]: set do_rescale true and rescale_factor 1/255, and scale them too."
        )
    return content.get("image_mean"), content.get("image_std")


def _readme(config: SwinV2Config, classes: Sequence[ModelClass]) -> str:
    blocks = "\n".join(
        f"```python\nfrom transformers import AutoImageProcessor, {name}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{FOLDERS[name]}")\n'
        f'model = {name}.from_pretrained("{FOLDERS[name]}")\n```\n'
        for name in classes
    )
    height, width = config.image_size
    options = ['return_tensors="pt"']
    resizes = "resizes and "
    if config.in_channels not in (1, 3):
        options.append('input_data_format="channels_last"')
    if config.in_channels > 4:  # which Pillow cannot resize
        options.append("do_resize=False")
        resizes = ""
    return f"""# Swin Transformer V2 for transformers

In this folder (transformers 5), for each class that it holds:

{blocks}
`model(**processor(images=image, {", ".join(options)}))` takes images of
{width}x{height} pixels and {config.in_channels} channels, which the processor \
{resizes}normalises.
"""
