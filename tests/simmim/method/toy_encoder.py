"""An encoder that is not a SwinV2, and a classification task on it, for the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simmim.engine.generators import seeded
from simmim.recipe import settings
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.classification.task import TASK as CLASSIFICATION
from simmim.tasks.measured import with_measured
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrained import InitialEncoder


class ToyBlock(nn.Module):
    """A residual depthwise and pointwise convolution, with a gate of two axes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.reduce = nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.ones(1, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tokens + self.gate * self.reduce(nn.functional.gelu(mixed))


class ToyEncoder(nn.Module):
    """Two blocks of convolutions at strides 2 and 4."""

    image_size = (16, 16)
    in_channels = 3
    patch_size = 2
    embed_dim = 12
    num_features = 24
    strides = (2, 4)
    map_axes = ("rows", "columns")
    drop_path = 0.0
    no_weight_decay = ("gate",)
    num_layers = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.first, self.second = ToyBlock(12), ToyBlock(24)
        self.halve = nn.Conv2d(12, 24, 2, stride=2)
        self.norm = nn.LayerNorm(24)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return self.first, self.second

    def layer_of(self, name: str) -> int:
        layers = {"stem": 0, "first": 1, "halve": 1, "second": 2, "norm": 3}
        return layers[name.split(".", maxsplit=1)[0]]

    def embed(self, images: Tensor) -> Tensor:
        return self.stem(images).permute(0, 2, 3, 1)

    def encode(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        assert drop_path_noise is None
        halved = self.halve(self.first(tokens).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(self.second(halved))


def build_toy(_: PretrainRecipe) -> ToyEncoder:
    return ToyEncoder()


class ToyClassificationStage(ClassificationStage):
    """Classification on the toy encoder; `init` is a run that has pretrained one."""

    @staticmethod
    def resolve(recipe: ClassificationRecipe) -> ClassificationRecipe:
        return with_measured(recipe)

    @staticmethod
    def load_initial(recipe: ClassificationRecipe) -> InitialEncoder[Any]:
        with seeded(recipe.training.seed):
            encoder = ToyEncoder()
        if recipe.init != "scratch":
            places = [Path(recipe.init) / "encoder", Path(recipe.init)]  # a run, or its export
            folder = next(path for path in places if (path / "model.safetensors").is_file())
            encoder.load_state_dict(load_file(folder / "model.safetensors"))
        mean, std = recipe.data.normalisation
        return InitialEncoder(encoder=encoder, mean=mean, std=std)


@settings
class ToyClassificationRecipe(ClassificationRecipe):
    """Classification on the toy encoder."""

    task: Literal["toy-classification"]  # type: ignore[assignment]


TOY_CLASSIFICATION = replace(
    CLASSIFICATION,
    name="toy-classification",
    recipe=ToyClassificationRecipe,
    load_stage=lambda: ToyClassificationStage,
)
