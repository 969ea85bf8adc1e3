"""SimMIM self-supervised pretraining of a Swin Transformer V2 encoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simmim.api import evaluate, finetune, load_run, pretrain
    from simmim.method.masking import random_mask
    from simmim.method.model import SimMIM

    __version__: str

__all__ = [
    "SimMIM",
    "__version__",
    "evaluate",
    "finetune",
    "load_run",
    "pretrain",
    "random_mask",
]


def __getattr__(name: str) -> Any:
    # ruff: noqa: PLC0415 (on first use, so that a command line answers without loading torch)
    match name:
        case "SimMIM":
            from simmim.method.model import SimMIM

            return SimMIM
        case "random_mask":
            from simmim.method.masking import random_mask

            return random_mask
        case "evaluate" | "finetune" | "load_run" | "pretrain":
            from simmim import api

            return getattr(api, name)
        case "__version__":
            from importlib.metadata import version

            return version("simmim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
