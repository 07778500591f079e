"""otcxr: learn from chest radiographs without labels, by optimal transport between dense views.

Importing this package loads neither torch nor any other heavy library; import what you need:

    from otcxr.ot import sinkhorn, cosine_cost
    from otcxr.data import open_collection
    from otcxr.methods import METHODS
    from otcxr.train import PretrainConfig, pretrain
"""

from otcxr.version import __version__

__all__ = ["__version__"]
