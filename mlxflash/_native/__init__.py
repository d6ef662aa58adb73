"""The optional native part, imported in one place: `core` is the extension module, or None without it."""

from typing import Any

core: Any
try:
    core = __import__("mlxflash._native._core", fromlist=["_core"])
except ImportError:
    core = None
