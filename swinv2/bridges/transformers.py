"""Export to, and import from, the Swin Transformer V2 classes of Hugging Face transformers.

Several classes cannot load one file without missing or unexpected keys, so an export has a folder
for each: the encoder (`Swinv2Model`), `backbone` (`Swinv2Backbone`, which has no final norm), with
a decoder `masked-image-modeling` (`Swinv2ForMaskedImageModeling`) and with a classifier
`image-classification` (`Swinv2ForImageClassification`). Exporting and importing do not need
transformers; if it is installed, its outputs are compared before an export is kept.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import (
    BridgeError,
    ClassifierHead,
    ImportedEncoder,
    MaskedImageHead,
    read_json,
)
from swinv2.bridges.conversion import (
    CONFIG_KEY,
    ParsedCheckpoint,
    assemble,
    checked_head,
    class_names,
    classifier_shapes,
    convert,
    decoder_shapes,
    describe_beside,
    fresh_norm,
)
from swinv2.bridges.importing.options import NO_OPTIONS, ImportOptions
from swinv2.bridges.importing.reading import (
    CheckpointContents,
)
from swinv2.bridges.layer_names import check_is_swinv2, split_off_buffers
from swinv2.bridges.preprocessing import (
    WHOLE_PICTURES,
    Preparation,
    least_side,
    processor_config,
    sentences,
)
from swinv2.bridges.transformers_layout import (
    FOLDERS,
    WEIGHTS_FILE,
    ModelClass,
    check_config_is_swinv2,
    layout_of,
    parse_config,
    rename_tensor,
    transformers_config,
    unsupported,
)
from swinv2.bridges.verification import (
    Report,
    check_read_back,
    check_transformers_export,
    compare_read_back,
    compare_transformers,
    ignore,
)
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2
from swinv2.json_file import load_json
from swinv2.weights import write_tensors

_CONFIG_FILE = "config.json"
_SHARDS_FILE = "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"
_PROCESSOR_FILE = "preprocessor_config.json"
_README_FILE = "README.md"
_NORM_TARGET = "simmim_norm_target"
"""Key of config.json: whether the decoder predicts normalised pixels. transformers ignores it."""


def to_transformers(encoder: SwinV2) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of `Swinv2Model`, on the CPU.

    Raises:
        BridgeError: transformers cannot compute it.
    """
    transformers_config(encoder)
    return convert(encoder, rename_tensor)


def to_transformers_masked(encoder: SwinV2, head: MaskedImageHead) -> dict[str, Tensor]:
    """Return all tensors under the names of `Swinv2ForMaskedImageModeling`, on the CPU.

    Raises:
        BridgeError: transformers cannot compute it, or the head does not fit the encoder.
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


def to_transformers_classifier(encoder: SwinV2, classifier: ClassifierHead) -> dict[str, Tensor]:
    """Return all tensors under the names of `Swinv2ForImageClassification`, on the CPU.

    Raises:
        BridgeError: transformers cannot compute it, or the classifier does not fit the encoder.
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
    classifier: ClassifierHead | None = None,
    classes: Sequence[str] = (),
    preparation: Preparation = WHOLE_PICTURES,
    images: Tensor | None = None,
    report: Report = ignore,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write `encoder` as folders that transformers loads without missing or unexpected keys.

    `path` is for `Swinv2Model` (and `AutoModel`), `path/backbone` for `Swinv2Backbone`,
    with `head` `path/masked-image-modeling` for `Swinv2ForMaskedImageModeling`, and with
    `classifier` `path/image-classification` for `Swinv2ForImageClassification`. Each also
    describes how its pictures are prepared (`PerceiverImageProcessor`), and `README.md` has the
    lines that load them. Before the folder takes its place it is read back; transformers, where it
    is installed, has to compute the same from it.

    Args:
        encoder: not changed; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        head: mask token and decoder.
        classifier: a linear head on average-pooled features.
        classes: names of its classes, if known.
        preparation: how pictures are prepared.
        images: normalised (batch, channels, height, width), to compare features on; by default a
            zone plate.
        report: called with a line on each comparison.
        check: called with the written folder before it takes its place, where transformers is
            installed; if it raises, `path` stays as it was.

    Raises:
        BridgeError: transformers cannot compute it, a head does not fit, or the installed
            transformers computes something else.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    config = transformers_config(encoder) | {CONFIG_KEY: asdict(encoder.config)}
    contents = _contents(encoder, config, head, classifier, classes)
    with atomic_folder(path, may_replace=is_transformers_export) as folder:
        for name, (described, tensors) in contents.items():
            place = folder / FOLDERS[name]
            _write_model(place, name, described, tensors)
            content = processor_config(encoder.config, preparation, mean, std)
            _write_json(place / _PROCESSOR_FILE, content)
        text = _readme(encoder.config, preparation, tuple(contents))
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
            if check is not None:
                check(folder)
    return Path(path)


