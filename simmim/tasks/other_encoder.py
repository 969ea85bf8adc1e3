"""The directory of an encoder that is not a SwinV2: its weights, and a description for people.

Written at the end of a pretraining in place of an encoder directory. It is loaded by the class of
the encoder itself, and refused by name where a SwinV2 is needed.
"""

import json
from pathlib import Path

from torch import nn

from simmim.method.encoder_protocol import ImageEncoder
from swinv2 import SwinV2, save_encoder
from swinv2.atomic import atomic_folder
from swinv2.config_file import README_FILE, WEIGHTS_FILE, Provenance, read_provenance
from swinv2.json_file import load_json
from swinv2.weights import write_tensors

OTHER_FILE = "encoder.json"
"""Description of the encoder; an encoder directory has `config.json` instead."""
DESCRIBED = ("image_size", "in_channels", "patch_size", "embed_dim", "num_features", "strides")


def save_any_encoder(
    encoder: ImageEncoder,
    path: Path,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    provenance: Provenance,
) -> None:
    """Write an encoder directory of a SwinV2, or else the folder of `save_other_encoder`."""
    if isinstance(encoder, SwinV2):
        save_encoder(encoder, path, mean=mean, std=std, provenance=provenance)
    else:
        save_other_encoder(encoder, path, mean=mean, std=std, provenance=provenance)


def save_other_encoder(
    encoder: ImageEncoder,
    path: Path,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    provenance: Provenance,
) -> None:
    """Write the weights of an encoder of any class as a folder; an earlier one is replaced.

    Args:
        encoder: on any device; it is not changed.
        path: a new or empty folder, or one written by this function.
        mean: mean of each channel.
        std: standard deviation of each channel.
        provenance: steps, samples and recipe behind the weights.
    """
    assert isinstance(encoder, nn.Module)
    kind = type(encoder)
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    description = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        **{name: getattr(encoder, name) for name in DESCRIBED},
        "mean": mean,
        "std": std,
        "provenance": dict(vars(provenance)),
    }
    with atomic_folder(path, may_replace=lambda found: (found / OTHER_FILE).is_file()) as folder:
        write_tensors(folder / WEIGHTS_FILE, tensors)
        (folder / OTHER_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (folder / README_FILE).write_text(README.format(name=kind.__name__), encoding="utf-8")


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
        found = load_json(path / OTHER_FILE)
    except (OSError, ValueError):
        return None
    name = found.get("class") if isinstance(found, dict) else None
    return name.rpartition(".")[2] if isinstance(name, str) else None


def exported_step(path: Path) -> int | None:
    """Return the step that the exported encoder in a folder is of, of any class; None if unknown.

    Raises:
        ValueError: the folder has no encoder, or its description is damaged.
    """
    if other_class(path) is None:
        return read_provenance(path).step
    found = load_json(path / OTHER_FILE)["provenance"]["step"]
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
    if name is not None:
        raise ValueError(
            f"the encoder of {path} is a {name}: {what} a SwinV2. Its weights are in "
            f"{path / WEIGHTS_FILE}, for {name}.load_state_dict."
        )
