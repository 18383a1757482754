"""RESULTS.md and the table of the README: made from the committed JSON.

pytest tests/test_extras_results.py
"""

import json
import re
from pathlib import Path

import pytest

from extras import results

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_results_and_the_readme_are_what_extras_results_makes():
    """After a change of the committed JSON or of a table: python -m extras.results."""
    assert read("RESULTS.md") == results.document()
    for page in results.PAGES:
        assert read(page) == results.with_table(read(page)), page


def test_a_policy_that_was_not_evaluated_is_a_dash_in_the_readme():
    assert results.rates({}, "seen") == "-"
    rate = {"long": {"rate": 0.5, "lo": 0.4, "hi": 0.6}}
    assert results.rates({"splits": {"seen": rate}}, "seen") == "0.50 [0.40, 0.60]"
    with pytest.raises(ValueError, match="expected one line"):
        results.with_table("no marks")


def test_minutes_of_training_are_those_of_the_committed_metrics():
    stages = results.stages(json.loads(read(f"{results.RGBD}/data.json")))
    made = dict(re.findall(r"^\| (\w+) \| \d* \| ([\d.]+) \|$", stages, re.M))
    said = dict(re.findall(r"^\| (\w+) \| `python [^`]*` \|.*\| ([\d.]+) \|$", read("README.md"), re.M))
    assert said == {stage: made[stage] for stage in ("data", "vision", "align", "cotrain", "policy")}


def test_the_contents_of_results_md_lead_to_its_headings():
    text = read("RESULTS.md")
    headings = {results.anchor(line) for line in re.findall(r"^## (.*)$", text, re.M)}
    listed = re.findall(r"^\* \[.*\]\(#([\w-]+)\)$", text, re.M)
    assert len(listed) == len(results.SECTIONS) + 1 and set(listed) <= headings
