"""The encoder as a backbone of transformers' dense heads (UperNet, Mask2Former, DETR, ...).

The encoder itself runs, so that every size works: images of any shape, oblong windows, extra norms.
Each map is normalised by a LayerNorm of its own, as transformers' Swin backbone does.
`SwinV2BackboneConfig`, `SwinV2Backbone` and `CheckpointedBlock` are classes of transformers,
created on first access.

    register_backbone()
    encoder = load_encoder("encoders/mine")
    backbone = backbone_config(encoder.config, out_features=["stage1", "stage2", "stage3"])
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone))
    fill_backbone(model.backbone, encoder)

Load a folder written by `save_pretrained` of a backbone with `SwinV2Backbone.from_pretrained`
(`AutoBackbone.from_pretrained` only looks on the model hub).

`gradient_checkpointing_enable()` of the backbone, or of a model around it that has the method,
recomputes blocks in the backward. `out_features` of a backbone may be changed after it is built.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from swinv2.attention import WindowAttention
from swinv2.blocks import Block
from swinv2.config import SwinV2Config, record_windows
from swinv2.encoder import SwinV2

MODEL_TYPE = "simmim_swinv2"
FIELDS = fields(SwinV2Config)


def __getattr__(name: str) -> type[Any]:
    """Return a class by its name, so that models can be imported and pickled (PEP 562)."""
    if name == "SwinV2BackboneConfig":
        return _config_class()
    if name == "SwinV2Backbone":
        return _model_class()
    if name == "CheckpointedBlock":
        return _block_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_backbone() -> None:
    """Register the backbone with `AutoConfig` and `AutoBackbone`; repeated calls are harmless.

    Raises:
        ValueError: transformers is not installed.
    """
    config, model = _config_class(), _model_class()
    from transformers import AutoBackbone, AutoConfig  # noqa: PLC0415 - an optional part

    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    AutoBackbone.register(config, model, exist_ok=True)


def backbone_config(config: SwinV2Config, *, out_features: Sequence[str] | None = None) -> Any:
    """Return the config of a backbone with the sizes of an encoder.

    Args:
        config: config of the encoder.
        out_features: names of the maps, of stem, stage1, stage2, ...; by default all stages.

    Raises:
        ValueError: transformers is not installed, or a name is unknown.
    """
    names = [f"stage{index + 1}" for index in range(len(config.depths))]
    described = asdict(config) | {"pretrained_window_sizes": record_windows(config)}
    return _config_class()(
        **described, out_features=names if out_features is None else list(out_features)
    )


def fill_backbone(backbone: Any, encoder: SwinV2) -> None:
    """Copy the weights of an encoder into a backbone of its config.

    The norm of the last map is the encoder's own; those of the other maps are left as they are.
    """
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    final = {leaf: tensors.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    backbone.encoder.load_state_dict(tensors, strict=True)
    last = backbone.stage_names[-1]
    if last in backbone.hidden_states_norms:
        backbone.hidden_states_norms[last].load_state_dict(final, strict=True)


def encoder_from_backbone(backbone: Any) -> SwinV2:
    """Return a copy of the encoder in a backbone: the inverse of `fill_backbone`.

    Raises:
        ValueError: the backbone lacks the last map, whose norm is the encoder's.
    """
    last = backbone.stage_names[-1]
    if last not in backbone.hidden_states_norms:
        raise ValueError(
            f"the backbone has no map {last}, and so no final norm of the encoder: add it to "
            "out_features."
        )
    encoder = SwinV2(backbone.encoder.config)
    norm = backbone.hidden_states_norms[last].state_dict()
    tensors = backbone.encoder.state_dict() | {f"norm.{leaf}": norm[leaf] for leaf in norm}
    encoder.load_state_dict(tensors, strict=True)
    return encoder.eval()


@cache
def _config_class() -> type[Any]:
    _check_transformers()
    from transformers import PreTrainedConfig  # noqa: PLC0415 - an optional part
    from transformers.backbone_utils import BackboneConfigMixin  # noqa: PLC0415

    class SwinV2BackboneConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
        """Fields of `SwinV2Config`, and the maps to return (out_features or out_indices).

        Raises:
            ValueError: a size cannot work, or a map does not exist.
        """

        model_type = MODEL_TYPE
        attribute_map = {"num_channels": "in_channels", "drop_path_rate": "drop_path"}  # noqa: RUF012
        variant: str | None = None
        image_size: Any = (256, 256)
        patch_size: int = 4
        in_channels: int = 3
        embed_dim: int = 96
        depths: Any = (2, 2, 6, 2)
        num_heads: Any = (3, 6, 12, 24)
        window_size: Any = (8, 8)
        mlp_ratio: float = 4.0
        drop_path: float = 0.0
        extra_norm_every: int = 0
        pretrained_window_sizes: Any = None
        _out_features: list[str] | None = None
        _out_indices: list[int] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            config = self.encoder_config()
            names = ["stem", *(f"stage{index + 1}" for index in range(len(config.depths)))]
            kwargs |= {"stage_names": names, "hidden_size": config.num_features}
            self.stage_names = names
            self.set_output_features_output_indices(
                out_features=kwargs.pop("out_features", None),
                out_indices=kwargs.pop("out_indices", None),
            )
            super().__post_init__(**kwargs)

        def encoder_config(self) -> SwinV2Config:
            """Return the config of the encoder."""
            return SwinV2Config(**{one.name: getattr(self, one.name) for one in FIELDS})

    SwinV2BackboneConfig.__qualname__ = SwinV2BackboneConfig.__name__  # where pickle finds it
    return SwinV2BackboneConfig


@cache
def _block_class() -> type[Any]:
    _check_transformers()
    from transformers.modeling_layers import (  # noqa: PLC0415 - an optional part
        GradientCheckpointingLayer,
    )

    class CheckpointedBlock(GradientCheckpointingLayer, Block):  # type: ignore[misc]
        """A Block that `gradient_checkpointing_enable` recomputes in the backward."""

    CheckpointedBlock.__qualname__ = CheckpointedBlock.__name__
    return CheckpointedBlock


@cache
def _model_class() -> type[Any]:
    _check_transformers()
    from transformers import PreTrainedModel  # noqa: PLC0415 - an optional part
    from transformers.backbone_utils import BackboneMixin  # noqa: PLC0415
    from transformers.modeling_outputs import BackboneOutput  # noqa: PLC0415

    class SwinV2Backbone(BackboneMixin, PreTrainedModel):  # type: ignore[misc]
        """An encoder that returns the maps of some stages, each with a norm of its own.

        It is its own base model: the encoder in it is a plain module, which transformers cannot
        save.
        """

        config_class = _config_class()
        main_input_name = "pixel_values"
        input_modalities = ("image",)
        base_model_prefix = "backbone"  # its name in dense heads
        has_attentions = False
        supports_gradient_checkpointing = True
        _no_split_modules = ["CheckpointedBlock"]  # noqa: RUF012
        # Norms of maps that are no longer returned.
        _keys_to_ignore_on_load_unexpected = [r"^hidden_states_norms\."]  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            sizes: SwinV2Config = config.encoder_config()
            self.num_features = [sizes.embed_dim, *sizes.stage_dims]
            self.encoder = SwinV2(sizes)
            # It is one of the norms of the maps.
            self.encoder.norm = nn.Identity()  # type: ignore[assignment]
            for block in self.encoder.blocks:
                block.__class__ = _block_class()  # the same block, called by transformers' rules
            self.hidden_states_norms = nn.ModuleDict()
            self._add_norms()
            self.post_init()

        @property
        def out_features(self) -> list[str]:
            """Names of the maps to return; new ones get fresh norms."""
            names: list[str] = self.config.out_features
            return names

        @out_features.setter
        def out_features(self, names: list[str]) -> None:
            self.config.out_features = names
            self._add_norms()

        @property
        def out_indices(self) -> list[int]:
            """Places of `out_features` in `stage_names`."""
            places: list[int] = self.config.out_indices
            return places

        @out_indices.setter
        def out_indices(self, places: Sequence[int]) -> None:
            self.config.out_indices = places
            self._add_norms()

        def _add_norms(self) -> None:
            weight = self.encoder.patch_embed.norm.weight
            for name, width in zip(self.out_features, self.channels, strict=True):
                if name not in self.hidden_states_norms:
                    norm = nn.LayerNorm(width, device=weight.device, dtype=weight.dtype)
                    self.hidden_states_norms[name] = norm.train(self.training)

        def get_input_embeddings(self) -> nn.Module:
            """Return the patch embedding."""
            return self.encoder.patch_embed

        def set_input_embeddings(self, value: nn.Module) -> None:
            """Replace the patch embedding."""
            self.encoder.patch_embed = value  # type: ignore[assignment]

        @classmethod
        def is_custom_code(cls) -> bool:
            """Make transformers initialise blocks too, which have no weights of their own.

            It skips modules without weights unless a class is known to respect loaded weights; the
            functions that `_initialise` calls respect them.
            """
            return False

        def _init_weights(self, module: nn.Module) -> None:
            _initialise(module)

        def forward(
            self,
            pixel_values: Tensor,
            output_hidden_states: bool | None = None,
            output_attentions: bool | None = None,
            return_dict: bool | None = None,
            drop_path_noise: Tensor | None = None,
            **_: Any,
        ) -> Any:
            """Turn (batch, channels, height, width) of any size into a `BackboneOutput`.

            `feature_maps` are (batch, embed_dim·2^i, height/stride, width/stride), rounded up, for
            stage i + 1; `hidden_states`, if they are requested here or in the config, all maps
            before their norms. For `drop_path_noise` see `SwinV2.encode`.

            Raises:
                ValueError: attentions are requested, or the config names a map without a norm.
            """
            if output_attentions:
                raise ValueError(
                    "this backbone does not return attentions: leave output_attentions out."
                )
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            missing = [one for one in self.out_features if one not in self.hidden_states_norms]
            if missing:
                raise ValueError(
                    f"the config was changed to the maps {', '.join(self.out_features)}, and there "
                    f"is no norm for {', '.join(missing)}: set out_features of the backbone, not "
                    "of its config."
                )
            with_stem = bool(output_hidden_states) or "stem" in self.out_features
            maps = _maps(self.encoder, pixel_values, drop_path_noise, with_stem=with_stem)
            output = BackboneOutput(
                feature_maps=tuple(
                    _normalised(maps[name], self.hidden_states_norms[name])
                    for name in self.out_features
                ),
                hidden_states=tuple(maps.values()) if output_hidden_states else None,
            )
            as_dict = self.config.return_dict if return_dict is None else return_dict
            return output if as_dict else output.to_tuple()

    SwinV2Backbone.__qualname__ = SwinV2Backbone.__name__
    return SwinV2Backbone


def _maps(
    encoder: SwinV2, images: Tensor, drop_path_noise: Tensor | None, *, with_stem: bool
) -> dict[str, Tensor]:
    """Return the maps of all stages by name, and first that of the patches if it is wanted."""
    if with_stem:
        stem = encoder.embed(images).permute(0, 3, 1, 2)
        # From the map itself, so that gradients of the stages reach it.
        outputs = encoder.stage_outputs(stem.permute(0, 2, 3, 1), drop_path_noise)
        first, maps = {"stem": stem}, [tokens.permute(0, 3, 1, 2) for tokens in outputs]
    else:
        first, maps = {}, encoder.features(images, drop_path_noise)
    return {**first, **{f"stage{number}": one for number, one in enumerate(maps, start=1)}}


def _normalised(channels_first: Tensor, norm: nn.Module) -> Tensor:
    """Normalise the channels of a map (batch, channels, rows, columns)."""
    normal: Tensor = norm(channels_first.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return normal.contiguous()


def _check_transformers() -> None:
    if find_spec("transformers") is None:
        raise ValueError(
            "backbones need transformers 5: install it with pip install 'simmim[export]'."
        )


def _initialise(module: nn.Module) -> None:
    """Draw the fresh weights of one module as `swinv2.encoder` does.

    transformers calls it from the leaves to the root, and skips weights that were loaded.
    """
    match module:
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.Conv2d():
            module.reset_parameters()
        case nn.LayerNorm():
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        case WindowAttention():
            nn.init.constant_(module.logit_scale, math.log(10))
            nn.init.zeros_(module.query_bias)
            nn.init.zeros_(module.value_bias)
        case Block():
            for norm in (module.norm1, module.norm2):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)
