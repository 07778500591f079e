"""Packs: a collection of radiographs, decoded and reduced once, to be read at the speed of memory.

``pack_collection`` is what ``otcxr pack`` calls; ``otcxr.data.pack`` reads what it leaves.

    reduce    one file to what is kept of it            workers   processes that do it, and who watches them
    store     shards and journal                        index     columns of the index
    page      the data page                             frontal   the check for frontal chest radiographs
"""

from otcxr.packing.collection import PackConfig, Packed, pack_collection

__all__ = ["PackConfig", "Packed", "pack_collection"]
