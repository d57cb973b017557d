"""A result stands in a table that is written from a committed JSON, not in prose.

Numbers in prose are settings, sizes of data or published figures, and are listed here, each with what it is. A result
that somebody types by hand is none of them, and fails.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from kmq_jax.study import tables

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?(?: ?%| times)?")

FACTS = {
    "6.63": "million parameters of WeSpeaker's ResNet34",
    "3,465": "training utterances, so762/train and words/train",
    "166": "training speakers",
    "60": "speakers of so762/dev",
    "11": "speakers of words/dev",
    "40": "speakers of synthetic:dev and of synthetic:test",
    "95 %": "confidence of intervals",
    "100 %": "what shares need not add up to",
    "2": "bits",
    "3": "bits",
    "4": "bits",
}
"""Numbers that the README's results may name in prose."""

UNTRACED = {
    "0.78", "0.94", "1.03", "0.63", "0.68", "64 times", "0.67", "2.4", "0.98", "40 %", "0.89", "461", "1,440",
    "1.03 times", "4,898", "1,250", "59.8", "51,200", "579,818", "1,000", "16", "200", "256", "350", "2.13", "2", "4",
}  # fmt: skip
"""Speeds that `kmq-jax bench` printed before its lines were kept, and the sizes they were measured at. To be replaced
by tables of committed lines, not to be added to."""

RESULT = re.compile(r"\b(EER|minDCF|cosine|drift|flips?|recovers?)\b|\bexamples? a second\b|\b\d+ min\b")


def section(text, title):
    start = text.index(f"\n## {title}\n")
    return text[start : text.index("\n## ", start + 4)]


def prose(text):
    """The text without what is generated, code, pictures and links."""
    for what in (r"```.*?```", r"<!-- table:.*?<!-- end -->", r"<[^>]*>", r"!?\[[^\]]*\]\([^)]*\)", r"`[^`]*`"):
        text = re.sub(what, "", text, flags=re.DOTALL)
    return text


def numbers(text):
    return {found[0].strip() for found in NUMBER.finditer(prose(text))}


def test_the_readme_states_no_result_outside_its_generated_tables():
    text = (ROOT / "README.md").read_text()
    typed = numbers(section(text, "What comes of it")) - set(FACTS)
    assert not typed, f"typed by hand, with no JSON behind: {sorted(typed)}"


def test_no_further_speed_is_typed_by_hand():
    typed = numbers(section((ROOT / "README.md").read_text(), "Speed")) - UNTRACED
    assert not typed, f"typed by hand, with no JSON behind: {sorted(typed)}"


@pytest.mark.parametrize(
    ("page", "kinds"),
    [
        ("README.md", {"bits", "trained", "components", "cascades"}),
        ("launch/README.md", {"fuzz", "faults"}),
        ("kmq_jax/README.md", {"house"}),
    ],
)
def test_every_generated_table_comes_from_a_committed_file(page, kinds):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    blocks = tables.BLOCK.findall(text)
    assert {kind for _, _, kind, _ in blocks} >= kinds
    for _, file, _, _ in blocks:
        assert (folder / file).resolve().parent == ROOT / ".github/results" and (folder / file).is_file()
    assert tables.fill(text, folder) == text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_states_no_result_but_published_ones(path):
    """A paragraph about errors holds a number only where it is the paper's, and results are pointed to by file."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for paragraph in docstring.split("\n\n"):
        if RESULT.search(prose(paragraph)) and not paragraph.startswith("    "):
            decimals = {number for number in numbers(paragraph) if re.search(r"\.\d|%", number)}
            assert not decimals or "Published by the paper" in paragraph, f"{path.name}: {decimals} with no JSON behind"
    for file in re.findall(r"\.github/results/[\w.-]+\.jsonl?", docstring):
        assert (ROOT / file).is_file()


def test_what_would_be_a_result_is_found():
    """The rules above, on sentences that they must refuse."""
    assert numbers("at 2 bits 3.4 % of the decisions turn wrong, +0.27 points") - set(FACTS) == {"3.4 %", "+0.27"}
    assert numbers("<!-- table: a.json bits -->\n| 9.99 |\n<!-- end --> and `--x=7` and [8.8](b)") == set()
    assert (
        RESULT.search("EER was 1.01") and RESULT.search("took 3 min 11 s") and not RESULT.search("32 crops of 1.5 s of")
    )


@pytest.mark.parametrize("path", sorted((ROOT / ".github/results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_how_many_trials_they_come_from(path):
    found = json.loads(path.read_text())
    if "notes" in found:
        assert found["notes"]["trials"] > 0 and found["notes"]["utterances"] > 0
        return
    if found.get("kind") == "networks":  # counts and times, of no trials
        assert all(row["parameters_as_source"] for row in found["rows"])
        return
    if found.get("kind") == "install":
        assert all(
            found[form]["megabytes"] > sum(list(found[form]["heaviest"].values())[:4]) for form in ("whole", "light")
        )
        return
    if found.get("kind") == "threshold":
        assert all(one["trials"] > 0 and one["speakers"] > 0 for one in (found, found["judged_on"]))
        return
    if found.get("kind") == "faults":
        assert all(row["made_by"].startswith("launch/") and not row["violations"] for row in found["rows"])
        return
    if found.get("kind") == "house":  # counts of source
        assert [column["name"] for column in found["columns"]] == ["before", "now"]
        return
    if found.get("kind") == "fuzz":
        assert found["tried"] == sum(row["clean"] + row["violations"] for row in found["classes"]) >= 2500
        return
    for row in found["rows"]:
        assert all(one["trials"] > 0 and one["speakers"] > 0 for one in row["sets"].values())
