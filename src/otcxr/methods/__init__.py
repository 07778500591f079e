"""Methods of self-supervised learning: one file each, and the table that names them."""

from __future__ import annotations

import dataclasses
import typing

from otcxr.config import import_named
from otcxr.errors import ConfigError, did_you_mean
from otcxr.methods.barlow import Barlow, BarlowSettings
from otcxr.methods.base import Match, Method, Observed, SSLMethod, StepOutput
from otcxr.methods.byol import BYOL, BYOLSettings
from otcxr.methods.contrastive_ot import ContrastiveOT, ContrastiveOTSettings
from otcxr.methods.densecl import DenseCL, DenseCLSettings
from otcxr.methods.dino import DINO, DINOSettings
from otcxr.methods.moco import MoCo, MoCoSettings
from otcxr.methods.otcxr import OTCXR, OTCXRSettings
from otcxr.methods.pcrlv2 import PCRLv2, PCRLv2Settings
from otcxr.methods.simclr import SimCLR, SimCLRSettings
from otcxr.methods.simsiam import SimSiam, SimSiamSettings
from otcxr.methods.vicreg import VICReg, VICRegSettings
from otcxr.methods.vicregl import VICRegL, VICRegLSettings

__all__ = ["METHODS", "Match", "Method", "Observed", "SSLMethod", "StepOutput", "find_method"]

METHODS: dict[str, Method] = {
    "otcxr": Method(OTCXR, OTCXRSettings()),
    "otcxr-uniform": Method(OTCXR, OTCXRSettings(mass="uniform", overlap_weight=0.0)),
    "otcxr-uniform-infused": Method(OTCXR, OTCXRSettings(mass="uniform", overlap_weight=0.0, infuse=True)),
    "otcxr-pixelwise": Method(OTCXR, OTCXRSettings(pairing="same-cell")),
    "otcxr-nearest": Method(OTCXR, OTCXRSettings(pairing="nearest")),
    "otcxr-geometry": Method(OTCXR, OTCXRSettings(pairing="geometry")),
    "contrastive-ot": Method(ContrastiveOT, ContrastiveOTSettings()),
    "simclr": Method(SimCLR, SimCLRSettings()),
    "densecl": Method(DenseCL, DenseCLSettings()),
    "pcrlv2": Method(PCRLv2, PCRLv2Settings(), {"local_count": 6, "cutout": 0.5}),
    "moco": Method(MoCo, MoCoSettings()),
    "byol": Method(BYOL, BYOLSettings()),
    "simsiam": Method(SimSiam, SimSiamSettings()),
    "barlow": Method(Barlow, BarlowSettings()),
    "vicreg": Method(VICReg, VICRegSettings()),
    "vicregl": Method(VICRegL, VICRegLSettings()),
    "dino": Method(DINO, DINOSettings(), {"local_count": 6}),
}


def find_method(name: str) -> Method:
    """Return the row of a method.

    Args:
        name: A key of ``METHODS``, or ``package.module:NAME`` of a method from outside: a ``Method``, or a subclass of
            ``SSLMethod`` whose ``__init__`` annotates ``settings`` with a dataclass of which every field has a default.
            Modules are searched as Python does, and in the working directory.
    Raises: ConfigError: there is no such method, or it is not one.
    """
    if ":" not in name:
        if name not in METHODS:
            raise ConfigError(f"unknown method '{name}'{did_you_mean(name, METHODS)}; a method from outside is given "
                              "as package.module:Class")  # fmt: skip
        return METHODS[name]
    given = import_named(name, "method")
    module, _, attribute = name.partition(":")
    if isinstance(given, Method):
        return given
    if not (isinstance(given, type) and issubclass(given, SSLMethod)):
        raise ConfigError(f"method '{name}': {module} has no Method or subclass of SSLMethod named '{attribute}'")
    kind = typing.get_type_hints(given.__init__).get("settings")
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"method '{name}': annotate 'settings' of {attribute}.__init__ with its settings dataclass")
    try:
        return Method(given, kind())
    except TypeError as error:
        raise ConfigError(f"method '{name}': every field of {kind.__name__} needs a default ({error})") from error
