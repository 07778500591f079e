"""How good an encoder is: sees encoders and records only, never the method that trained it."""

from otcxr.evaluation.tasks import TASKS, Evaluation, evaluate

__all__ = ["TASKS", "Evaluation", "evaluate"]