def import_transformers(
    path: str | os.PathLike[str],
    options: ImportOptions = NO_OPTIONS,
) -> ImportedEncoder:
    """Read a folder written by `save_pretrained` of a Swin Transformer V2 class.

    `config.json` has every size and the class, one of `Swinv2Model`,
    `Swinv2Backbone`, `Swinv2ForMaskedImageModeling` and `Swinv2ForImageClassification`. A
    backbone has no final norm; ours then starts with ones and zeros (`ImportedEncoder.fresh`).

    Args:
        path: with config.json and model.safetensors, in one file or in shards, or
            pytorch_model.bin.
        options: sizes must not contradict config.json.

    Raises:
        BridgeError: it is another model, a field asks for something this encoder lacks, a tensor is
            missing, unexpected or of a wrong shape, or reading a file would run code.
    """
    folder = Path(path)
    content = read_json(folder / _CONFIG_FILE, "give a folder written by save_pretrained")
    imported = assemble(_parse(folder, content, options), options)
    problems = unsupported(imported.encoder.config)
    if problems:
        raise BridgeError(
            f"{folder / _CONFIG_FILE}: at its image_size {content.get('image_size')} and "
            f"window_size {content.get('window_size')} this encoder computes something different "
            "from transformers; set other sizes there if they are acceptable:\n  "
            + "\n  ".join(problems)
        )
    return imported


def _parse(folder: Path, content: Mapping[str, Any], options: ImportOptions) -> ParsedCheckpoint:
    """Parse a folder whose `config.json` has this content."""
    config_source = str(folder / _CONFIG_FILE)
    check_config_is_swinv2(content, config_source)
    read = _read_weights(folder, options)
    tensors, dropped = split_off_buffers(read.tensors)
    check_is_swinv2(tensors, read.source, "transformers")
    parsed = parse_config(content, tensors.keys(), config_source)
    mean, std = _read_processor(folder / _PROCESSOR_FILE)
    norm_target = content.get(_NORM_TARGET)
    return ParsedCheckpoint(
        source=read.source,
        tensors=tensors,
        dropped=dropped,
        layout=layout_of(parsed.model),
        architecture=parsed.architecture,
        sizes=[parsed.sizes],
        drop_path=parsed.drop_path,
        own_config=content.get(CONFIG_KEY),
        norm_target=norm_target if isinstance(norm_target, bool) else None,
        num_classes=parsed.num_classes,
        mean=mean,
        std=std,
        classes=parsed.classes if parsed.num_classes else (),
        fresh=fresh_norm(parsed.architecture) if parsed.model == "Swinv2Backbone" else None,
        notes=(*read.notes, *describe_beside(read.beside)),
    )


def is_transformers_export(path: Path) -> bool:
    """Return whether `path` was written by `export_transformers` and holds nothing else."""
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
        content = load_json(path / _CONFIG_FILE)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("model_type") == "swinv2"


