"""SimMIM self-supervised pretraining of a Swin Transformer V2 encoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simmim.method.masking import random_mask
    from simmim.method.model import SimMIM

__all__ = ["SimMIM", "random_mask"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that a command line answers without loading torch.
    match name:
        case "SimMIM":
            from simmim.method.model import SimMIM  # noqa: PLC0415

            return SimMIM
        case "random_mask":
            from simmim.method.masking import random_mask  # noqa: PLC0415

            return random_mask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
