"""Pages that open offline, from files of runs and studies, never from models."""

from otcxr.report.evaluation import show_evaluation, write_predictions_page
from otcxr.report.pages import study_interval
from otcxr.report.rows import localize_rows, matching_rows
from otcxr.report.run import write_explorer_page, write_report
from otcxr.report.study import describe_training, efficiency_svg, means_over, split_measures, write_study_page
from otcxr.report.words import MARKS, MEASURE_NAMES, RANKED, STUDY_TASK_NAMES, TASK_NAMES

__all__ = [
    "MARKS",
    "MEASURE_NAMES",
    "RANKED",
    "STUDY_TASK_NAMES",
    "TASK_NAMES",
    "describe_training",
    "efficiency_svg",
    "localize_rows",
    "matching_rows",
    "means_over",
    "show_evaluation",
    "split_measures",
    "study_interval",
    "write_explorer_page",
    "write_predictions_page",
    "write_report",
    "write_study_page",
]
