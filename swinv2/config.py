"""Configs of image and video encoders, the published variants, and execution settings."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from swinv2.field_values import MOST_PIXELS, Pair, counts_of_stages, number, pair, set_count

Axes = tuple[int, ...]
"""One number per axis of a token map: (rows, columns), or (frames, rows, columns) of a clip."""
AttentionPath = Literal["auto", "explicit", "sdpa", "sequential"]
Checkpointing = Literal["none", "attention", "full"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes in which variants differ (paper, section 3.4)."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    extra_norm_every: int = 0


MOST_BLOCKS = 1000
"""Maximum number of blocks in a stage."""
MOST_CHANNELS = 2**30
"""Maximum number of channels of images and of the first stage, and of heads."""
MOST_HIDDEN = 1000
"""Maximum number of hidden units of an MLP per channel."""

# The heads of huge and giant are not published: 32 channels per head, as in the others.
VARIANTS: Mapping[str, Architecture] = MappingProxyType(
    {
        "tiny": Architecture(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
        "small": Architecture(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
        "base": Architecture(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
        "large": Architecture(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
        "huge": Architecture(
            embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), extra_norm_every=6
        ),
        "giant": Architecture(
            embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_every=6
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class SwinV2Config:
    """Sizes of an image encoder.

    Sizes with two axes are (height, width); an int sets both. Lists are accepted for tuples, so
    that a config can be built from JSON without conversions.
    """

    variant: str | None = None
    """Name in VARIANTS, or None for a custom architecture."""

    image_size: Pair = (256, 256)
    """Nominal input, (height, width) in pixels. Inputs of any other size work too."""

    patch_size: int = 4
    """Side of a patch, in pixels."""

    in_channels: int = 3
    """Channels of the images."""

    embed_dim: int
    """Channels of the first stage; each further stage has twice as many."""

    depths: tuple[int, ...]
    """Blocks in each stage."""

    num_heads: tuple[int, ...]
    """Attention heads in each stage."""

    window_size: Pair = (8, 8)
    """Attention window, (height, width) in tokens; clamped in stages with fewer tokens."""

    mlp_ratio: float = 4.0
    """Hidden units of a block's MLP per channel."""

    drop_path: float = 0.0
    """Rate of stochastic depth of the last block; it rises linearly from 0 at the first."""

    extra_norm_every: int = 0
    """Blocks of a stage between LayerNorms on the main branch; 0 for none."""

    pretrained_window_sizes: tuple[Pair, ...] | None = None
    """Window of each stage in pretraining, (height, width) in tokens; None for the present ones."""

    def __post_init__(self) -> None:
        for name in ("image_size", "window_size"):
            object.__setattr__(self, name, pair(name, getattr(self, name)))
        for name, most in (("depths", MOST_BLOCKS), ("num_heads", MOST_CHANNELS)):
            object.__setattr__(self, name, counts_of_stages(name, getattr(self, name), most=most))
        for name in ("in_channels", "embed_dim"):
            set_count(self, name, least=1, most=MOST_CHANNELS)
        set_count(self, "patch_size", least=1, most=MOST_PIXELS)
        set_count(self, "extra_norm_every", least=0)
        for name in ("mlp_ratio", "drop_path"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if not self.mlp_ratio <= MOST_HIDDEN:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it must be at most {MOST_HIDDEN}.")
        if self.mlp_ratio * self.embed_dim < 1:
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio}; it must leave at least one hidden unit."
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and below 1.")
        if min(self.image_size) < self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}, less than one patch "
                f"of {self.patch_size} pixels; enlarge image_size or lower patch_size."
            )
        self._check_heads()
        self._check_pretrained_windows()
        self._check_variant()

    def _check_heads(self) -> None:
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads {self.num_heads} and depths {self.depths} must have as many entries as "
                "there are stages."
            )
        for stage, (dim, heads) in enumerate(zip(self.stage_dims, self.num_heads, strict=True)):
            if dim % heads:
                raise ValueError(
                    f"num_heads[{stage}] is {heads}; it must divide the {dim} channels of stage "
                    f"{stage} (embed_dim {self.embed_dim} doubled {stage} times)."
                )

    def _check_pretrained_windows(self) -> None:
        name, windows = "pretrained_window_sizes", self.pretrained_window_sizes
        if windows is None:
            return
        if not isinstance(windows, list | tuple) or len(windows) != len(self.depths):
            raise ValueError(
                f"{name} is {windows!r}; it must have one window for each of the "
                f"{len(self.depths)} stages."
            )
        pairs = tuple(pair(f"{name}[{stage}]", window) for stage, window in enumerate(windows))
        object.__setattr__(self, name, pairs)

    def _check_variant(self) -> None:
        if self.variant is None:
            return
        expected = _architecture(self.variant)
        for field in fields(Architecture):
            published, present = getattr(expected, field.name), getattr(self, field.name)
            if published != present:
                raise ValueError(
                    f"{field.name} is {present}, but the variant {self.variant!r} has {published}; "
                    "pass variant=None for a custom architecture."
                )

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.stage_dims[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each stage."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.depths)))

    @property
    def stage_resolutions(self) -> tuple[Pair, ...]:
        """Tokens of each stage, (rows, columns), for an input of the nominal size."""
        height, width = self.image_size
        return tuple((-(-height // stride), -(-width // stride)) for stride in self.strides)

    @property
    def stage_maps(self) -> tuple[Axes, ...]:
        """Tokens of each stage along every axis of its map, for an input of the nominal size."""
        return self.stage_resolutions

    @property
    def map_window(self) -> Axes:
        """Attention window along every axis of the map, before it is fitted to a stage."""
        return self.window_size

    @property
    def reference_windows(self) -> tuple[Axes, ...]:
        """Window of each stage that relative positions are scaled by, along every axis."""
        return record_windows(self)

    @property
    def patch_channels(self) -> int:
        """Channels of the input of the patch embedding."""
        return self.in_channels

    @property
    def stage_windows(self) -> tuple[Pair, ...]:
        """Window of each stage, (height, width), for an input of the nominal size."""
        return tuple(
            (
                clamp_window(rows, self.window_size[0])[0],
                clamp_window(columns, self.window_size[1])[0],
            )
            for rows, columns in self.stage_resolutions
        )


@dataclass(frozen=True, kw_only=True)
class VideoConfig(SwinV2Config):
    """Sizes of a video encoder: those within a frame, as for images, and those in time."""

    frames: int = 8
    """Nominal length of a clip in frames. Clips of any other length work too."""

    frame_patch: int = 1
    """Frames per patch."""

    window_frames: int = 8
    """Attention window along time, in tokens; clamped in shorter clips."""

    pretrained_window_frames: int | None = None
    """Window along time in the training, in tokens; None for the present one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "frame_patch", "window_frames"):
            set_count(self, name, least=1, most=MOST_PIXELS)
        if self.pretrained_window_frames is not None:
            set_count(self, "pretrained_window_frames", least=1, most=MOST_PIXELS)
        if self.frames % self.frame_patch:
            raise ValueError(
                f"frames is {self.frames}, not a multiple of frame_patch {self.frame_patch}; "
                "change either."
            )

    @property
    def recorded_frames(self) -> int:
        """Window along time that relative positions are scaled by, in tokens."""
        tokens = self.frames // self.frame_patch
        return self.pretrained_window_frames or clamp_window(tokens, self.window_frames)[0]

    @property
    def stage_maps(self) -> tuple[Axes, ...]:
        """Tokens of each stage, (frames, rows, columns), for a clip of the nominal size."""
        frames = self.frames // self.frame_patch
        return tuple((frames, *resolution) for resolution in self.stage_resolutions)

    @property
    def map_window(self) -> Axes:
        """Attention window, (frames, rows, columns), before it is fitted to a stage."""
        return (self.window_frames, *self.window_size)

    @property
    def reference_windows(self) -> tuple[Axes, ...]:
        """Window of each stage that relative positions are scaled by, (frames, rows, columns)."""
        return tuple((self.recorded_frames, *window) for window in record_windows(self))

    @property
    def patch_channels(self) -> int:
        """Channels of all frames of a patch."""
        return self.frame_patch * self.in_channels


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an encoder computes: changes time and memory, but results only by rounding.

    Attention path and checkpointing are one choice for all stages, or one per stage.
    """

    attention: AttentionPath | tuple[AttentionPath, ...] = "auto"
    """explicit: all scores at once, in plain operations; the only path that can be differentiated
    twice, or exported. sdpa: torch's scaled_dot_product_attention. sequential: one group of windows
    at a time, recomputed in the backward; takes the least memory. auto: sequential too, but faster,
    since attention weights are saved for the backward; in compiled blocks, except for float32 on a
    CPU, a form that compilers fuse; in exported graphs explicit
    (`swinv2.kernels.dispatch.choose_attention`)."""

    checkpointing: Checkpointing | tuple[Checkpointing, ...] = "none"
    """Activation checkpointing: what the backward recomputes: nothing, the attention branch of each
    block, or the whole block."""

    scores_at_a_time: int | None = None
    """Scores in a group of windows. None for 2**19 on a CPU (2 MB in float32, which fits into its
    cache), 2**21 on a CPU if windows have more than 256 tokens, and 2**27 on other devices."""

    def __post_init__(self) -> None:
        for name, legal in (("attention", AttentionPath), ("checkpointing", Checkpointing)):
            value = getattr(self, name)
            choices = list(value) if isinstance(value, list | tuple) else [value]
            for choice in choices:
                if choice not in get_args(legal):
                    raise ValueError(
                        f"{name} is {choice!r}; choose {_listed(list(get_args(legal)))}."
                    )
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(choices))
        if self.scores_at_a_time is not None:
            set_count(self, "scores_at_a_time", least=1)

    def by_stage(self, stages: int) -> list["Execution"]:
        """Return the settings of each stage.

        Raises:
            ValueError: a list of choices has another length than `stages`.
        """
        for name in ("attention", "checkpointing"):
            value = getattr(self, name)
            if not isinstance(value, str) and len(value) != stages:
                raise ValueError(
                    f"{name} is {value}; it must be one choice, or one for each of the "
                    f"{stages} stages."
                )
        return [
            replace(
                self,
                attention=_of_stage(self.attention, stage),
                checkpointing=_of_stage(self.checkpointing, stage),
            )
            for stage in range(stages)
        ]


def _of_stage(value: Any, stage: int) -> Any:
    return value if isinstance(value, str) else value[stage]


Config = TypeVar("Config", bound=SwinV2Config)


def clamp_window(resolution: int, window: int) -> tuple[int, bool]:
    """Clamp a window to one axis of a stage, as the reference code does; sizes are in tokens.

    Return the window, at most the resolution, and whether windows are shifted along the axis, which
    they are not if one window spans it.
    """
    if resolution <= window:
        return resolution, False
    return window, True


def record_windows(config: SwinV2Config) -> tuple[Pair, ...]:
    """Return the window of each stage, (height, width) in tokens, to record with its weights.

    Relative positions are divided by it (paper, section 3.3). It is the window of the first
    training, and kept when the image or window size changes. 192 pixels with window 12 record 12,
    12, 12 and 6.
    """
    return config.pretrained_window_sizes or config.stage_windows


def variant_config(name: str, **overrides: Any) -> SwinV2Config:
    """Return the config of a published variant, with any fields of SwinV2Config overridden.

    If an override changes the architecture, the config has no variant name.

    Raises:
        ValueError: the variant or a field is unknown, or a size cannot work.
    """
    architecture = _architecture(name)
    config = SwinV2Config(
        embed_dim=architecture.embed_dim,
        depths=architecture.depths,
        num_heads=architecture.num_heads,
        extra_norm_every=architecture.extra_norm_every,
    )
    config = replace_config(config, **overrides)
    if "variant" in overrides or any(
        getattr(config, field.name) != getattr(architecture, field.name)
        for field in fields(Architecture)
    ):
        return config
    return replace(config, variant=name)


def video_config(config: SwinV2Config, **sizes: Any) -> VideoConfig:
    """Return the config of a video encoder whose frames have the sizes of an image encoder.

    Raises:
        ValueError: a size in time cannot work.
    """
    image = {field.name: getattr(config, field.name) for field in fields(SwinV2Config)}
    return VideoConfig(**image, **sizes)


def replace_config(config: Config, **overrides: Any) -> Config:
    """Return a config with some fields changed.

    Raises:
        ValueError: a field is unknown (the message names close ones), or a size cannot work.
    """
    known = [field.name for field in fields(config)]
    for name in overrides:
        if name not in known:
            close = get_close_matches(name, known) or known
            kind = type(config).__name__
            raise ValueError(f"{kind} has no field {name!r}; did you mean {_listed(close)}?")
    return replace(config, **overrides)


def _architecture(name: str) -> Architecture:
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(
            f"there is no variant {repr(name)[:200]}; choose one of {_listed(list(VARIANTS))}."
        )
    return VARIANTS[name]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" or " if len(names) > 1 else "") + names[-1]
