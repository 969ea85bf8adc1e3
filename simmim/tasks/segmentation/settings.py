"""Settings of data that the dense stages share."""

from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD, CroppedSettings
from simmim.limits import check_shares, check_span
from simmim.recipe import settings


@settings
class DenseData(CroppedSettings):
    """Files of images, how they are read, scaled, cropped and mirrored."""

    REMEDY = "Mend or leave out these files"

    fraction: float = 1.0
    """Share of the training images that is used, above 0; a larger one holds every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: int
    """Side of the square crops that are trained on, pixels."""
    scale: tuple[float, float]
    """Factor of the image's size before the crop, from and to."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "fraction")
        check_span(self, "scale")
