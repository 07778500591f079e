"""The claims of the source (one row each), from the numbers of the studies that were made to test them.

    python benchmarks/write_claims.py        docs/results/claims.md

A verdict follows from a rule that was fixed before the study was run: differences are ahead, behind, level or open as
``STATES`` says. A claim about several rows or measures holds where all are ahead, does not hold where one is behind or
level, and cannot be decided here otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from otcxr.files import write_atomic
from otcxr.report import MARKS, study_interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
MARGIN = {"auroc": 0.02, "dice": 0.01, "pointing": 0.02, "plan": 0.02, "lung_energy": 0.02}
RIVALS = ("simclr", "densecl", "pcrlv2", "moco", "byol", "simsiam", "barlow", "vicreg", "vicregl", "dino")
# without CV-SIM, and with its teaching but not its masses: only ahead of both the masses are what helps
UNIFORM = ("otcxr-uniform", "otcxr-uniform-taught")
PAIRINGS = ("contrastive-ot", "otcxr-pixelwise", "otcxr-nearest", "otcxr-geometry")
STATES = {
    "ahead": "the 95 % interval of the paired difference, by itself, lies on the claim's side of 0 (p after Holm: "
    "in the study's tables)",
    "behind": "it lies on the other side",
    "level": "it holds 0 and lies within a margin around it (AUROC, localisation, pairs, heat in lungs 0.02; Dice "
    "0.01): a difference that matters is excluded",
    "open": "it holds 0 and is wider: the smallest difference that could have been seen is said",
}
NAMES = {"auroc": "AUROC", "dice": "Dice", "pointing": "localisation", "plan": "pairs", "lung_energy": "heat in lungs"}
TASKS = {"linear": "linear probe", "finetune": "fine-tuning", "segment-token": "masks by a linear probe of tokens",
         "localize-linear": "heat maps of the linear probe"}  # fmt: skip
SHARES = {"1": "all labels", "0.1": "10 %", "0.01": "1 %"}


class Gap(NamedTuple):
    """The reference less a row, in one measure; the interval is of the paired difference."""

    row: str
    task: str
    share: str
    measure: str
    value: float
    low: float
    high: float
    detectable: float | None

    @property
    def state(self) -> str:
        margin = MARGIN[self.measure]
        if self.low > 0:
            return "ahead"
        if self.high < 0:
            return "behind"
        return "level" if -margin < self.low and self.high < margin else "open"

    def __str__(self) -> str:
        seen = "" if self.state != "open" or self.detectable is None else f", could be seen: {self.detectable:.3f}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.state}{seen}"


def gap(results: dict[str, Any], row: str, task: str, share: str, measure: str) -> Gap | None:
    """The reference less ``row``; None where it was not measured."""
    table = results["tasks"].get(task, {}).get(share, {}).get("test", {})
    found = table.get("to_reference", {}).get(row, {}).get("macro", {}).get(measure)
    if found is None or found["value"] is None or found["low"] is None:
        return None
    return Gap(row, task, share, measure, -found["value"], -found["high"], -found["low"], found.get("detectable"))


def verdict(gaps: list[Gap]) -> str:
    """Of a claim that the reference is ahead in all of these."""
    states = {one.state for one in gaps}
    if not states:
        return "cannot be decided here"
    if states == {"ahead"}:
        return "holds"
    return "does not hold" if states & {"behind", "level"} else "cannot be decided here"


def counts(gaps: list[Gap]) -> str:
    """How many are ahead, level, behind, open."""
    found = {state: sum(one.state == state for one in gaps) for state in ("ahead", "level", "behind", "open")}
    return ", ".join(f"{count} {state}" for state, count in found.items() if count)


def against(results: dict[str, Any], rows: tuple[str, ...], task: str, share: str, measure: str) -> list[Gap]:
    found = [gap(results, row, task, share, measure) for row in rows]
    return [one for one in found if one is not None]


def closest(gaps: list[Gap]) -> str:
    """The row that does best against the reference, and by how much the reference is ahead of it."""
    if not gaps:
        return "not measured"
    one = min(gaps, key=lambda g: g.value)
    return f"{NAMES[one.measure]}, {TASKS[one.task]}, {SHARES[one.share]}, against `{one.row}`: {one}"


def exact_ratios() -> dict[int, float]:
    """Positions of a view -> time of exact transport (ot.emd) over that of the solver, one thread, to 0.001."""
    found = {}
    for name in ("128x49", "32x196", "8x400", "2x784"):
        cell = json.loads((RESULTS / "sinkhorn" / f"speed-{name}-eps0.05-t1.json").read_text())
        group = next(g for g in cell["groups"] if g["objective"] == "R" and g["target"] == 0.001)
        exact, ours = (group["contestants"].get(who, {}).get("median_ms") for who in ("exact", "native"))
        if exact and ours:
            found[int(name.split("x")[1])] = exact / ours
    return found


def costs() -> tuple[str, str]:
    """Number and verdict of claim 6."""
    step = json.loads((RESULTS / "step.json").read_text())["cpu, width 64"]["otcxr"]
    after = json.loads((RESULTS / "after.json").read_text())["rows"]["otcxr"]
    ratios = ", ".join(f"{ratio:.1f} at n = {n}" for n, ratio in exact_ratios().items())
    left = {
        name: (after[f"{key}_ratio"], after[f"{key}_ratio_middle"])
        for name, key in (("inference", "inference"), ("fine-tuning step", "finetune_step"))
    }
    told = ", ".join(f"{name} {ratio:.2f} (half of the turns in {low:.2f} to {high:.2f})"
                     for name, (ratio, (low, high)) in left.items())  # fmt: skip
    number = (
        f"{100 * step['shares']['sinkhorn']:.2f} % of a step for Sinkhorn, {100 * step['share']:.1f} % with cost and "
        f"CV-SIM (ResNet-18, [step.json](step.json)); exact transport over Sinkhorn: {ratios} "
        f"([sinkhorn](sinkhorn.md)); against random weights of the same architecture: {told}, memory "
        f"{after['memory_ratio']:.2f} ([after.json](after.json))"
    )
    same = all(0.95 < ratio < 1.05 for ratio, _ in left.values()) and 0.95 < after["memory_ratio"] < 1.05
    return number, "holds" if step["share"] < 0.05 and same else "does not hold"


def gallery(folder: Path) -> tuple[str, str]:
    """Number and verdict of claim 4."""
    if not (folder / "gallery.json").is_file():
        return "no gallery yet", "cannot be decided here"
    told = json.loads((folder / "gallery.json").read_text())
    words = {"only a rival": "only one other row (controls among them)"}
    found = ", ".join(f"{words.get(what, what)}: {told['counts'][what]}" for what in told["groups"])
    page = f"studies/{folder.name}/report.html"
    return f"of {told['pairs']} findings of test images, {found} (one seed; [page]({page}))", "shown"


def named(gaps: list[Gap]) -> str:
    return "; ".join(f"{NAMES[g.measure]} against `{g.row}`: {g}" for g in gaps) or "not measured"


def pairs(results: dict[str, Any]) -> str:
    """The plan's correspondence beside nearest neighbours on the same map and beside what rivals match."""
    table = results["tasks"].get("correspondence", {}).get("1", {}).get("test", {})
    gain = table.get("rows", {}).get(results["study"]["reference"], {}).get("macro", {}).get("plan_gain")
    own = "" if gain is None or gain["value"] is None else (
        f"plan less nearest neighbour: {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]; ")  # fmt: skip
    return own + named(against(results, ("densecl", "vicregl"), "correspondence", "1", "plan"))


