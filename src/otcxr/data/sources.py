"""Source strings to collections: the table of readers."""

from __future__ import annotations

from collections.abc import Callable

from otcxr.data.chexpert import read_chexpert, read_mimic
from otcxr.data.folder import read_folder
from otcxr.data.montgomery import read_montgomery, read_shenzhen
from otcxr.data.nih import read_nih
from otcxr.data.pack import read_pack
from otcxr.data.phantom import read_phantom
from otcxr.data.records import Collection
from otcxr.data.rsna import read_rsna
from otcxr.data.siim import read_siim
from otcxr.data.vindr import read_vindr
from otcxr.errors import DataError, did_you_mean

__all__ = ["READERS", "open_again", "open_collection"]

READERS: dict[str, Callable[[str], Collection]] = {
    "chexpert": read_chexpert,
    "folder": read_folder,
    "mimic": read_mimic,
    "montgomery": read_montgomery,
    "nih": read_nih,
    "pack": read_pack,
    "phantom": read_phantom,
    "rsna": read_rsna,
    "shenzhen": read_shenzhen,
    "siim": read_siim,
    "vindr": read_vindr,
}


def open_collection(source: str) -> Collection:
    """Open the collection that a source string names: ``READER:ARGUMENT``.

    "nih:PATH", "folder:PATH", "pack:PATH", "phantom:N[,seed=S][,size=P]" and so on: the keys of ``READERS``.

    Raises: DataError: unknown reader, or what the reader raises.
    """
    reader, colon, argument = source.partition(":")
    if not colon or not argument:
        raise DataError(f"data.source is '{source}'; expected READER:ARGUMENT, such as nih:PATH or phantom:500")
    if reader not in READERS:
        raise DataError(f"unknown reader '{reader}' in data.source{did_you_mean(reader, READERS)}")
    return READERS[reader](argument)


def open_again(source: str) -> Collection:
    """Open the source that a run recorded; if that fails, say that it may be given anew.

    Raises: DataError: as ``open_collection``.
    """
    try:
        return open_collection(source)
    except DataError as error:
        raise DataError(f"{error} (recorded by the run as {source}; --data.source says where it is now)") from error
