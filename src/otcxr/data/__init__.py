"""Radiographs: records, readers, pixels and views.

The names load when they are asked for: processes that only decode files need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otcxr.data.images import load_image, load_radiograph
    from otcxr.data.records import Box, Collection, Radiograph, Record
    from otcxr.data.sources import READERS, open_collection

__all__ = [
    "READERS",
    "Box",
    "Collection",
    "Radiograph",
    "Record",
    "load_image",
    "load_radiograph",
    "open_collection",
]

_FROM = {"load_image": "images", "load_radiograph": "images", "READERS": "sources", "open_collection": "sources"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'otcxr.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"otcxr.data.{_FROM.get(name, 'records')}"), name)
