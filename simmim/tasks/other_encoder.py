"""The directory of an encoder that is not a SwinV2: its weights, and a description of its class.

Written at the end of a training, and by the native export, in place of an encoder directory. It is
loaded by the class of the encoder itself, and refused by name where a SwinV2 is needed. The
checkpoints of such an encoder have its description too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simmim.engine.checkpoint.directory import load_state
from simmim.engine.checkpoint.resume import ENCODER, read_weights
from simmim.method.encoder_protocol import ImageEncoder
from simmim.tasks.trained import below
from swinv2 import SwinV2, VideoSwinV2, save_encoder
from swinv2.atomic import atomic_folder
from swinv2.config_file import README_FILE, WEIGHTS_FILE, Provenance, read_provenance
from swinv2.json_file import load_json
from swinv2.method_file import MethodTensors
from swinv2.weights import read_tensors, write_tensors

OTHER_FILE = "encoder.json"
"""Description of the encoder; an encoder directory has `config.json` instead."""
DESCRIBED = ("image_size", "in_channels", "patch_size", "embed_dim", "num_features", "strides")
"""Members of an encoder that its description has."""
PROVENANCE = tuple(field.name for field in fields(Provenance))


@dataclass(frozen=True, kw_only=True)
class OtherEncoder:
    """Weights of an encoder that is not a SwinV2."""

    description: Mapping[str, Any]
    """Class, sizes, mean and std; see `describe`."""
    tensors: Mapping[str, Tensor]
    """Its state dict."""
    provenance: Provenance

    @property
    def name(self) -> str:
        """Name of its class."""
        return _class_name(self.description)

    def save(self, path: Path) -> None:
        """Write the weights and their description as a folder.

        Args:
            path: a new or empty folder, or one written by this function, which is replaced.
        """
        described = {**self.description, "provenance": dict(vars(self.provenance))}
        with atomic_folder(path, may_replace=lambda old: (old / OTHER_FILE).is_file()) as folder:
            write_tensors(folder / WEIGHTS_FILE, self.tensors)
            (folder / OTHER_FILE).write_text(_to_json(described), encoding="utf-8")
            (folder / README_FILE).write_text(README.format(name=self.name), encoding="utf-8")


def save_any_encoder(
    encoder: ImageEncoder,
    path: Path,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: tuple[str, ...] | None = None,
    provenance: Provenance,
    method: MethodTensors | None = None,
) -> None:
    """Write an encoder directory of a SwinV2, or else the folder of an `OtherEncoder`.

    Of the latter, what was trained beside the encoder, `method`, is left out.
    """
    if isinstance(encoder, SwinV2):
        described: dict[str, Any] = {"mean": mean, "std": std, "channels": channels}
        save_encoder(encoder, path, **described, provenance=provenance, method=method)
        return
    assert isinstance(encoder, nn.Module)
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    described = describe(encoder, mean, std, channels)
    OtherEncoder(description=described, tensors=tensors, provenance=provenance).save(path)


def describe(
    encoder: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Return class and sizes of an encoder, with mean, std and channels of its images."""
    kind = type(encoder)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        **{name: getattr(encoder, name) for name in DESCRIBED},
        "mean": mean,
        "std": std,
        "channels": channels,
    }


def checkpoint_notes(
    encoder: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: tuple[str, ...] | None,
) -> dict[str, str]:
    """Return the description that checkpoints of an encoder contain, by file name.

    Empty for a SwinV2, which the recipe describes. Without it an export could not name the class
    of the weights.
    """
    if isinstance(encoder, SwinV2 | VideoSwinV2):
        return {}
    return {OTHER_FILE: _to_json(describe(encoder, mean, std, channels))}


def read_other_encoder(checkpoint: Path | None, directory: Path) -> OtherEncoder | None:
    """Read the encoder of a checkpoint, or of a directory; None if it is a SwinV2.

    Args:
        checkpoint: a checkpoint; None for the weights in the directory.
        directory: the encoder directory of its run, which may not exist yet.

    Raises:
        ValueError: a file is damaged.
    """
    # Checkpoints of earlier versions have no description.
    places = [place for place in (checkpoint, directory) if place is not None]
    folder = next((place for place in places if (place / OTHER_FILE).is_file()), None)
    if folder is None:
        return None
    description = _read_description(folder / OTHER_FILE)
    recorded = description.pop("provenance", {})
    if checkpoint is None:
        tensors = read_tensors(directory / WEIGHTS_FILE)
        provenance = Provenance(**{name: recorded.get(name) for name in PROVENANCE})
    else:
        tensors = below(read_weights(checkpoint), f"{ENCODER}.")
        state = load_state(checkpoint)
        provenance = Provenance(
            step=state.step, samples_seen=state.cursor, recipe_hash=state.recipe_hash
        )
    return OtherEncoder(description=description, tensors=tensors, provenance=provenance)


def _to_json(description: Mapping[str, Any]) -> str:
    return json.dumps(description, indent=2) + "\n"


def _read_description(file: Path) -> dict[str, Any]:
    """Read a description; see `describe`. One in a directory has the provenance too.

    It is checked by hand: no dataclass can declare a field called class.
    """
    try:
        found = load_json(file)
        if isinstance(found["class"], str) and isinstance(found.get("provenance", {}), dict):
            return dict(found)
        reason = "its values are of other types"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise ValueError(f"{file} is damaged ({reason}): copy it again from where it was written.")


def _class_name(description: Mapping[str, Any]) -> str:
    return str(description["class"]).rpartition(".")[2]


README = f"""# Weights of a {{name}}

`{OTHER_FILE}` names the class and has the sizes, mean and std of its images, and where the weights
come from. They are loaded by the class itself:

```python
from safetensors.torch import load_file

encoder.load_state_dict(load_file("{WEIGHTS_FILE}"))  # encoder is a {{name}}
```
"""


def other_class(path: Path) -> str | None:
    """Return the name of the class whose weights a folder has; None for any other folder."""
    try:
        return _class_name(_read_description(path / OTHER_FILE))
    except ValueError:
        return None


def exported_step(path: Path) -> int | None:
    """Return the step that the exported encoder in a folder is of, of any class; None if unknown.

    Raises:
        ValueError: the folder has no encoder, or its description is damaged.
    """
    if other_class(path) is None:
        return read_provenance(path).step
    found = _read_description(path / OTHER_FILE).get("provenance", {}).get("step")
    return found if isinstance(found, int) else None


def refuse_other_encoder(path: Path, what: str) -> None:
    """Refuse a folder with the weights of an encoder of another class.

    Args:
        path: the folder.
        what: what needs a SwinV2, the subject of the message.

    Raises:
        ValueError: it is such a folder; names the class, and where its weights are.
    """
    name = other_class(path)
    if name is None:
        return
    file, where = path / WEIGHTS_FILE, f"`simmim export {path} FOLDER` writes its weights"
    if file.is_file():
        where = f"Its weights are in {file}"
    raise ValueError(
        f"the encoder of {path} is a {name}: {what} a SwinV2. {where}, for {name}.load_state_dict."
    )
