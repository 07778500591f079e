"""Packs: a collection of radiographs, decoded and reduced once, to be read at the speed of memory.

``pack_collection`` is what ``otcxr pack`` calls; ``otcxr.data.pack`` reads what it leaves.

    reduce    one file to what is kept of it            workers   processes that do it, and who watches them
    store     shards and journal                        index     columns of the index
    page      the data page                             frontal   the check for frontal chest radiographs
    burned    the screen for writing in a picture

The names load when they are asked for: workers need neither torch nor the readers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otcxr.packing.collection import PackConfig, Packed, pack_collection

__all__ = ["PackConfig", "Packed", "pack_collection"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'otcxr.packing' has no attribute '{name}'")
    return getattr(importlib.import_module("otcxr.packing.collection"), name)
