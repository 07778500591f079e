"""Checklists and a model card of a run, filled as far as its files go; what its author has to say is marked.

    cards/claim.md       CLAIM, 2024 update: 44 items of a paper on artificial intelligence in medical imaging
    cards/tripod-ai.md   TRIPOD+AI: 27 items of a paper on a clinical prediction model
    cards/model-card.md  what the model is, for whom, and how good

The items are named in our own words; read them in full at the source before you submit. Reads files, never models.

Source: Tejani et al., Radiology: Artificial Intelligence 6(4), 2024 (CLAIM); Collins et al., BMJ 385, 2024 (TRIPOD+AI);
Mitchell et al., FAT* 2019, arXiv:1810.03993 (model cards).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from otcxr.errors import DataError
from otcxr.files import write_atomic
from otcxr.runs import Run
from otcxr.version import __version__

__all__ = ["CLAIM", "TRIPOD_AI", "Item", "write_cards"]

OPEN = "**Author: fill in.**"


class Item(NamedTuple):
    """One line of a checklist.

    Attributes:
        number: As in the checklist.
        section: Of a paper.
        asked: What to report, in our words.
        fact: Key of what the files of a run say about it; "" where they say nothing.
        still: What the author has to add even so.
    """

    number: str
    section: str
    asked: str
    fact: str = ""
    still: str = ""


CLAIM = (
    Item("1", "Title", "that and what kind of artificial intelligence is studied", "kind"),
    Item("2", "Abstract", "design, methods, results and conclusions in a structured summary"),
    Item("3", "Introduction", "background, and what the model is to be used for"),
    Item("4", "Introduction", "aims and hypotheses"),
    Item("5", "Design", "prospective or retrospective"),
    Item("6", "Design", "goal of the study, such as feasibility or superiority"),
    Item("7", "Data", "where the data come from", "source", "institutions, dates, licence"),
    Item("8", "Data", "who was included and excluded, and why", "skipped", "clinical criteria"),
    Item("9", "Data", "what was done to the images before", "preprocessing"),
    Item("10", "Data", "what parts of images or data were selected", "views"),
    Item("11", "Data", "how data were de-identified"),
    Item("12", "Data", "how missing data were handled", "missing"),
    Item("13", "Data", "how images were acquired", "projections", "devices and protocols"),
    Item("14", "Reference standard", "how it was defined"),
    Item("15", "Reference standard", "why this one was chosen"),
    Item("16", "Reference standard", "who annotated, with what qualification"),
    Item("17", "Reference standard", "how the test set was annotated"),
    Item("18", "Reference standard", "how far annotators agree with each other and themselves"),
    Item("19", "Partitions", "how data were assigned to them", "partitions"),
    Item("20", "Partitions", "at what level they are disjoint", "disjoint"),
    Item("21", "Partitions", "how large the test set was meant to be, and why", "power", "what was intended"),
    Item("22", "Model", "architecture, inputs and outputs", "model"),
    Item("23", "Model", "software with versions", "software"),
    Item("24", "Model", "how weights were initialised", "initialisation"),
    Item("25", "Training", "how it was trained, with all settings", "training"),
    Item("26", "Training", "how the final model was chosen", "selection"),
    Item("27", "Training", "ensembles", "ensembles"),
    Item("28", "Evaluation", "measures of performance", "measures"),
    Item("29", "Evaluation", "significance and uncertainty", "uncertainty"),
    Item("30", "Evaluation", "robustness and sensitivity", "robustness"),
    Item("31", "Evaluation", "explanations, and how they were checked", "explanations"),
    Item("32", "Evaluation", "evaluation on internal data", "internal"),
    Item("33", "Evaluation", "evaluation on external data", "external"),
    Item("34", "Evaluation", "registration, if it is a trial"),
    Item("35", "Results", "how many patients and images were included and excluded", "flow"),
    Item("36", "Results", "who they are, in every partition", "demographics", "clinical characteristics"),
    Item("37", "Results", "performance with its uncertainty, in all partitions", "performance"),
    Item("38", "Results", "diagnostic accuracy and its precision", "accuracy"),
    Item("39", "Results", "where the model fails", "", "read the heat maps and the groups in the report"),
    Item("40", "Discussion", "limitations", "limitations"),
    Item("41", "Discussion", "what it means for practice"),
    Item("42", "Other", "where the full protocol is"),
    Item("43", "Other", "where software, model and data can be had", "availability"),
    Item("44", "Other", "funding, and the role of funders"),
)

TRIPOD_AI = (
    Item("1", "Title", "that a prediction model is developed or evaluated, for whom and what outcome", "kind"),
    Item("2", "Abstract", "a summary by TRIPOD+AI for abstracts"),
    Item("3", "Introduction", "health-care context, target population, known inequalities"),
    Item("4", "Introduction", "objectives: development, evaluation, or both"),
    Item("5", "Data", "sources and dates", "source", "dates, representativeness"),
    Item("6", "Participants", "setting, eligibility, treatments", "skipped", "setting and eligibility"),
    Item("7", "Data preparation", "preprocessing and quality checks, alike across groups", "preprocessing"),
    Item("8", "Outcome", "definition, assessment, blinding", "", "findings are listed in the model card"),
    Item("9", "Predictors", "what enters the model", "model"),
    Item("10", "Sample size", "how it was arrived at", "power", "what was intended beforehand"),
    Item("11", "Missing data", "how they were handled", "missing"),
    Item("12", "Analysis", "use of data, model building, selection, measures, comparison", "analysis"),
    Item("13", "Class imbalance", "whether and how it was handled", "imbalance"),
    Item("14", "Fairness", "how it was approached", "fairness"),
    Item("15", "Model output", "what it gives, and thresholds", "output"),
    Item("16", "Training and evaluation", "how their data differ", "partitions"),
    Item("17", "Ethics", "approval and consent"),
    Item("18", "Open science", "funding, interests, protocol, registration, data and code", "availability", "the rest"),
    Item("19", "Involvement", "of patients and the public"),
    Item("20", "Participants", "flow and characteristics, by group", "demographics", "follow-up, outcomes over time"),
    Item("21", "Model development", "participants and events in each analysis", "events"),
    Item("22", "Model specification", "enough to use it: weights, code, access", "specification"),
    Item("23", "Model performance", "with intervals, also in groups", "performance"),
    Item("24", "Model updating", "what came of it", "updating"),
    Item("25", "Interpretation", "of the main results, fairness included"),
    Item("26", "Limitations", "of the study", "limitations"),
    Item("27", "Usability", "input of poor quality, interaction, next steps", "poor_input", "who uses it, and how"),
)


def write_cards(run: Run, out: Path) -> list[Path]:
    """Write the three cards of a run.

    Returns: Their paths.
    Raises: DataError: the run has not been evaluated with a task that scores findings.
    """
    facts = _facts(run)
    written = []
    for name, title, items in (
        ("claim.md", "CLAIM (2024 update)", CLAIM),
        ("tripod-ai.md", "TRIPOD+AI", TRIPOD_AI),
    ):
        path = out / name
        write_atomic(path, _checklist(title, run, items, facts))
        written.append(path)
    write_atomic(out / "model-card.md", _model_card(run, facts))
    return [*written, out / "model-card.md"]


def _checklist(title: str, run: Run, items: Sequence[Item], facts: Mapping[str, str]) -> str:
    filled = sum(1 for item in items if facts.get(item.fact))
    lines = [
        f"# {title}: {run.name}", "",
        f"Filled by otcxr {__version__} from the files of the run as far as they go: {filled} of {len(items)} items. "
        f"{OPEN} marks the rest. Items in our words; read the checklist itself before you submit.", "",
        "| item | section | asked | answer |", "|---|---|---|---|",
    ]  # fmt: skip
    for item in items:
        answer = facts.get(item.fact, "")
        if not answer:
            answer = OPEN if not item.still else f"{OPEN[:-3]} {item.still}.**"
        elif item.still:
            answer += f" {OPEN[:-3]} {item.still}.**"
        lines.append(f"| {item.number} | {item.section} | {item.asked} | {_cell(answer)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _facts(run: Run) -> dict[str, str]:
    """What the files of a run say, by key of the checklists."""
    config, environment = run.read_config(), run.read_json("environment.json") or {}
    encoder = run.read_json("encoder.json")
    tasks = {t: e for t in ("linear", "finetune", "knn") if (e := run.read_json(f"evaluation/{t}.json")) is not None}
    if not tasks or encoder is None:
        raise DataError(f"{run.path} has not been evaluated; run 'otcxr evaluate {run.path}' first")
    task, result = next(iter(tasks.items()))
    train, data, method = config["train"], config["data"], config["method"]
    splits, settings = result["splits"], result["settings"]
    skipped = sum(len(part["skipped"]) for part in splits.values())
    macro = result["macro"]
    versions = result["environment"]["versions"]
    arch = encoder["architecture"]
    level = f"{100 * result['intervals']['level']:.0f} %"
    n = len(result["findings"])
    power = result.get("power", {})
    facts = {
        "kind": f"Self-supervised pre-training (`{method['name']}`) of a convolutional network on chest radiographs; "
        f"{', '.join(_TASK[t] for t in tasks)} for {n} findings.",
        "source": f"Pre-training: `{data['source']}` (split {data['split']}), {environment.get('images', '?')} images, "
        f"no labels. Labels: `{result['collection']}`.",
        "skipped": f"{skipped} images could not be read and were left out of the evaluation (listed in `evaluation/"
        f"{task}.json`); those left out of pre-training are in `skipped.csv`.",
        "preprocessing": "Grey values scaled by VOI LUT, window or stated bits to [0, 1], bone bright; padded to a "
        f"square, reduced with antialiasing to {settings['size']} px; standardised by mean {encoder['mean']}, std "
        f"{encoder['std']}.",
        "views": f"Pre-training sees random views of {config['views']['size']} px (crop, rotation, grey levels, blur, "
        "noise: `config.yaml`); evaluation sees whole images.",
        "missing": "Labels that were not assessed are left out of that finding, in fitting and judging; nothing is "
        "imputed. Images whose sex, age or view is not known are in no group.",
        "projections": "; ".join(f"{role}: {_counted(part['view'])}" for role, part in splits.items()) + ".",
        "partitions": f"Fitted on '{splits['fit']['name']}', thresholds, recalibration and stopping on "
        f"'{splits['val']['name']}', judged on '{splits['test']['name']}'.",
        "disjoint": "Patient: no patient is in two of the partitions of the evaluation; checked before every "
        f"evaluation. {_seen_before(result)}",
        "power": _power(power),
        "model": f"{arch['name']} of width {arch['width']}, stride {arch['stride']}, {arch['in_channels']} channel in, "
        f"{encoder['channels'][-1]} features out; a linear head for each finding.",
        "software": f"otcxr {result['environment']['otcxr']}, Python {result['environment']['python']}, "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + f"; {result['environment']['system']}.",
        "initialisation": f"Random, seed {config['seed']}; compared with the same network untrained.",
        "training": f"{train['epochs']} epochs, {train['batch_size']} images a step, {train['optimizer']}, learning "
        f"rate {train['learning_rate']}, weight decay {train['weight_decay']}, precision {train['precision']}; every "
        "setting is in `config.yaml`.",
        "selection": "The encoder of the last epoch; "
        + ("the step of the fine-tuning with the best macro AUROC on validation patients."
           if task == "finetune" else "the penalty of the probe by cross-validation over patients."),
        "ensembles": "None.",
        "measures": "AUROC, average precision beside prevalence, sensitivity at 90 % specificity; F1, sensitivity, "
        f"specificity and predictive values at a threshold chosen on validation images ({settings['rule']}); Brier "
        "score, calibration slope, intercept and error.",
        "uncertainty": f"{level} percentile intervals over {result['intervals']['resamples']} resamples of patients; "
        "paired differences to a random network, p-values after Holm over findings.",
        "robustness": f"Shares of the labels: {', '.join(f'{100 * s:g} %' for s in settings['fractions'])}; within "
        f"{', '.join(settings['within'])}; groups by {', '.join(settings['subgroups'])}.",
        "explanations": "Grad-CAM of the probe; not checked against expert boxes in this run."
        if (run.path / "explain" / "index.json").is_file() else "",
        "internal": f"Macro AUROC {_interval(macro['auroc'])} over {len(macro['findings'])} findings.",
        "external": "",
        "flow": _flow(splits),
        "demographics": "; ".join(f"{role}: {_who(part)}" for role, part in splits.items()) + ".",
        "performance": f"Macro AUROC {_interval(macro['auroc'])}; random network "
        f"{_interval(result['random']['macro']['auroc'])}; paired difference "
        f"{_interval(result['difference']['macro']['auroc'], '+')}. By finding and group: `evaluation/{task}.csv`, "
        "`report.html`.",
        "accuracy": "Sensitivity, specificity and predictive values with intervals: model card and report.",
        "limitations": "One pre-training: intervals are over patients, "
        + ("draws of the labels and trainings of the fine-tuning, " if task == "finetune" else "")
        + "not over other pre-trainings, hospitals or errors in the labels.",
        "availability": f"Software: otcxr {__version__}, Apache-2.0. Weights and settings: this folder.",
        "analysis": f"Frozen features judged beside an untrained network; {settings['seeds']} draws of every share of "
        "the labels, by patient; recalibration " + settings["recalibration"] + " on validation images.",
        "imbalance": "No resampling or weighting; average precision is shown beside the prevalence, thresholds are "
        "chosen on validation images.",
        "fairness": f"AUROC, sensitivity and false positive rate within groups by {', '.join(settings['subgroups'])}, "
        "with the gaps to all others at one threshold for everybody.",
        "output": "A probability for each finding; thresholds with their rules are in `classifier/"
        f"{task}/classifier.json`." if (run.path / "classifier" / task).is_dir() else "",
        "events": _events(splits["fit"]),
        "specification": f"Weights, architecture, recalibration and thresholds: `classifier/{task}/`; encoder digest "
        f"{encoder['digest']}." if (run.path / "classifier" / task).is_dir() else "",
        "updating": "None.",
        "poor_input": "Images that cannot be read are refused with a reason; other poor input is not detected.",
    }  # fmt: skip
    facts["_task"], facts["_table"] = task, _performance_table(result)
    facts["_groups"] = _group_lines(result)
    return facts


_TASK = {"linear": "a linear probe", "finetune": "fine-tuning", "knn": "nearest neighbours"}


def _model_card(run: Run, facts: Mapping[str, str]) -> str:
    lines = [
        f"# Model card: {run.name}", "",
        f"Written by otcxr {__version__} from the files of the run. {OPEN} marks what they cannot say.", "",
        "## Model", "", facts["kind"], "", facts["model"], "", facts["training"], "", facts["specification"], "",
        "## Intended use", "", f"{OPEN} Not a medical device: not for diagnosis.", "",
        "## Data", "", facts["source"], "", facts["flow"], "", facts["demographics"], "",
        "## Performance", "", facts["performance"], "", facts["_table"], "",
        facts["power"], "",
        "## Groups", "", facts["_groups"], "",
        "## Limitations", "", facts["limitations"], "", OPEN, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _performance_table(result: Mapping[str, Any]) -> str:
    columns = ("auroc", "average_precision", "sensitivity", "specificity", "positive_predictive_value",
               "negative_predictive_value", "brier", "calibration_slope")  # fmt: skip
    names = ("AUROC", "average precision", "sensitivity", "specificity", "PPV", "NPV", "Brier", "calibration slope")
    lines = [f"| finding | positive | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for finding, row in result["findings"].items():
        cells = [_interval(row[c]) if c in row else "" for c in columns]
        lines.append(f"| {finding} | {row['positives']} of {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _group_lines(result: Mapping[str, Any]) -> str:
    """Gaps whose interval leaves out zero, and how many were looked at: nobody reads two hundred numbers."""
    found, looked = [], 0
    for attribute, groups in result.get("subgroups", {}).items():
        for value, group in groups.items():
            for finding, row in group["findings"].items():
                for measure in ("auroc", "sensitivity", "false_positive_rate"):
                    gap = row[measure]["gap"]
                    if gap["value"] is None:
                        continue
                    looked += 1
                    if gap["low"] > 0 or gap["high"] < 0:
                        found.append(f"- {attribute} {value}, {finding}: {measure.replace('_', ' ')} "
                                     f"{_interval(gap, '+')} against all others")  # fmt: skip
    if not looked:
        return "No group was large enough to be measured, or none is known."
    lines = found or ["None."]
    level = result["intervals"]["level"]
    return (f"Of {looked} gaps that were measured these have a {100 * level:.0f} % interval that leaves out zero, "
            f"without correction for being many (about {(1 - level) * looked:.0f} would by chance):\n\n"
            + "\n".join(lines))  # fmt: skip


def _power(power: Mapping[str, Any]) -> str:
    if not power or power.get("macro") is None:
        return ""
    return (f"The test images can show a difference of the macro AUROC to {power['to']} of {power['macro']:.3f} or "
            f"more with a power of {100 * power['power']:.0f} %.")  # fmt: skip


def _seen_before(result: Mapping[str, Any]) -> str:
    """Whether the encoder saw, without labels, patients that it is judged on."""
    seen = result.get("pretraining", {})
    if seen.get("source") != result["collection"]:
        return f"{OPEN} whether patients of the pre-training are among those judged: it used another source."
    if seen["split"] in ("", result["splits"]["test"]["name"]):
        return "The pre-training saw the images that are judged on, without labels."
    return f"The pre-training saw split '{seen['split']}' alone, whose patients are not among those judged."


def _flow(splits: Mapping[str, Any]) -> str:
    return (
        "; ".join(
            f"{role}: {part['images']} images of {part['patients']} patients, {len(part['skipped'])} left out"
            for role, part in splits.items()
        )
        + "."
    )


def _who(part: Mapping[str, Any]) -> str:
    quartiles = part["age"]["quartiles"]
    age = f"age {quartiles[1]:.0f} ({quartiles[0]:.0f} to {quartiles[2]:.0f})" if quartiles else "age unknown"
    return f"{age}, sex {_counted(part['sex'])}, view {_counted(part['view'])}"


def _events(part: Mapping[str, Any]) -> str:
    return "; ".join(f"{f} {k} of {part['assessed'][f]}" for f, k in part["positives"].items()) + "."


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "not estimable"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"
