"""Recipes: typed, strict settings read from one YAML file."""

from dataclasses import dataclass
from typing import TypeVar

from pydantic import ConfigDict
from typing_extensions import dataclass_transform

SettingsType = TypeVar("SettingsType")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[SettingsType]) -> type[SettingsType]:
    """Make a class of fields into frozen, keyword-only, strictly validated settings."""
    cls.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
        extra="forbid", strict=True, use_attribute_docstrings=True
    )
    return dataclass(frozen=True, kw_only=True)(cls)
