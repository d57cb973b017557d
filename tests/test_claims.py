"""What a page says of results is in a committed JSON: in a generated table, or in a sentence that is checked here.

Every sentence of the pages and of the configurations' docstrings that speaks of a result is a claim, with the file that
it comes from and what must hold there, or is listed as none, with nothing but settings, methods and published figures.
A new sentence of that kind is neither, and fails.
"""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmq_jax.cascade.costs import savings
from kmq_jax.metrics.paired import told_apart
from kmq_jax.study import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / ".github/results"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAGES = [
    page
    for page in (ROOT / "README.md", RESULTS / "README.md", ROOT / "kmq_jax/cli/README.md", ROOT / "configs/PAPER.md")
    if page.is_file()
]

TABLES_ON = [*PAGES, ROOT / "launch/README.md", ROOT / "kmq_jax/README.md"]
"""Pages with generated tables; what the last two say beside them is of no results."""

RESULT = re.compile(
    r"\b(gains?|costs?|errs?|beyond chance|told apart|no (difference|loss)|grows?|suffers?|recovers?|ruins?|favours?"
    r"|drifts?|saves?|brings? back|most \w+ (is|are|have|lie|make)|does not \w+ within|ends? within|short of"
    r"|lower|higher|slower|faster|(less|more|better|worse|larger|smaller|longer) than|as (fast|long) as"
    r"|of its time|in the noise|examples? a second|(a|an|one|two|ten|few|under|\d+) (seconds?|minutes?|hours?))\b"
)
"""Words in which results are told."""
FIGURE = re.compile(r"(?<![\w.-])[-+]?\d[\d,]*(?:\.\d+| ?%| times\b)")
"""Numbers as results are: with a fraction, percent, or times."""


@dataclass(frozen=True)
class Claim:
    """A part of a sentence, the file behind it, and what must hold of what that holds."""

    says: str
    file: str
    holds: Callable[[Any], object]


def difference(found, recipe, bits, against, on):
    """A row of a study's `differences`, of trained networks."""
    rows = (row for row in found["differences"] if row["trained"])
    return next(
        row for row in rows if (row["recipe"], row["bits"], row["against"], row["set"]) == (recipe, bits, against, on)
    )


def beyond(row, name="eer_change"):
    """The sign of a change that is beyond chance; 0 where none is seen."""
    return (1 if row[name] > 0 else -1) if told_apart(row[f"{name}_ci95"]) else 0


def kmqat_beside_its_control(found):
    less = [[difference(found, "kmqat", bits, "control", on) for bits in (4, 3, 2)] for on in ("so762", "words")]
    rows = [list(map(beyond, of_set)) for of_set in less]
    return rows == [[1, 1, 1], [0, 0, 1]]


def kmqat_beside_ours(rows):
    changes = {(row["network"], row["set"]): round(row["eer_change"], 2) for row in rows if beyond(row) == 1}
    found = {("kmqat-2", "so762"): 1.27, ("kmqat-2", "words"): 1.64, ("kmqat-3", "so762"): 0.88}
    return changes == found | {("kmqat-4", "so762"): 0.64}


def untrained_2_bits(found):
    (row,) = (row for row in found["rows"] if (row["bits"], row["method"]) == (2, "without training"))
    return {name: beyond(one) for name, one in row["sets"].items()}


def beside_kmeans(found: Any) -> list[Any]:
    """Differences of other sets of levels from k-means: of three, at three numbers of bits and two of them trained."""
    sets = ("uniform", "minmax", "powers")
    return [row for row in found["differences"] if row["recipe"] in sets and row["against"] == "distilled"]


BOTH = {
    ("kmqat", 2, True, "distilled", "words"),
    ("minmax", 2, True, "distilled", "so762"),
    ("minmax", 2, False, "full precision", "so762"),
}
EARLIER = {
    ("kmqat", 4, True, "control", "so762"),
    ("minmax", 2, False, "distilled", "so762"),
    ("distilled", 2, False, "full precision", "words"),
}
LATER = {("powers", 2, True, "distilled", "so762"), ("uniform", 2, False, "full precision", "words")}
"""Differences of the small network: recipe, bits, whether trained, against what, and on which set."""

SHOWN = ("full precision", "control", "distilled")
"""What its tables show differences from."""


def small_network(files, expected):
    """Whether those beyond chance are the expected ones, of what the tables show."""
    found = map(found_in, files)
    rows = [row for one in found for row in (one if isinstance(one, list) else one["differences"])]
    signs = {
        (row["recipe"], row["bits"], row["trained"], row["against"], row["set"]): beyond(row)
        for row in rows
        if row["against"] in SHOWN and beyond(row)
    }
    return signs == dict.fromkeys(expected, 1)


def kmqat_is_level(found):
    """Whether KMQAT at 2 bits, with three seeds, is level with this project's recipe and with its control."""
    rows = [
        difference(found, "kmqat", 2, against, on) for against in ("distilled", "control") for on in ("so762", "words")
    ]
    return {row["seeds"] for row in rows} == {3} and not any(map(beyond, rows))


def ours_lose_nothing(found):
    return not any(
        beyond(difference(found, "distilled", bits, "full precision", on)) == 1
        for bits in (3, 2)
        for on in ("so762", "words")
    )


def bits_cost(found):
    against = {
        bits: [beyond(difference(found, "distilled", bits, "control", on)) for on in ("so762", "words")]
        for bits in (4, 3, 2)
    }
    return against == {4: [0, 0], 3: [0, 0], 2: [1, 0]}


def rounding_costs_nothing(found):
    """Of two models on two sets."""
    return [[(row["name"], beyond(row)) for row in one["rows"]] for one in found["sets"]] == [
        [("W4A8", 0), ("W2A8", 0)]
    ] * 2