def rows_of(results: dict[str, Any], folder: Path) -> list[tuple[str, str, str]]:
    """(claim, number with interval, verdict) of every claim."""
    main = [("linear", "0.01", "auroc"), ("linear", "0.1", "auroc"), ("localize-linear", "1", "pointing"),
            ("segment-token", "1", "dice")]  # fmt: skip
    rivals = {f"{task}, {share}": against(results, RIVALS, task, share, measure) for task, share, measure in main}
    won = sum(bool(gaps) and {g.state for g in gaps} == {"ahead"} for gaps in rivals.values())
    lost = sum(verdict(gaps) == "does not hold" for gaps in rivals.values())
    tuned = [g for share in SHARES for g in against(results, RIVALS, "finetune", share, "auroc")]
    every = [g for gaps in rivals.values() for g in gaps] + tuned
    first = "holds" if won >= 2 else "does not hold" if lost >= 3 else "cannot be decided here"
    uniform = [g for task, measure in (("segment-token", "dice"), ("linear", "auroc"),
                                       ("localize-linear", "lung_energy"))
               for g in against(results, UNIFORM, task, "1", measure)]  # fmt: skip
    pairing = [g for task, measure in (("segment-token", "dice"), ("linear", "auroc"))
               for g in against(results, PAIRINGS, task, "1", measure)]  # fmt: skip
    best = [closest(gaps) for gaps in (*rivals.values(), tuned) if gaps]
    best += [f"{TASKS[task]}, {SHARES[share]}: not estimable, labels are too few in some seed"
             for task, share, _ in main if not rivals[f"{task}, {share}"]]  # fmt: skip
    return [
        ("OTCXR is ahead of every rival in at least two of: linear probe at 1 %, at 10 % of the labels, localisation, "
         "Dice", f"the rival that comes nearest: {'; '.join(best)}. All comparisons, with fine-tuning: {counts(every)}",
         first),
        ("Learned masses are better than uniform ones, whose heat maps lie outside the lungs more",
         named(uniform), verdict(uniform)),
        ("Transport is better than naive OT beside a contrastive loss, than equal cells, nearest neighbours and the "
         "true geometry", named(pairing), verdict(pairing)),
        ("Heat maps of all methods side by side with boxes, the case where all of them miss among them",
         *gallery(folder)),
        ("Plan, cost, both masses and attention, drawn on real radiographs",
         "[picture](../images/explorer.png), [how](../pictures.md)", "shown"),
        ("Transport costs little in training, and nothing of it remains", *costs()),
    ]  # fmt: skip