def _contents(
    encoder: SwinV2,
    config: Mapping[str, Any],
    head: MaskedImageHead | None,
    classifier: ClassifierHead | None,
    classes: Sequence[str],
) -> dict[ModelClass, tuple[Mapping[str, Any], dict[str, Tensor]]]:
    """Return the config and the tensors of each class."""
    tensors = to_transformers(encoder)
    backbone = {name: part for name, part in tensors.items() if not name.startswith("layernorm.")}
    stages = [f"stage{index + 1}" for index in range(len(encoder.config.depths))]
    contents: dict[ModelClass, tuple[Mapping[str, Any], dict[str, Tensor]]] = {
        "Swinv2Model": (config, tensors),
        "Swinv2Backbone": ({**config, "out_features": stages}, backbone),
    }
    if head is not None:
        known = {} if head.norm_target is None else {_NORM_TARGET: head.norm_target}
        masked = to_transformers_masked(encoder, head)
        contents["Swinv2ForMaskedImageModeling"] = ({**config, **known}, masked)
    if classifier is not None:
        names = class_names(classifier, classes)
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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_weights(folder: Path, options: ImportOptions) -> CheckpointContents:
    """Return the tensors of a folder, in one file or in shards."""
    shards = folder / _SHARDS_FILE
    if (folder / WEIGHTS_FILE).is_file() or not shards.is_file():
        pickled = not (folder / WEIGHTS_FILE).is_file() and (folder / _PICKLE_FILE).is_file()
        file = folder / (_PICKLE_FILE if pickled else WEIGHTS_FILE)
        return options.read(file)
    places = read_json(shards, "copy the folder again").get("weight_map")
    files = sorted(set(places.values())) if isinstance(places, Mapping) else []
    if not files or any(Path(str(name)).name != name for name in files):
        raise BridgeError(f"{shards} does not name files next to it: copy the folder again.")
    parts = [options.read(folder / name) for name in files]
    return replace(
        parts[0],
        source=str(shards),
        tensors={name: one for part in parts for name, one in part.tensors.items()},
        beside={name: one for part in parts for name, one in part.beside.items()},
    )


def _read_processor(file: Path) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std of each channel, for images in [0, 1]; None if they are not known."""
    if not file.is_file():
        return None, None
    content = read_json(file, "copy it again, or remove it and give mean and std")
    if not content.get("do_normalize", True):
        raise BridgeError(
            f"{file} does not normalise images (do_normalize is false): give mean and std."
        )
    factor = content.get("rescale_factor", 1 / 255)
    as_they_are = factor == 1  # floating point, as our exports write it
    if factor not in (1, 1 / 255, 1 / 65535) or content.get("do_rescale", True) == as_they_are:
        raise BridgeError(
            f"{file} does not scale images to [0, 1] (rescale_factor {factor!r}): set do_rescale "
            "to true and rescale_factor to 1/255, and scale mean and std to match."
        )
    return content.get("image_mean"), content.get("image_std")


def _readme(config: SwinV2Config, preparation: Preparation, classes: Sequence[ModelClass]) -> str:
    blocks = "\n".join(
        f"```python\nfrom transformers import AutoImageProcessor, {name}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{FOLDERS[name]}")\n'
        f'model = {name}.from_pretrained("{FOLDERS[name]}")\n```\n'
        for name in classes
    )
    height, width = config.image_size
    options = ['return_tensors="pt"']
    resizes = "resizes and "
    if not _takes_pictures(config, preparation):
        resizes = ""
        options += ["do_center_crop=False", "do_resize=False", 'input_data_format="channels_last"']
    channels = f"{config.in_channels} channel{'' if config.in_channels == 1 else 's'}"
    return f"""# Swin Transformer V2 for transformers

In this folder (transformers 5), for each class:

{blocks}
`model(**processor(images=image, {", ".join(options)}))` takes images of
{width}x{height} pixels and {channels}, which the processor \
{resizes}normalises.

{_how_exact(config, preparation)}
"""


def _takes_pictures(config: SwinV2Config, preparation: Preparation) -> bool:
    """Return whether the processor crops and resizes: pictures of 8 bits, and no others."""
    return config.in_channels in (1, 3) and preparation.largest == 255


def _how_exact(config: SwinV2Config, preparation: Preparation) -> str:
    """Return sentences on the preparation, and on where the processor differs from it."""
    text = sentences(config, preparation)
    height, width = config.image_size
    if height != width:
        text += (
            " The processor squashes whole pictures instead: transformers has none that crops to "
            "this shape, so crop them first."
        )
    elif _takes_pictures(config, preparation):
        text += (
            " The processor does the same to rounding, but for Exif, transparency and 16 bits: "
            "open pictures with `PIL.ImageOps.exif_transpose`, on a white background, grey ones of "
            "16 bits, which it would clip, with "
            '`point(lambda value: value / 257 + 0.5).convert("L")`, and other grey ones for one '
            'channel with `convert("L")`.'
        )
        least = least_side(preparation)
        if least > 1:
            text += (
                f" Pictures with fewer than {least} pixels on a side are black to it, since its "
                "crop of them is empty: leave them out."
            )
    else:
        text += (
            " The processor resizes pictures of 8 bits with 1 or 3 channels only: crop and resize "
            "others first, and give it float arrays (rows, columns, channels) with the options "
            "above."
        )
    return text