def of_condition(found, name, bits=2):
    return next(row for row in found["rows"] if (row["condition"], row["bits"]) == (name, bits))


def grown(found):
    """Conditions under which 2 bits lose more EER than on whole recordings, beyond chance."""
    rows = [row for row in found["rows"] if row["bits"] == 2 and "eer_growth" in row]
    return {row["condition"] for row in rows if beyond(row, "eer_growth") == 1}


def saved(found, last, nested=False):
    """What each cascade that ends so saves by utterance of its last level, on every set."""
    chosen = [c for c in found["cascades"] if c["bits"][-1] == last and ("nested" in c["family"]) == nested]
    return [(one, savings(one, last, nested)["utterance"]) for c in chosen for one in c["sets"].values()]


def rescues_save_little(found):
    """By family, what each cascade of a quickstart saves by utterance on the set that chose nothing."""
    shares = {"ptq": [], "distilled": []}
    for one in found["cascades"]:
        shares[one["family"]].append(savings(one["sets"]["test"], one["bits"][-1], nested=False)["utterance"])
    (trained,) = shares["distilled"]
    return len(shares["ptq"]) == 2 and max(shares["ptq"]) <= 0 < trained <= 1 / 40


def row_of(found, network):
    return next(row for row in found["rows"] if row["network"] == network)


def lazy_of(one, system):
    """The row of a cascade or single model on one list."""
    return next(row for row in one["rows"] if row["system"] == system)


def parameters(found, network):
    """In millions, as they are printed."""
    return round(row_of(found, network)["parameters"] / 1e6, 2)


def errors_of(found, method, bits):
    rows = (row for row in found["rows"] if row["method"].startswith(method) and row["bits"] == bits)
    return [one["eer"] for row in rows for one in row["sets"].values()]


def newest(lines, part, what):
    return [line for line in lines if line["part"] == part and line.get("what") == what][-1]


def share_beside_convolutions(lines, part, what):
    times = newest(lines, part, f"{what} kernels")["milliseconds"]
    return (times["elementwise"] + times["reductions"]) / sum(times.values())


def steps_take_as_long(lines):
    before, after = (line for line in lines if (line["part"], line.get("what")) == ("step", "whole"))
    was, now = (line["milliseconds"] for line in lines if line.get("what") == "whole kernels")
    return (
        0.99 < after["step_seconds"] / before["step_seconds"] < 1.01
        and 0.70 < now["reductions"] / was["reductions"] < 0.80
        and 1.15 < now["elementwise"] / was["elementwise"] < 1.25
    )


def copies_of(lines, part, what):
    times = newest(lines, part, f"{what} kernels")["milliseconds"]
    return times["copies"] / sum(times.values())


def knee(found):
    """The fewest bits down to which no row's EER is beyond chance above full precision's, on any set."""
    fine = None
    for row in sorted(found["rows"][1:], key=lambda row: -row["bits"]):
        if any(beyond(one) == 1 for one in row["sets"].values()):
            break
        fine = row["bits"]
    return fine


def before_resnet34(found, first):
    """The rows of a cascade of CAM++ and ResNet34, by set, where its gates may make few flips."""
    return [
        [row for row in one["rows"] if row["system"] == f"{first} > resnet34" and row["alpha"] <= 0.005]
        for one in found["sets"]
    ]


def two_networks_err_less(found):
    so762, words = before_resnet34(found, "campplus-4")
    return len(so762) == 2 and {beyond(row) for row in so762} == {-1} and {beyond(row) for row in words} == {0}


def two_networks_take_longer(found):
    gone_on = [row for one in found["sets"] for row in one["rows"] if row["alpha"] and row["escalated"] > 0.001]
    return len(gone_on) > 8 and all(row["recording_ratio"] > 1 for row in gone_on)


def pair(found, model, less):
    pairs = [one for one in found["between"] if (one["model"], one["less"]) == (model, less)]
    return {one["set"]: beyond(one) for one in pairs}


def training_helps_campplus(found):
    above = {
        beyond(row["sets"][name])
        for row in found["rows"]
        for name in ("so762", "words")
        if row["bits"] == 2 and row["model"] != "trained-long"
    }
    return above == {1} and pair(found, "trained", "ptq-400") == {"so762": -1, "words": -1}


def fitting_saves(found):
    rows = [(row["bits"], row["method"].startswith("not"), beyond(row["sets"]["words"])) for row in found["rows"][1:]]
    ways = (True, False, False)  # not fitted, on embedded voices, on speech
    return sorted(rows) == sorted((bits, rough, int(rough and bits < 4)) for bits in (4, 3, 2) for rough in ways)


def levels_differ(found):
    less = [row for row in found["differences"] if row["against"] == "distilled"]
    more = {(row["recipe"], row["bits"], row["set"]) for row in less if beyond(row) == 1}
    others = ("uniform", "minmax", "powers")
    return (
        len(less) == 18
        and all(beyond(row) >= 0 for row in less)
        and more == {(levels, bits, "so762") for levels in others for bits in (3, 2)} | {("minmax", 2, "words")}
    )


def mirrored(found):
    """By component quantized alone: its share of the weights, and of the drift, a mean over the sets; of 1."""
    rows = [row for one in found["diagnosis"].values() for row in one["retention"] if row["experiment"] == "mirror"]
    names = {row["component"]: row["parameters"] for row in rows}
    drifts = {name: [row["drift_recovery"] / 100 for row in rows if row["component"] == name] for name in names}
    return {name: (weights, sum(drifts[name]) / len(drifts[name])) for name, weights in names.items()}


def most_weights_do_most_harm(found):
    parts = mirrored(found)
    return set(sorted(parts, key=lambda name: parts[name][0])[-2:]) == set(
        sorted(parts, key=lambda name: parts[name][1])[-2:]
    )


