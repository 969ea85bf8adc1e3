"""Import timm without torchvision, of which its models only use names."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType


class AnyName(type):
    """A class whose attributes are classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class AnyModule(ModuleType):
    """A module that has every attribute."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that provides a stub torchvision if it is not installed."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return AnyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_with_stand_in(name: str) -> ModuleType:
    """Import a module with the stub in place, and remove the stub again."""
    finder = StandIn()
    sys.meta_path.append(finder)  # the last resort: a real torchvision comes first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for module in [one for one in sys.modules if one.partition(".")[0] == "torchvision"]:
            if isinstance(sys.modules[module], AnyModule):
                del sys.modules[module]
