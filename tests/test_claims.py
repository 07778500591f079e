"""Verdicts on claims follow their rules, whatever the numbers are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("write_claims", ROOT / "benchmarks" / "write_claims.py")
claims = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(claims)


def found(low, high, measure="dice", row="simclr"):
    return claims.Gap(row, "segment-token", "1", measure, (low + high) / 2, low, high, 0.03)


WIDE = found(-0.05, 0.07)  # open whatever the measure
AHEAD, BEHIND, LEVEL, OPEN = found(0.001, 0.03), found(-0.03, -0.001), found(-0.004, 0.009), found(-0.005, 0.011)


def test_states():
    assert [one.state for one in (AHEAD, BEHIND, LEVEL, OPEN)] == ["ahead", "behind", "level", "open"]
    assert found(-0.004, 0.011, "auroc").state == "level"  # within the margin of another measure
    assert str(OPEN) == "+0.003 [-0.005, +0.011], open, could be seen: 0.030"
    assert "could be seen" not in str(LEVEL)


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([AHEAD, AHEAD], "holds"),
        ([AHEAD, LEVEL], "does not hold"),
        ([AHEAD, OPEN, BEHIND], "does not hold"),
        ([AHEAD, OPEN], "cannot be decided here"),
        ([], "cannot be decided here"),
    ],
)
def test_a_claim_holds_only_where_every_difference_is_ahead(gaps, said):
    assert claims.verdict(gaps) == said


def test_differences_are_turned_to_the_reference():
    """A study tells the other row less the reference; a claim is about the reference."""
    told = {"value": -0.02, "low": -0.03, "high": -0.01, "detectable": 0.01}
    results = {"tasks": {"linear": {"1": {"test": {"to_reference": {"simclr": {"macro": {"auroc": told}}}}}}}}
    gap = claims.gap(results, "simclr", "linear", "1", "auroc")
    assert (gap.value, gap.low, gap.high, gap.state) == (0.02, 0.01, 0.03, "ahead")
    assert claims.gap(results, "byol", "linear", "1", "auroc") is None
    told["value"] = None
    assert claims.gap(results, "simclr", "linear", "1", "auroc") is None


def rows(shift):
    """Results in which every rival and control is behind by ``shift``, with an interval of +-0.01."""
    told = {"value": -shift, "low": -shift - 0.01, "high": -shift + 0.01, "detectable": 0.014}
    others = (*claims.RIVALS, "otcxr-uniform", "otcxr-uniform-taught", "contrastive-ot", "otcxr-pixelwise",
              "otcxr-nearest", "otcxr-geometry")  # fmt: skip
    measures = {"linear": ("auroc",), "segment-token": ("dice",), "localize-linear": ("pointing", "lung_energy")}
    return {
        "study": {"reference": "otcxr"},
        "tasks": {
            task: {share: {"test": {"to_reference": {row: {"macro": dict.fromkeys(names, told)} for row in others}}}
                   for share in claims.SHARES}
            for task, names in measures.items()
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shift", "said"), [(0.05, "holds"), (-0.05, "does not hold"), (0.005, "cannot be decided here")]
)
def test_the_table_has_a_row_for_each_claim(shift, said):
    results = rows(shift)
    if said == "cannot be decided here":
        for task in results["tasks"].values():  # wider than any margin
            for share in task.values():
                for row in share["test"]["to_reference"].values():
                    row["macro"] = {name: {**told, "low": -0.06, "high": 0.05} for name, told in row["macro"].items()}
    lines = claims.table(results, ROOT / "docs" / "results" / "studies" / "dense")
    told = [line.split(" | ") for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert [row[0] for row in told] == [f"| {n}" for n in range(1, 7)]
    assert [row[-1] for row in told[:3]] == [f"{said} |"] * 3


def test_real_radiographs_stand_beside_without_a_verdict():
    results = rows(0.05)
    results["study"] |= {"name": "real", "text": "Few images."}
    del results["tasks"]["segment-token"], results["tasks"]["linear"]["0.01"]
    whole, few = (results["tasks"]["linear"][share]["test"] for share in ("1", "0.1"))
    whole["rows"] = {
        name: {"macro": {"findings": ["a", "b"], "auroc": {"value": value, "low": 0.6, "high": 0.9}}}
        for name, value in (("otcxr", 0.8), ("random", 0.7))
    }
    wide = {"value": 0.02, "low": -0.5, "high": 0.5, "seed_freedom": 1}
    whole["within"] = {"view=AP": {"rows": whole["rows"], "to_reference": {"simclr": {"macro": {"auroc": wide}}}}}
    few["rows"] = {name: {"macro": {"findings": [], "auroc": {"value": None}}} for name in ("otcxr", "random")}
    lines = claims.beside(results)
    assert "| | linear probe, all labels | linear probe, all labels, view=AP |" in lines
    assert "| findings | 2 | 2 |" in lines
    assert "| `random` | 0.700 [0.600, 0.900] | 0.700 [0.600, 0.900] |" in lines
    assert "| less `simclr` | **+0.050 [+0.040, +0.060]** | -0.020 [-0.500, +0.500] ‡ |" in lines
    assert any(line.startswith("‡ one degree of freedom") for line in lines)
    assert not any("†" in line for line in lines)
    assert "| less `otcxr-geometry` | **+0.050 [+0.040, +0.060]** |  |" in lines
    assert "holds" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("tenth", "hundredth", "dice", "said"),
    [
        (AHEAD, WIDE, AHEAD, "holds"),  # two of the four measures
        (WIDE, AHEAD, AHEAD, "holds"),
        (AHEAD, AHEAD, WIDE, "cannot be decided here"),  # as long as Dice is not one of them
        (WIDE, BEHIND, AHEAD, "cannot be decided here"),
        (BEHIND, BEHIND, AHEAD, "does not hold"),
    ],
)
def test_a_second_study_decides_by_the_rule_of_its_own(tenth, hundredth, dice, said):
    def told(one, p):
        return {"value": -one.value, "low": -one.high, "high": -one.low, "detectable": one.detectable, "p_holm": p}

    first, second = rows(0.05), rows(0.05)
    second["study"] |= {"name": "more", "text": "More labels."}
    for results, task, share, measure, one in (
        (first, "segment-token", "1", "dice", dice), (second, "linear", "0.1", "auroc", tenth),
        (second, "linear", "0.01", "auroc", hundredth),
    ):  # fmt: skip
        results["tasks"][task][share]["test"]["to_reference"]["vicregl"] = {"macro": {measure: told(one, 0.2)}}
    for share in claims.SHARES:
        test = second["tasks"]["linear"][share]["test"]
        test["rows"] = {name: {"macro": {"findings": ["a"], "auroc": {"value": 0.7, "low": 0.6, "high": 0.8}}}
                        for name in ("otcxr", "random")}  # fmt: skip
        for row in set(claims.RIVALS) - {"vicregl"}:
            test["to_reference"][row]["macro"]["auroc"] = told(AHEAD, 0.01)
    del second["tasks"]["localize-linear"], second["tasks"]["segment-token"]
    lines = claims.again(second, first)
    assert f"probe from this one: {said}**" in lines[-1]
    assert "After Holm over the rows OTCXR is ahead of 9 of 10 with 10 %, 9 of 10 with 1 %." in lines[-1]
    shown = [claims.less(told(one, 0.2)) for one in (tenth, hundredth)]
    assert f"| less `vicregl` | **+0.050 [+0.040, +0.060]** | {' | '.join(shown)} |" in lines


def test_what_transport_costs_is_told_from_its_files():
    number, said = claims.costs()
    after = json.loads((ROOT / "docs" / "results" / "after.json").read_text())["rows"]["otcxr"]
    assert f"inference {after['inference_ratio']:.2f}" in number
    assert f"memory {after['memory_ratio']:.2f}" in number
    step = json.loads((ROOT / "docs" / "results" / "step.json").read_text())["cpu, width 64"]["otcxr"]
    assert f"{100 * step['share']:.1f} % with cost and CV-SIM" in number
    assert said == ("holds" if step["share"] < 0.05 else "does not hold")
