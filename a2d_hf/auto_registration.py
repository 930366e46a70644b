"""Makes transformers' Auto classes know the `a2d` model type, without importing torch before the user does.

Owns one temporary entry of `sys.meta_path`. `import a2d_hf` must leave `AutoModel.from_pretrained(converted_folder)`
working, whichever of the two is imported first; and `a2d --help` and `from a2d_hf import detect` must not pay two
seconds for torch. So registration happens at once where transformers' Auto classes are already loaded, and else as
soon as an import has loaded them (a post-import hook, as in PEP 369). Nothing of transformers is patched: the hook
imports `a2d_hf.modeling`, which calls the public `Auto*.register`, and takes itself away.

It waits for the outermost import to end: transformers' modules import each other in circles, and our model class can
only be defined when none of them is half-way.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


AUTO_MODULES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")
WATCHED = ("transformers", "a2d_hf.modeling")


def register_auto_classes() -> None:
    """
    Registers `A2DConfig` and `A2DForMaskedDiffusion` with `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM` and
    `AutoModelForCausalLM`: now where transformers has loaded one of them, else as soon as it does.
    """
    if _auto_classes_loaded():
        _register()
    elif not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())


def _auto_classes_loaded() -> bool:
    return any(name in sys.modules for name in AUTO_MODULES)


def _register() -> None:
    importlib.import_module("a2d_hf.modeling")  # registers as it is imported


class _WatchingFinder(MetaPathFinder):
    """Lets the finders behind it find transformers' modules, and registers when the outermost of them has loaded."""

    def __init__(self):
        self.depth = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in WATCHED):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchedLoader(spec.loader, self)
                return spec
        return None

    def enter(self) -> None:
        self.depth.value = vars(self.depth).get("value", 0) + 1

    def leave(self) -> None:
        self.depth.value -= 1
        if self.depth.value == 0 and self in sys.meta_path and _auto_classes_loaded():
            sys.meta_path.remove(self)
            _register()


class _WatchedLoader(Loader):
    """A module's own loader, which also counts how deep in watched imports this thread is."""

    def __init__(self, loader: Loader, finder: _WatchingFinder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module later (inspect, pickle, pkgutil) finds its own loader, not this one.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.finder.enter()
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.leave()
