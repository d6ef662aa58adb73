"""The optional native part, imported in one place: `core` is the extension module, or None without it."""

from types import ModuleType

core: ModuleType | None
try:
    from mlxflash._native import _core as core
except ImportError:
    core = None
