"""Studies: methods x seeds x labels x tasks under one budget and one tuning rule, compared pair by pair."""

from otcxr.study.cells import run_study
from otcxr.study.spec import Study, read_study

__all__ = ["Study", "read_study", "run_study"]
