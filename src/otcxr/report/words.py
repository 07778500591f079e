"""What pages and terminals call tasks and measures."""

from __future__ import annotations

__all__ = ["LOCATED_NAMES", "MARKS", "MATCHED_NAMES", "MEASURE_NAMES", "RANKED", "STUDY_TASK_NAMES", "TASK_NAMES"]

# what stands behind intervals in the tables of a study
MARKS = {
    "†": "few patients: a finding with fewer than 20 patients on one side, or a mean with such a finding in it (or "
    "resamples that all agree). As to patients the interval is likely too narrow.",
    "‡": "one degree of freedom: the two seeds of this row, or difference, lie further apart than those of the others "
    "(F test at 20 %: one row in five by chance), so they alone say how far seeds move it. The interval may "
    "be as wide as the range, says little of the row, and has no difference that could be seen.",
}

# tasks in the order of the page: title, and how scores come about
TASK_NAMES = {
    "linear": ("Linear probe", "Logistic regression on frozen features."),
    "finetune": (
        "Fine-tuning",
        "The whole encoder trained on, from the linear probe, the step chosen on validation images.",
    ),
    "knn": ("Nearest neighbours", "Weighted vote of the 20 nearest labelled images."),
    "retrieval": ("Retrieval", "Share of the nearest labelled images that have the finding that the image has."),
    "segment-token": ("Segmentation, linear probe of tokens", "A linear layer on every position of the last map."),
    "segment-frozen": ("Segmentation, frozen", "A U-Net decoder on the maps of the frozen encoder."),
    "segment-finetune": ("Segmentation, fine-tuned", "A U-Net decoder, trained together with the encoder."),
    "predictions": ("How good they are", ""),
}


STUDY_TASK_NAMES = TASK_NAMES | {
    "localize-linear": (
        "Localisation, linear probe",
        "Grad-CAM of a linear probe, against boxes and masks that were not trained on.",
    ),
    "localize-finetune": (
        "Localisation, fine-tuned",
        "Grad-CAM of the fine-tuned encoder, against boxes and masks that were not trained on.",
    ),
    "correspondence": (
        "Correspondence",
        "Share of positions of one view that are paired to within one cell of the true place in another, mean over "
        "images; the same pairs for every row.",
    ),
    "focus": ("Focus of masses", "Share of a view's mass inside regions, mean over images that show them."),
}


MEASURE_NAMES = {
    "auroc": "AUROC", "average_precision": "average precision",
    "sensitivity_at_specificity": "sensitivity at 90 % specificity",
    "precision_at_10": "precision at 10", "precision_at_5": "precision at 5", "precision_at_1": "precision at 1",
    "dice": "Dice", "iou": "IoU", "hausdorff": "Hausdorff 95 / side", "empties": "AUROC of empties",
    "found": "found", "left_empty": "left empty",
    "pointing": "strongest place inside", "energy": "heat inside", "lung_energy": "heat in the lungs",
    "region_iou": "IoU above Otsu", "iou@0.25": "IoU >= 0.25", "iobb@0.25": "IoBB >= 0.25",
    "plan": "plan", "exact": "plan, exact cell", "nearest_by_cost": "nearest by cost",
    "nearest_by_map": "nearest by map", "plan_gain": "plan less nearest by map",
    "same_place": "same place", "chance": "chance",
    "learned": "method's mass inside", "uniform": "uniform mass inside",
}  # fmt: skip


RANKED = ("auroc", "precision_at_10")  # of tasks whose other measures say much the same


MATCHED_NAMES = {
    "plan": "plan",
    "exact": "plan, the very cell",
    "nearest_by_cost": "cheapest by the method's cost",
    "nearest_by_map": "most similar on the encoder's map",
    "same_place": "same place in both views",
    "chance": "chance",
}


LOCATED_NAMES = {
    "pointing": "strongest place inside the region (pointing game)",
    "energy": "share of the map's sum inside the region",
    "lung_energy": "share of the map's sum inside the lungs",
    "iou@0.25": "box around the strongest part: IoU of at least 0.25",
}