def table(results: dict[str, Any], folder: Path) -> list[str]:
    """One row for each claim, and what the plan pairs."""
    lines = ["| | claim | number | verdict |", "|---|---|---|---|"]
    lines += [f"| {n} | {' | '.join(row)} |" for n, row in enumerate(rows_of(results, folder), start=1)]
    return [*lines, "", "Pairs of positions (share within one cell of the true place; the study asked for 0.05 above "
            f"both): {pairs(results)}."]  # fmt: skip


def less(estimate: dict[str, Any] | None) -> str:
    """The reference less a row, of an estimate of the row less the reference; in bold where it leaves out 0."""
    if estimate is None or estimate["value"] is None:
        return ""
    turned = {"value": -estimate["value"], "low": -estimate["high"], "high": -estimate["low"]}
    text = study_interval(estimate | turned, "+")
    return f"**{text}**" if turned["low"] > 0 or turned["high"] < 0 else text


def table_of_gaps(results: dict[str, Any]) -> list[str]:
    """AUROC of the reference and of a random network, then the reference less every other row, for every share."""
    about = results["study"]
    columns = []
    for task in ("linear", "finetune"):
        for share in SHARES:
            test = results["tasks"].get(task, {}).get(share, {}).get("test", {})
            columns += [
                (f"{TASKS[task]}, {SHARES[share]}{f', {group}' if group else ''}", table)
                for group, table in (("", test), *test.get("within", {}).items())
                if table and table["rows"][about["reference"]]["macro"]["auroc"]["value"] is not None
            ]
    lines = [f"| | {' | '.join(what for what, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    counted = [len(table["rows"][about["reference"]]["macro"]["findings"]) for _, table in columns]
    lines.append(f"| findings | {' | '.join(map(str, counted))} |")
    for row in (about["reference"], "random"):
        cells = [study_interval(table["rows"][row]["macro"]["auroc"]) for _, table in columns]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    for row in columns[0][1]["to_reference"]:
        cells = [less(table["to_reference"].get(row, {}).get("macro", {}).get("auroc")) for _, table in columns]
        lines.append(f"| less `{row}` | {' | '.join(cells)} |")
    met = [f"{mark} {said}" for mark, said in MARKS.items() if mark in "".join(lines)]
    return [*lines, "", *(line for one in met for line in (one, ""))]


READ = (
    "AUROC of OTCXR and of a random network, then OTCXR less every other row, each interval by itself, in bold where "
    "it leaves out 0."
)


def beside(results: dict[str, Any]) -> list[str]:
    """AUROC of a study of real radiographs, without verdicts: it has few images and no masks."""
    about = results["study"]
    return [
        "", f"## On real radiographs: {about['name']}", "",
        f"{about['text'].strip()} {READ} What is not in the table has no mean, as fewer than half "
        f"of the findings are estimable. With Holm's p: [tables](studies/{about['name']}/README.md).", "",
        *table_of_gaps(results), f"Pairs of positions: {pairs(results)}.",
    ]  # fmt: skip


def again(results: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """The linear probe of a second study with labels enough, and what claim 1 comes to with it.

    The claim asks for two of four measures. Dice is the first study's; the probe with 1 and 10 % of the labels is this
    one's, either of which is enough.
    """
    about = results["study"]
    dice = verdict(against(first, RIVALS, "segment-token", "1", "dice"))
    probe = {share: against(results, RIVALS, "linear", share, "auroc") for share in ("0.1", "0.01")}
    states = {share: verdict(gaps) for share, gaps in probe.items()}
    if dice == "holds" and "holds" in states.values():
        said = "holds"
    else:
        said = "does not hold" if set(states.values()) == {"does not hold"} else "cannot be decided here"
    told = "; ".join(
        f"{SHARES[share]}: {counts(gaps) or 'not estimable'} (nearest: {closest(gaps)})"
        for share, gaps in probe.items()
    )
    corrected = {share: sum(_after_holm(results, row, share) for row in RIVALS) for share in probe}
    holm = ", ".join(f"{count} of {len(RIVALS)} with {SHARES[share]}" for share, count in corrected.items())
    return [
        "", f"## Again, with more images behind each share: {about['name']}", "",
        f"{about['text'].strip()} [The rule and what was expected]"
        "(exploration.md#a-second-study-more-images-behind-each-share) were committed before it was run. "
        f"{READ} With Holm's p: [tables](studies/{about['name']}/README.md).",
        "", *table_of_gaps(results),
        f"Against the {len(RIVALS)} rivals, {told}. After Holm over the rows OTCXR is ahead of {holm}. **Claim 1, with "
        f"Dice from the first study and the probe from this one: {said}**. The verdict above stays that of the study "
        "that was made to test the claims.",
    ]  # fmt: skip


def _after_holm(results: dict[str, Any], row: str, share: str) -> bool:
    """Whether the reference is ahead of a row with p below 0.05 after Holm over the rows."""
    found = results["tasks"]["linear"][share]["test"]["to_reference"].get(row, {}).get("macro", {}).get("auroc", {})
    return found.get("p_holm") is not None and found["p_holm"] < 0.05 and found["value"] < 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="headline", help="folder below docs/results/studies")
    parser.add_argument("--again", default="headline-labels", help="folder of the study with more labels")
    parser.add_argument("--real", default="headline-nih", help="folder of the study of real radiographs")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims.md")
    words = parser.parse_args()
    folder = RESULTS / "studies" / words.study
    results = json.loads((folder / "results.json").read_text())
    about = results["study"]
    head = [
        "# Claims", "",
        "The claims of the source, tested once by a study whose form, regimes and rules were committed before it was "
        f"run: [{about['name']}](studies/{words.study}/README.md), seeds "
        f"{', '.join(map(str, about['seeds']))}. Differences are OTCXR less the other, paired by seed and image, with "
        "95 % intervals; +: OTCXR is ahead. Written by `benchmarks/write_claims.py` from JSON.", "",
        *(f"- *{word}*: {text}" for word, text in STATES.items()), "",
        "A claim about several rows or measures holds where all are ahead, does not hold where one is behind or level, "
        "and cannot be decided here otherwise. [What follows, why, and what to try "
        "next](exploration.md#after-the-final-study).", "",
    ]  # fmt: skip
    second, real = (RESULTS / "studies" / name / "results.json" for name in (words.again, words.real))
    text = "\n".join([
        *head, *table(results, folder),
        *(again(json.loads(second.read_text()), results) if second.is_file() else []),
        *(beside(json.loads(real.read_text())) if real.is_file() else []),
    ])  # fmt: skip
    write_atomic(words.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
