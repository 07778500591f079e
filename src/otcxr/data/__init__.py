"""Radiographs: records, readers, pixels and views."""

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