CLAIMS = (
    *(Claim("in both networks the two parts that hold most weights do most harm", file, most_weights_do_most_harm)
      for file in ("resnet34-mirror.json", "campplus-mirror.json")),
    Claim("CAM++'s stem and embedding, 4 % of its weights, each make over a quarter of the drift",
          "campplus-mirror.json", lambda found: all(mirrored(found)[part][1] > 1 / 4 for part in ("stem", "embedding"))
          and round(100 * sum(mirrored(found)[part][0] for part in ("stem", "embedding"))) == 4),
    Claim("stage 1 of ResNet34, under 1 % of them, makes a seventh", "resnet34-mirror.json",
          lambda found: mirrored(found)["stage1"][0] < 0.01 and 1 / 7.5 < mirrored(found)["stage1"][1] < 1 / 6.5),
    Claim("CAM++'s pooling, which has no weights to quantize, drifts, too", "campplus-mirror.json",
          lambda found: mirrored(found)["pooling"][0] < 1e-3 and mirrored(found)["pooling"][1] > 0.1),
    Claim("Without training, at 3 and 2 bits, evenly spaced levels, fitted or over the weights' range, and powers of "
          "two err more on so762, beyond chance; on words only those over the range at 2 bits do, and at 4 bits none",
          "levels.json", levels_differ),
    Claim("At 4 bits none is told apart from k-means, on either set", "levels.json", levels_differ),
    Claim("At 3 and 2 bits every other set of levels errs more than k-means on so762, beyond chance; on words only "
          "min-max at 2 bits does", "levels.json", levels_differ),
    Claim("At 4 and 3 bits, trained for an epoch, no loss of EER is seen", "campplus-trained.json",
          lambda found: [{beyond(one) for one in row["sets"].values()} for row in found["rows"]
                         if row["bits"] in (4, 3)] == [{0}] * 2),
    Claim("On so762 the fit on 400 crops errs less than that on 100, beyond chance; on words no difference is seen",
          "campplus-trained.json", lambda found: pair(found, "ptq-400", "ptq-100") == {"so762": -1, "words": 0}),
    Claim("Trained for an epoch the network errs less than the fitted one on both, beyond chance, and still more than "
          "full precision", "campplus-trained.json", training_helps_campplus),
    Claim("it still errs more on so762, beyond chance; on words no difference is seen", "campplus-trained.json",
          lambda found: [{name: beyond(one) for name, one in row["sets"].items()} for row in found["rows"]
                         if row["model"] == "trained-long"] == [{"so762": 1, "words": 0}]),
    Claim("changes the EER of no number of bits by two hundredths of a point on either set", "biases.json",
          lambda found: len(some := [one for row in found["rows"] for one in row["sets"].values()]) == 6
          and all(abs(one["eer_change"]) < 0.02 for one in some)),
    Claim("An hour takes less than 1 GB", "fresh.json",
          lambda found: [row["most_memory"] < 1e9 for row in found["rows"] if "HOUR" in row["command"]] == [True]),
    *(Claim("Without further training neither shows a loss of EER down to 3 bits", file,
            lambda found, bits=bits: knee({"rows": [row for row in found["rows"]
                                         if row["method"] in ("full precision", "without training")]}) == bits)
      for file, bits in (("ecapa-small.json", 3), ("small-baselines.json", 2))),
    Claim("At 2 bits the ECAPA-TDNN errs more on both sets, beyond chance", "ecapa-small.json",
          lambda found: untrained_2_bits(found) == {"so762": 1, "words": 1}),
    Claim("the ResNet on neither", "small-baselines.json",
          lambda found: untrained_2_bits(found) == {"so762": 0, "words": 0}),
    Claim("in its earlier run it did on words", "small-earlier.jsonl",
          lambda rows: [beyond(row) for row in rows if row["recipe"] == "distilled"
                         and (row["bits"], row["trained"], row["set"]) == (2, False, "words")] == [1]),
    Claim("Without it, on so762, full precision errs less, beyond chance, and so does the 2-bit network trained for "
          "7.5 epochs; on words no difference is seen", "campplus-embedding.json",
          lambda found: [{name: beyond(one) for name, one in row["sets"].items()} for row in found["rows"]
                         if row["model"] == "none"] == [{"so762": -1, "words": 0}]
          and pair(found, "trained-long-none", "trained-long") == {"so762": -1, "words": 0}),
    Claim("That 2-bit network is then not told apart from full precision with the ReLU; against full precision without "
          "it, it errs more on so762, beyond chance", "campplus-embedding.json",
          lambda found: [beyond(one) for row in found["rows"] if row["bits"] == 2 for one in row["sets"].values()]
          == [0, 0] and pair(found, "trained-long-none", "none") == {"so762": 1, "words": 0}),
    Claim("By 3D-Speaker's own code all of words/dev has the same EER", "campplus-embedding.json",
          lambda found: [abs(row["eer_change"]) < 0.01 for row in found["between"]
                         if row["less"] == "3D-Speaker's own code"] == [True]),
    Claim("All open the files with integers of at least 4 bits and those by plain arithmetic", "runtimes.json",
          lambda found: len(some := [row for row in found["rows"] if row["form"] != "smallest"]) == 12
          and all(row["cosine"]["least"] > 0.99 for row in some)),
    Claim("Every convolution runs in 8 bits in both that tell, at 4 bits but for the first", "runtimes.json",
          lambda found: {(row["model"], row["integer_convolutions"]) for row in found["rows"]
                         if "cosine" in row and row["runtime"] != "sherpa-onnx"} == {("W4A8", 35), ("W2A8", 36)}),
    Claim("On so762 CAM++ at 4 bits with ResNet34 behind it errs less than ResNet34 alone, beyond chance, where gates "
          "may make 0.1 or 0.5 % of flips; on words no difference is seen", "across.json", two_networks_err_less),
    Claim("By recording of such lists, where each stands in many trials, a cascade that goes on at all takes longer "
          "than ResNet34 for all", "across.json", two_networks_take_longer),
    Claim("No loss of EER is seen down to 3 bits of ResNet34", "resnet34-free.json", lambda found: knee(found) == 3),
    Claim("down to 4 bits of CAM++", "campplus-free.json", lambda found: knee(found) == 4),
    Claim("86 recordings of both sets lie within a cosine of 0.99999", "campplus-reference.json",
          lambda found: sum(one["recordings"] for one in found["sets"]) == 86
          and {one["set"] for one in found["sets"]} == {"so762/dev", "words/dev"}
          and all(one["least"] >= 0.99999 for one in found["sets"])),
    Claim("Of two trainings alone the time was kept", "campplus-trained.json",
          lambda found: [row["model"] for row in found["rows"] if "training" in row] == ["trained-3", "trained-long"]),
    Claim("No network was trained at 8 bits", "campplus-trained.json",
          lambda found: not any(row["bits"] == 8 for row in found["rows"])),
    Claim("whose trials chose the gates, 2 bits without training err more beyond chance, too", "quickstart.json",
          lambda found: all(beyond(row["sets"][name]) == 1 for row in found["rows"] for name in ("dev", "test")
                            if (row["bits"], row["method"]) == (2, "without training"))),
    Claim("Labels and steps on this corpus gain: full precision trained on alike errs less on so762, beyond chance",
          "wespeaker-compare.json",
          lambda found: beyond(difference(found, "distilled", 32, "full precision", "so762")) == -1),
    Claim("Bits cost: against its control this project's network is not told apart at 4 and 3 bits, on either set; at "
          "2 bits it errs more on so762, beyond chance, and on words no difference is seen", "wespeaker-compare.json",
          bits_cost),
    Claim("So 4 and 3 bits are not told apart from full precision that was trained alike, and 2 "
          "bits err more on so762, beyond chance", "wespeaker-compare.json", bits_cost),
    Claim("KMQAT errs more than its control on so762 at 4, 3 and 2 bits and on words at 2 bits, beyond chance; on "
          "words at 4 and 3 bits it is not told apart", "wespeaker-kmqat.json", kmqat_beside_its_control),
    Claim("It errs more than this project's recipe in the same places, beyond chance: at 2 bits by 1.27 points on "
          "so762 and 1.64 on words, on so762 by 0.88 at 3 bits and 0.64 at 4", "kmqat-less-ours.jsonl",
          kmqat_beside_ours),
    Claim("Full precision gains by its loss as well, beyond chance: 0.76 points less on so762 than before",
          "wespeaker-kmqat.json",
          lambda found: round(difference(found, "kmqat", 32, "full precision", "so762")["eer_change"], 2) == -0.76
          and beyond(difference(found, "kmqat", 32, "full precision", "so762")) == -1),
    Claim("There no difference is told apart, neither between the two nor from full precision or their controls, on "
          "either set", "small-4bits.json",
          lambda found: len(some := [row for row in found["differences"] if row["trained"]]) == 16
          and not any(map(beyond, some))),
    *(Claim(sentence, "small-earlier.jsonl", lambda _: small_network(["small-earlier.jsonl"], BOTH | EARLIER)
            and small_network(["small-baselines.json", "small-4bits.json"], BOTH | LATER))
      for sentence in (
          "Of the differences in its two tables three are beyond chance in both runs: at 2 bits KMQAT errs more than "
          "this project's recipe on words, min-max more than k-means on so762 where both are trained, and min-max "
          "without training more than full precision there",
          "Three were so in the earlier run alone: KMQAT above its control at 4 bits on so762, min-max above k-means "
          "at 2 bits without training on so762, and k-means without training above full precision at 2 bits on words",
          "Two are so in this run alone: powers of two above k-means, trained at 2 bits, on so762, and uniform levels "
          "without training above full precision at 2 bits on words")),
    Claim("KMQAT ends within two points of full precision", "small-baselines.json",
          lambda found: all(abs(difference(found, "kmqat", bits, "full precision", on)["eer_change"]) < 2
                            for bits in (3, 2) for on in ("so762", "words"))),
    Claim("At 2 bits it errs more than this project's recipe on words, beyond chance; on so762, at 3 bits, and from "
          "full precision and its own control, it is not told apart", "small-baselines.json",
          lambda found: [beyond(difference(found, "kmqat", 2, "distilled", on)) for on in ("so762", "words")] == [0, 1]
          and not any(beyond(difference(found, "kmqat", bits, other, on)) for on in ("so762", "words")
                      for bits, other in ((3, "distilled"), *((bits, other) for bits in (3, 2)
                                                             for other in ("full precision", "control"))))),
    Claim("On WeSpeaker's network at 2 bits, after one epoch, KMQAT as published errs more than this project's recipe "
          "on both sets, beyond chance", "kmqat-less-ours.jsonl",
          lambda rows: [beyond(row) for row in rows if row["network"] == "kmqat-2"] == [1, 1]),
    Claim("On a small network, after 400 steps, it errs more on words alone", "small-baselines.json",
          lambda found: [beyond(difference(found, "kmqat", 2, "distilled", on)) for on in ("so762", "words")]
          == [0, 1]),
    *(Claim(sentence, "small-longer.json", kmqat_is_level)
      for sentence in (
          "after 1,600 the two are not told apart",
          "Then KMQAT is not told apart from this project's recipe, nor from its control, on either set")),
    *(Claim("On words it ends at 12.71 %, where it ended at 13.33 after 400 steps", file, lambda found, eer=eer: round(
            np.mean(difference(found, "kmqat", 2, "distilled", "words")["eer_by_seed"]), 2) == eer)
      for file, eer in (("small-longer.json", 12.71), ("small-baselines.json", 13.33))),
    Claim("Full precision trained by KMQAT's loss errs 0.82 points less on so762 than by this project's, beyond "
          "chance; on words no difference is seen", "small-longer.json",
          lambda found: round(difference(found, "kmqat", 32, "distilled", "so762")["eer_change"], 2) == -0.82
          and [beyond(difference(found, "kmqat", 32, "distilled", on)) for on in ("so762", "words")] == [-1, 0]),
    Claim("This project's recipe at 2 bits errs less on so762 than the full precision that all began from, beyond "
          "chance, so that one had not been trained to its end", "small-longer.json",
          lambda found: beyond(difference(found, "distilled", 2, "full precision", "so762")) == -1),
    Claim("This project's recipe shows no loss at 3 and 2 bits on either set", "small-baselines.json",
          ours_lose_nothing),
    Claim("Trained at 2 bits, min-max and powers of two err 0.3 points more than k-means on so762, beyond chance",
          "small-baselines.json",
          lambda found: [(round((row := difference(found, levels, 2, "distilled", "so762"))["eer_change"], 1),
                          beyond(row)) for levels in ("minmax", "powers")] == [(0.3, 1)] * 2),
    Claim("No other of these sets of levels is told apart from k-means here, trained or not, at any number of bits, on "
          "either set", "small-baselines.json", lambda found: len(beside_kmeans(found)) == 30
          and {(row["recipe"], row["bits"], row["set"], row["trained"], beyond(row)) for row in beside_kmeans(found)
               if beyond(row)} == {(levels, 2, "so762", True, 1) for levels in ("minmax", "powers")}),
    Claim("trained at 3 and 2 bits with three seeds", "small-baselines.json",
          lambda found: {row["seeds"] for row in found["differences"] if row["trained"]} == {3}),
    Claim("full precision itself errs in one trial of eight", "small-baselines.json",
          lambda found: 1 / 8.5 < found["rows"][0]["sets"]["so762"]["eer"] / 100 < 1 / 7.5),
    Claim("a 2-bit network with one component put back into full precision can drift more than before",
          "wespeaker.json", lambda found: min(row["drift_recovery"] for one in found["diagnosis"].values()
                                              for row in one["retention"] if row["experiment"] == "retention") < 0),
    Claim("so762 has 1,250 utterances and words 220", "wespeaker-compare.json",
          lambda found: {name: (one["utterances"], one["trials"], round(one["eer"], 6))
                         for name, one in found["rows"][0]["sets"].items()}
          == {name: (utterances, one["trials"], round(one["eer"], 6)) for (name, one), utterances
              in zip(found_in("wespeaker.json")["rows"][0]["sets"].items(), (1250, 220), strict=True)}),
    Claim("on all pairs of 120 utterances of each set", "wespeaker.json",
          lambda found: {row["trials"] for one in found["diagnosis"].values() for row in one["retention"]}
          == {120 * 119 // 2}),
    Claim("most utterances are in some doubtful trial", "wespeaker.json",
          # Two bits for all, and 32 more for an utterance that is in one.
          lambda found: all((one["utterance_bits"] - 2) / 32 > 0.5 for one, _ in saved(found, 32))),
    Claim("the cascades of untrained bits gain nothing, and the one of trained bits saves a fortieth at most",
          "quickstart.json", rescues_save_little),
    Claim("By minDCF no cascade is told to bring anything back", "quickstart.json",
          lambda found: len(found["cascades"]) == 3 and min(
              beyond(one["sets"]["test"]["changes"]["first"], "min_dcf_change") for one in found["cascades"]) >= 0),
    Claim("a cascade of codebooks that do not nest gains nothing over its last level alone", "wespeaker.json",
          lambda found: all(gain <= 0 for _, gain in saved(found, 4))),
    Claim("one that ends in full precision costs more bits than a 4-bit network", "wespeaker.json",
          lambda found: all(one["utterance_bits"] > 4 for one, _ in saved(found, 32))),
    Claim("at 2 bits the loss of EER grows in noise and by u-law coding, beyond chance", "conditions-words.json",
          lambda found: grown(found) == {"noise=15", "noise=5", "codec=ulaw"}),
    Claim("On the telephone band and by Opus it grows as well, but not told apart from none, and it is not seen to "
          "grow where speech is merely short", "conditions-words.json",
          lambda found: all(of_condition(found, name)["eer_growth"] > 0 for name in ("telephone", "codec=opus"))
          and not grown(found) & {"telephone", "codec=opus", "first=5", "first=3", "first=2", "first=1"}),
    Claim("There the loss of EER at 2 bits grows by 3.4 points with Opus, beyond chance", "conditions-so762.json",
          lambda found: round(of_condition(found, "codec=opus")["eer_growth"], 1) == 3.4
          and grown(found) == {"codec=opus"}),
    Claim("On the telephone band and in noise it grows by 2.0 and 2.1, whose intervals hold zero, and no growth is "
          "seen where speech is short", "conditions-so762.json",
          lambda found: [round(of_condition(found, name)["eer_growth"], 1) for name in ("telephone", "noise=5")]
          == [2.0, 2.1] and not grown(found) & {"telephone", "noise=5", "first=2", "first=1"}),
    Claim("At 4 and 3 bits no loss of EER is told apart from none, whatever befell the recordings",
          "conditions-so762.json",
          lambda found: not any(beyond(row, "eer_loss") for row in found["rows"] if row["bits"] in (4, 3))),
    Claim("4.89 M parameters", "networks.json", lambda found: parameters(found, "redimnet_b2") == 4.89),
    Claim("4.61 M parameters", "networks.json", lambda found: parameters(found, "xvector") == 4.61),
    Claim("6.19 M parameters of width 512; `:c1024` has width 1,024 and 14.66 M", "networks.json",
          lambda found: [parameters(found, f"ecapa_c{width}") for width in (512, 1024)] == [6.19, 14.66]),
    Claim("3.4 times ResNet-36's", "networks.json",
          lambda found: 3.35 < row_of(found, "resnet200")["macs"] / row_of(found, "resnet36")["macs"] < 3.45),
    Claim("What 8 bits do to activations is not told to cost anything, at 4 or 2 bits, on so762 or words",
          "activations.json", rounding_costs_nothing),
    Claim("Four bits themselves, fitted on words/train, err 0.20 points more on so762, beyond chance, and no more on "
          "words", "activations.json",
          lambda found: [(round(row["full_eer_change"], 2), beyond(row, "full_eer_change")) for one in found["sets"]
                         for row in one["rows"] if row["name"] == "W4A8"] == [(0.20, 1), (-0.20, 0)]),
    Claim("2 bits lose nothing that is seen after an epoch of training on labels", "activations-trained.json",
          lambda found: [(beyond(row), beyond(row, "full_eer_change")) for one in found["sets"] for row in one["rows"]
                         if row["name"] == "W2A8"] == [(0, 0)] * 2),
    Claim("On new recordings ours are the fastest at the median", "extraction.json", lambda found:
          min(side["speedup"] for side in found["sides"] if side["side"].startswith("ours"))
          > max(side["speedup"] for side in found["sides"] if not side["side"].startswith("ours"))),
    Claim("On recordings that it has run before, OpenVINO's int8 is faster than ours", "extraction.json", lambda found:
          next(side["speedup_again"] for side in found["sides"] if side["side"] == "openvino-int8")
          > max(side["speedup_again"] for side in found["sides"] if side["side"].startswith("ours"))),
    Claim("To full precision's decisions the goal is 0.45 of its time: the cascade from W4A8 takes 0.42 and 0.40, the "
          "one from W2A8 0.47 and 0.52", "lazy.json",
          lambda found: [[round(lazy_of(one, f"cascade w{bits}a8-fp32")["ratio"], 2) for one in found["sets"]]
                         for bits in (4, 2)] == [[0.42, 0.40], [0.47, 0.52]]),
    Claim("On `quarter` these two flip no trial, plain W4A8 one and W8A8 two, of 149", "lazy.json",
          lambda found: found["sets"][0]["trials"] == 149
          and [lazy_of(found["sets"][0], name)["harmful_flips"] for name in (
              "cascade w4a8-fp32", "cascade w2a8-fp32", "r34-w4a8.kmq", "r34-w8a8.kmq")] == [0, 0, 1, 2]),
    Claim("on words plain W4A8 flips none either and takes less time", "lazy.json",
          lambda found: lazy_of(found["sets"][1], "r34-w4a8.kmq")["harmful_flips"] == 0
          and all(lazy_of(found["sets"][1], "r34-w4a8.kmq")["ratio"] < row["ratio"]
                  for row in found["sets"][1]["rows"] if "escalated" in row)),
    Claim("Rounding is not told to cost anything, at 4 or 2 bits, on either set", "activations-trained.json",
          rounding_costs_nothing),
    Claim("At 2 bits with 8-bit activations, in 1.75 MB, no loss against full precision is seen",
          "activations-trained.json", lambda found: all(
              round(row["bytes"] / 1e6, 2) == 1.75 and beyond(row, "full_eer_change") == 0
              for one in found["sets"] for row in one["rows"] if row["name"] == "W2A8")),
    Claim("it is not told apart from the former one, which cut outliers, nor from full precision", "ranges.json",
          lambda found: not any(beyond(row, name) for one in found["sets"] for row in one["rows"]
                                for name in ("eer_change", "full_eer_change"))),
    Claim("at many bits the codebooks of its narrow kernels weigh more than their indices", "ge2e.json",
          lambda found: next(row["bytes"] for row in found["rows"] if row["bits"] == 8) > 2 * 1_420_544),
    Claim("believe the interval, not the rate", "threshold-words.json",
          lambda found: 2 * found["wanted_false_accept_rate"] < found["judged_on"]["false_accept_rate"]
          < found["false_accept_rate_ci95"][1]),
    Claim("Fitted, on embedded voices or on speech, no loss of EER is seen at 4, 3 and 2 bits; not fitted, 3 and 2 "
          "bits err more, beyond chance", "wespeaker-unfitted.json", fitting_saves),
    Claim("and at few bits ruins the model", "wespeaker-unfitted.json",
          lambda found: min(errors_of(found, "not fitted", 2) + errors_of(found, "not fitted", 3))
          > 5 * errors_of(found, "full precision", 32)[0]),
    Claim("half of it will do", "install.json",
          lambda found: 0.45 < found["light"]["megabytes"] / found["whole"]["megabytes"] < 0.55),
    Claim("KMQAT as published takes 0.99 of the time of a step in full precision at 4 bits and 0.96 at 2, its new "
          "assignment of indices every 100 steps counted in", "accelerator-h200.jsonl",
          lambda lines: [(round(row["ratio"], 2), row["reassign_every"])
                         for row in (newest(lines, "qat", f"kmqat {bits} bits") for bits in (4, 2))]
          == [(0.99, 100), (0.96, 100)]),
    Claim("a step that assigns them takes no longer than others", "accelerator-h200.jsonl",
          lambda lines: all(row["reassigning_step_seconds"] < 1.02 * row["step_seconds"] for row in
                            (newest(lines, "qat", f"kmqat {bits} bits") for bits in (4, 2)))),
    Claim("Training at 4 or 2 bits by this project's recipe takes as long as in full precision",
          "accelerator-h200.jsonl",
          lambda lines: all(0.97 < newest(lines, "qat", f"{bits} bits")["ratio"] < 1.03 for bits in (4, 2))),
    Claim("Our step is 1.13 times as fast as PyTorch's compiled one, in the same run", "accelerator-h200.jsonl",
          lambda lines: round(newest(lines, "step", "network")["examples_per_second"]
                              / newest(lines, "torch", "compiled")["examples_per_second"], 2) == 1.13
          and newest(lines, "step", "network")["run"] == newest(lines, "torch", "compiled")["run"]),
    Claim("Reading shards no longer holds a step up: 1.01 of its time without input, where it was 1.06",
          "accelerator-h200.jsonl",
          lambda lines: [round(line["slowdown_by_input"], 2) for line in lines
                         if (line["part"], line.get("what")) == ("input", "beside the step")] == [1.06, 1.01]),
    Claim("Batch normalization and other passes over whole activations take more than a third of a step, and in "
          "ResNet-200 more than two fifths, recomputed or not", "accelerator-h200.jsonl",
          lambda lines: share_beside_convolutions(lines, "step", "whole") > 1 / 3
          and share_beside_convolutions(lines, "step200", "whole, recomputed") > 2 / 5
          and share_beside_convolutions(lines, "step200", "resnet200 whole") > 2 / 5),
    Claim("a list of nine hours now gets three lengths, for less waiting in all, and runs at 9,513 times real time; "
          "with eight lengths, in an earlier run, it ran at 11,999", "accelerator-h200.jsonl",
          lambda lines: [round(line["times_real_time"]) for line in lines
                         if (line["part"], line.get("what")) == ("extract", "resnet36")] == [11_999, 9_513]
          and round(newest(lines, "extract", "resnet36")["speech_seconds"] / 3600) == 9),
    Claim("After these two, reductions take a quarter less time and other passes a fifth more; the step takes as long "
          "as before", "accelerator-h200.jsonl", steps_take_as_long),
    Claim("copies, transposes included, take less than a hundredth of a step", "accelerator-h200.jsonl",
          lambda lines: 0 < copies_of(lines, "step", "whole") < 0.01),
    Claim("Sixteen threads read shards slower than four", "accelerator-h200.jsonl",
          lambda lines: newest(lines, "input", "alone, 16 threads")["examples_per_second"]
          < newest(lines, "input", "alone, 4 threads")["examples_per_second"]),
)  # fmt: skip
"""What is said of results in words."""

FACTS = {
    "6.63": "million parameters of WeSpeaker's ResNet34",
    "3,465": "training utterances, so762/train and words/train",
    "95 %": "confidence of intervals",
    "100 %": "what shares need not add up to",
}
"""Numbers of data and settings that a sentence may name without being listed."""

PLAIN = (
    "SIXTEEN, of which one is of 5 minutes", "HOUR, of an hour and of 5 s",
    # Questions, and what a table shows.
    "What do labels gain, and what do bits cost?", "Do few bits suffer more where speech is short or bad?",
    "Why it errs, and a cascade", "why few bits err; cascades", "whether few bits suffer more where speech",
    "Is it faster, and how fast do commands start?", "What a command costs where nothing runs yet",
    # How results are told, and what they do not tell.
    "is told apart from none", "is not told apart from none", "no difference is claimed",
    "the least cost at which a list can be decided", "its share of what the whole 2-bit network drifts",
    "shares are of the drift that the whole 2-bit network makes", "And what does a cascade bring back?",
    "so their figures favour what was chosen", "what the labels gain and what the bits cost is not told apart here",
    "what they gain is not what fewer bits gain", "it grows by what it is more than on whole recordings",
    "the control that tells what labels gain from what bits cost", "with a prior of 0.01 for the same speaker",
    # Methods, settings, limits of the code, sizes.
    "unless a recording is longer than a minute", "Bits say nothing of what they cost",
    "Gates may be chosen by this cost, too", "false-reject rate or cost, with its interval",
    "It grows from a trained 2-bit network", "used 41.0 s of speech of 63.0 s", "Recordings over a minute, up to",
    "parts of at most a minute is taken", "(bfloat16, batches of 256 crops of 350 frames)",
    "steps of 16 crops of 1.5 s", "far less than a pass over the data", "After the 7.5 epochs of",
    "Stopped by SIGTERM or Ctrl-C it saves and exits",
     "32 crops of 1.5 s", "(1.21 M parameters)", "7.18 M parameters",
    "crops of 5 s, AAM margin 0.5", "61.47 M parameters with the classifier and 140.6 G",
    "14.93 M parameters and 41.15 G", "shows where the smaller one errs",
    "unless a recording is longer than a minute", "Bits say nothing of what they cost",
    # Versions, licences, papers.
    "arXiv 2606.08078", "arXiv 2406.05359", "arXiv 2210.17326", "Python 3.11", "pip 25.1", "(CC BY 4.0, 0.5 GB)",
    "FlaxSpeaker 0.4.0 and sherpa-onnx 2.0.1",
)  # fmt: skip
"""Parts of sentences with such words or numbers that state no result: questions, methods, settings, versions."""

PUBLISHED = ("Published by the paper", "Published by WeSpeaker for its own training")
"""A sentence with any of these words states a result of others."""


def sentences(text):
    """The sentences of a page, without what is generated, code, pictures and the targets of links; rows of tables."""
    for what in (
        r"```.*?```",
        r"<!-- table:.*?<!-- end -->",
        r"<!--.*?-->",
        r"<[^>]*>",
        r"`[^`]*`",
        r"!\[[^\]]*\]\([^)]*\)",
    ):
        text = re.sub(what, "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-|#])", text):
        words = " ".join(paragraph.split())
        if words and not words.startswith("#"):
            yield from re.split(r"(?<=[.:;?!]) (?=[A-Z(])", words)


def states_a_result(sentence):
    figures = {found[0].strip() for found in FIGURE.finditer(sentence)} - set(FACTS)
    return bool(RESULT.search(sentence) or figures)


def unlisted(text):
    listed = *(claim.says for claim in CLAIMS), *PLAIN
    plain = [" ".join(re.sub(r"`[^`]*`", "", part).split()) for part in listed]
    # What is listed takes away itself alone: what else a sentence says must be listed, too.
    known = re.compile("|".join(re.escape(part) for part in sorted(plain, key=len, reverse=True)))
    return [
        one
        for one in sentences(text)
        if not any(part in one for part in PUBLISHED) and states_a_result(known.sub(" _ ", one))
    ]


def docstring(path):
    """A configuration's, without its commands."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if not paragraph.startswith("    "))


def found_in(file):
    text = (RESULTS / file).read_text()
    return [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_sentence_that_states_a_result_is_traced(page):
    typed = unlisted(page.read_text())
    assert not typed, f"neither a claim with a file behind it nor listed as none: {typed}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sentence_of_a_configuration_that_states_a_result_is_traced(path):
    typed = unlisted(docstring(path))
    assert not typed, f"neither a claim with a file behind it nor listed as none: {typed}"
    for file in re.findall(r"\.github/results/[\w.-]+\.jsonl?", docstring(path)):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.says[:40])
def test_what_is_said_holds_in_the_file(claim):
    assert claim.holds(found_in(claim.file)), f"{claim.file} does not say so"


def test_every_claim_is_made_somewhere():
    texts = " ".join(" ".join(page.read_text().split()) for page in PAGES)
    texts += " ".join(" ".join(docstring(path).split()) for path in CONFIGS)
    gone = [claim.says for claim in CLAIMS if " ".join(claim.says.split()) not in texts]
    assert not gone, f"no page says so any more: {gone}"


def test_every_generated_table_comes_from_a_committed_file():
    shown = set()
    for page in TABLES_ON:
        text = page.read_text()
        for _, files, kind, _ in tables.BLOCK.findall(text):
            for file in files.split(","):
                place = (page.parent / file).resolve()
                assert place.is_relative_to(RESULTS) and place.is_file()
            shown.add(kind)
        assert tables.fill(text, page.parent) == text
    assert shown >= {
        "bits",
        "components",
        "cascades",
        "gains",
        "differences",
        "conditions",
        "faults",
        "house",
    }


def test_what_would_be_a_result_is_found():
    """The rules above, on sentences that they must refuse, and on some that they must not."""
    for text in (
        "At 2 bits 3.4 % of the decisions turn wrong.",
        "KMQAT errs more.",
        "It takes a minute on two cores.",
        "| a step | PyTorch | 0.78 of its time |",
        "Training takes\nas long as before.",
        "The network is 64 times as fast.",
        "But most utterances are in a doubtful trial, too.",
        # What is listed exempts no more than itself.
        "With Python 3.11 it errs more.",
        "At 0.5 % it is better (Li et al., arXiv 2210.17326).",
    ):
        assert unlisted(text), text
    for text in (
        "<!-- table: a.json bits -->\n| 9.99 |\n<!-- end -->",
        "`--x=7.5` and [a name](b/8.8)",
        "```\n0.5 %\n```",
        f"{PUBLISHED[0]} for this network, an EER of 1.234 %.",
        "# Where it errs",
    ):
        assert not unlisted(text), text


def has_trials(found):
    return all(one["trials"] > 0 for one in found)


WHOLE = {
    # Counts and times, of no trials.
    "networks": lambda found: all(row["parameters_as_source"] for row in found["rows"]),
    "runtimes": lambda found: found["recordings"] > 0 and all(row["bytes"] > 0 for row in found["rows"]),
    "beside_original": lambda found: all(one["recordings"] > 0 for one in found["sets"]),
    "settings": lambda found: all("equal" in row for row in found["rows"]),
    "memory": lambda found: all("equal" in row for row in found["rows"]),
    "install": lambda found: all(
        found[form]["megabytes"] > sum(list(found[form]["heaviest"].values())[:4]) for form in ("whole", "light")
    ),
    "house": lambda found: [column["name"] for column in found["columns"]] == ["before", "now"],
    "fresh": lambda found: (
        found["repeats"] > 1
        and all(0 < row["least"] <= row["median"] and row["most_memory"] > 0 for row in found["rows"])
    ),
    # What must not go wrong.
    "faults": lambda found: all(
        row["made_by"].startswith("launch/") and not row["violations"] for row in found["rows"]
    ),
    "fuzz": lambda found: found["tried"] == sum(row["clean"] + row["violations"] for row in found["classes"]) >= 2500,
    # Of trials.
    "threshold": lambda found: all(one["trials"] > 0 and one["speakers"] > 0 for one in (found, found["judged_on"])),
    "notes": lambda found: found["notes"]["trials"] > 0 and found["notes"]["utterances"] > 0,
    "pairs": lambda found: found["recordings"] > 0,
    "sides": lambda found: found["utterances"] >= 100 and found["audio_seconds"] > 0,
    "list_bytes": lambda found: all(row["trials"] >= 10**8 and not row["unlike_one_process"] for row in found["rows"]),
    "sets": lambda found: has_trials(found["sets"]) and all(one["rows"] for one in found["sets"]),
    "rows": lambda found: all(
        row["sets"] and has_trials(row["sets"].values()) and all(one["speakers"] > 0 for one in row["sets"].values())
        for row in found["rows"]
    ),
}
"""What a file of results must hold: by its kind, or else by the first of these names that it has."""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_results_says_what_it_comes_from(path):
    found = json.loads(path.read_text())
    form = found["kind"] if found.get("kind") in WHOLE else next(name for name in WHOLE if name in found)
    assert WHOLE[form](found)
