"""Methods of self-supervised learning: one file each, and the table that names them."""

from otcxr.methods.base import Match, Method, Observed, SSLMethod, StepOutput
from otcxr.methods.otcxr import OTCXR, OTCXRSettings
from otcxr.methods.simclr import SimCLR, SimCLRSettings

__all__ = ["METHODS", "Match", "Method", "Observed", "SSLMethod", "StepOutput"]

METHODS: dict[str, Method] = {
    "otcxr": Method(OTCXR, OTCXRSettings()),
    "otcxr-uniform": Method(OTCXR, OTCXRSettings(mass="uniform")),
    "simclr": Method(SimCLR, SimCLRSettings()),
}
