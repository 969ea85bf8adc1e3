"""The commands `simmim export` and `simmim import`: what they take."""

# ruff: noqa: PLC0415 (what converts imports torch; help and mistakes need none)
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from data_prep.channels import read_names
from data_prep.format.command_line import ONE_OF
from simmim.export.formats import Format, ImportFormat, WeightsChoice


def export(
    run: Path,
    destination: Path,
    /,
    *,
    format: Format = "native",  # noqa: A002 (the name of the option)
    any_size: bool = False,
    best: Annotated[bool | None, ONE_OF, Parameter(negative="--last")] = None,
    image_size: str | None = None,
    window_size: str | None = None,
) -> int:
    """Export the encoder of a run's best checkpoint, or of an encoder directory.

    The native format includes the head of a fine-tuned model. transformers and timm are the formats
    of these libraries; reference is a checkpoint of the published code; onnx and torch-export are
    graphs that run without this code, of a fine-tuned classifier with its logits.

    Args:
        run: Run folder, checkpoint or encoder directory.
        destination: Output folder.
        format: Format to write.
        any_size: onnx and torch-export: dynamic height and width, not the encoder's size.
        best: Checkpoint of the run. Default: the best, or the last if none is known.
        image_size: Transfer to images of this size in pixels: N, or HEIGHT,WIDTH.
        window_size: Transfer to windows of this size in tokens: N, or HEIGHT,WIDTH.
    """
    image, window = _size("--image-size", image_size), _size("--window-size", window_size)
    from simmim.export.export import Sizes
    from simmim.export.export import export as export_encoder

    sizes = Sizes(image_size=image, window_size=window)
    lines = export_encoder(run, destination, format, any_size=any_size, best=best, sizes=sizes)
    print("\n".join(lines))
    return 0


def import_(
    source: Path,
    destination: Path,
    /,
    *,
    format: ImportFormat | None = None,  # noqa: A002 (the name of the option)
    weights: WeightsChoice | None = None,
    key: str | None = None,
    architecture: str | None = None,
    image_size: str | None = None,
    window_size: str | None = None,
    pretrained_windows: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    channels: str | None = None,
) -> int:
    """Convert a third-party Swin Transformer V2 checkpoint to an encoder directory.

    Sizes are read from the file; give those that it does not record. Code in it is never run.

    Args:
        source: Checkpoint, a file or folder.
        destination: Output folder.
        format: reference: the published code (Swin Transformer, SimMIM); timm: its swinv2 models;
            transformers: a folder written by save_pretrained of a Swinv2 class; torchvision: its
            swin_v2 models; mmpretrain: its SwinTransformerV2. Default: detected.
        weights: Averaged or raw weights of a file that has both. Default: averaged, if there are.
        key: Entry of the file, or prefix of names, of one of several models: student, teacher, ...
        architecture: Name of the model in timm, which implies all sizes.
        image_size: Training image size in pixels: N, or HEIGHT,WIDTH.
        window_size: Window size in tokens: N, or HEIGHT,WIDTH.
        pretrained_windows: Pretraining window of each stage in tokens: N,N,..., or same for the
            present windows.
        mean: Mean per channel, of images in [0, 1]: X,X,... Default: the file's, or ImageNet's.
        std: Standard deviation per channel: X,X,... Default: the file's, or ImageNet's.
        channels: Names of the channels: NAME,NAME,... Default: the file's, or red,green,blue of
            three, gray of one.
    """
    image, window = _size("--image-size", image_size), _size("--window-size", window_size)
    windows = _windows(pretrained_windows)
    names = None if channels is None else read_names(channels)
    means, deviations = _numbers("--mean", mean), _numbers("--std", std)
    from simmim.export.import_encoder import import_encoder
    from swinv2.bridges.importing.options import ImportOptions

    options = ImportOptions(
        architecture=architecture,
        image_size=image,
        window_size=window,
        pretrained_window_sizes=windows,
        mean=means,
        std=deviations,
        weights=weights,
        key=key,
    )
    print("\n".join(import_encoder(source, destination, format, options, channels=names)))
    return 0


def _size(name: str, text: str | None) -> int | tuple[int, int] | None:
    try:
        match [int(part) for part in text.split(",")] if text is not None else []:
            case []:
                return None
            case [side]:
                return side
            case [height, width]:
                return height, width
    except ValueError:
        pass
    raise ValueError(f"{name} is {text!r}; give a number, or height,width.")


def _windows(text: str | None) -> list[int] | Literal["same"] | None:
    if text is None or text == "same":
        return "same" if text else None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"--pretrained-windows is {text!r}; give one number per stage, or same."
        raise ValueError(message) from None


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give one number per channel: X,X,...") from None
