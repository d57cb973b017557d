import json
from pathlib import Path

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.study import study_tables, tables

ROOT = Path(__file__).parents[2]
ROWS = [
    {"bits": 32, "method": "full", "bytes": 2048000, "sets": {"a": {"eer": 2.517, "eer_ci95": [1.0, 3.456]}}},
    {"bits": 2, "method": "trained", "bytes": 1536, "sets": {"a": {"eer": 30.0, "eer_ci95": None}}},
]

LISTED = [{"sets": {"a": {"trials": 900, "targets": 90, "speakers": 12, "utterances": 40}}}]
"""A study's first row, as far as it says what its sets are."""
ABOUT = "a: 900 trials, 90 of them targets, 12 speakers, 40 utterances."


def test_a_table_is_written_between_its_marks(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"rows": ROWS}))
    text = "before\n<!-- table: r.json bits -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- table: r.json bits -->",
        "| bits | weights | KiB | a, EER % |",
        "|---|---|---|---|",
        "| 32 | full | 2,000 | 2.52 [1.00, 3.46] |",
        "| 2 | trained | 2 | 30.00 |",
        "<!-- end -->",
        "after",
    ]
    assert tables.fill(filled, tmp_path) == filled


def changed(interval, **more):
    return {"eer": 3.0, "eer_ci95": [1, 5], "eer_change": 0.5, "eer_change_ci95": interval, **more}


def test_only_paired_intervals_tell_apart(tmp_path):
    """Rows have their own changes, or those the diagnosis found of trained networks; marginal bands are not shown."""
    rows = [
        {"bits": 32, "method": "full precision", "bytes": 2048, "sets": {"a": {"eer": 2.5, "eer_ci95": [1.0, 4.0]}}},
        {"bits": 3, "method": "without training", "bytes": 2048, "sets": {"a": changed([-0.25, 0.75])}},
        {"bits": 2, "method": "trained", "bytes": 2048, "sets": {"a": {"eer": 3.0, "eer_ci95": [2.0, 5.0]}}},
        {"bits": 2, "method": "trained, nested", "bytes": 2048, "sets": {"a": {"eer": 3.0, "eer_ci95": [2.0, 5.0]}}},
    ]
    systems = [{"bits": 2, "eer_change": 0.5, "eer_change_ci95": [0.1, 0.9]}]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows, "diagnosis": {"a": {"systems": systems}}}))
    filled = tables.fill("<!-- table: r.json bits -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[1] == "| bits | weights | KiB | a, EER % | against FP32 |"
    assert filled[3:7] == [
        "| 32 | full precision | 2 | 2.50 [1.00, 4.00] |  |",
        "| 3 | without training | 2 | 3.00 | +0.50 [-0.25, +0.75] |",
        "| 2 | trained | 2 | 3.00 | **+0.50 [+0.10, +0.90]** |",
        "| 2 | trained, nested | 2 | 3.00 |  |",
    ]


def test_costs_of_detection_and_numbers_of_trials_where_they_are_known(tmp_path):
    base = {"eer": 2.5, "eer_ci95": None, "min_dcf": 0.25, "trials": 30000, "targets": 6000, "speakers": 60}
    low = changed([0.1, 0.9], min_dcf=0.5, min_dcf_change=0.25, min_dcf_change_ci95=[-0.125, 0.5])
    rows = [
        {"bits": 32, "method": "full precision", "bytes": 2048, "sets": {"a": base | {"utterances": 1250}}},
        {"bits": 3.144, "method": "trained, mixed", "bytes": 2048, "sets": {"a": base | low}},
    ]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    filled = tables.fill("<!-- table: r.json bits -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[4].endswith("| 3.00 | **+0.50 [+0.10, +0.90]** | 0.500 | +0.250 [-0.125, +0.500] |")
    assert filled[4].startswith("| 3.144 |")
    assert filled[6] == "a: 30,000 trials, 6,000 of them targets, 60 speakers, 1,250 utterances."


def test_cascades_have_a_row_for_each_set(tmp_path):
    figures = {
        "eer": 2.756, "reference_eer": 2.5, "harmful_flip_rate": 0.00123, "sequential_bits": 2.214,
        "incremental_bits": 2.1, "utterance_bits": 5.44, "utterance_incremental_bits": 3.0,
        "resolved": {"2": 0.954, "4": 0.046}, "each_level_alone": {"4": {"harmful_flip_rate": 0.0057}},
    }  # fmt: skip
    cascades = [
        {"name": "2>4", "family": family, "bits": [2, 4], "sets": {"a": figures}}
        for family in ("distilled-nested", "distilled")
    ]
    (tmp_path / "r.json").write_text(json.dumps({"cascades": cascades, "rows": LISTED}))
    filled = tables.fill("<!-- table: r.json cascades -->\n<!-- end -->", tmp_path).splitlines()
    shared = "a | 2.76 | 2.50 | 0.123 % | 0.570 % | 95.4 %"
    assert filled[3] == f"| 2>4, nested | {shared} | 2.21 | 2.10 | 5.44 | 3.00 | saves 25 % of 4, in new bits |"
    # New bits are counted only where codebooks nest; by utterance this one gains nothing.
    assert filled[4] == f"| 2>4 | {shared} | 2.21 |  | 5.44 |  | gains nothing: 4 bits alone cost less |"
    assert filled[6] == ABOUT


def test_cascades_by_halves_have_the_mean_cost_and_all_trials_of_both(tmp_path):
    figures = {"eer": 2.0, "reference_eer": 2.5, "harmful_flip_rate": 0.0, "sequential_bits": 2, "utterance_bits": 3}
    figures |= {"resolved": {"2": 1.0}, "each_level_alone": {"4": {"harmful_flip_rate": 0.0}}}
    halves = [
        {"min_dcf": 0.25, "reference_min_dcf": 0.5, "trials": 300, "targets": 40},
        {"min_dcf": 0.75, "reference_min_dcf": 0.25, "trials": 150, "targets": 50},
    ]
    sets = {"a": figures | {"halves": halves}, "b": figures | {"min_dcf": 0.125, "reference_min_dcf": 0.375}}
    rows = [{"sets": {"a": LISTED[0]["sets"]["a"], "b": {"trials": 7}}}]
    study = {"cascades": [{"name": "2>4", "family": "ptq", "bits": [2, 4], "sets": sets}], "rows": rows}
    (tmp_path / "r.json").write_text(json.dumps(study))
    filled = tables.fill("<!-- table: r.json cascades -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[1].startswith("| cascade | on | EER % | FP32 | minDCF | FP32 | harmful flips |")
    assert filled[3].startswith("| 2>4 | a | 2.00 | 2.50 | 0.500 | 0.375 | 0.000 % |")
    assert filled[4].startswith("| 2>4 | b | 2.00 | 2.50 | 0.125 | 0.375 | 0.000 % |")
    within = "a, within halves of its speakers: 450 trials, 90 of them targets, 12 speakers"
    assert filled[6] == f"{within}; b: 7 trials."


def test_components_are_told_from_the_mirror_experiment_alone(tmp_path):
    def row(kind, component, drift):
        about = {"experiment": kind, "component": component, "bits": 2, "parameters": 0.25, "trials": 7140}
        return about | {"drift_recovery": drift}

    retention = [row("retention", "stem", -15.0), row("mirror", "stem", 20.2), row("mirror", "head", 74.9)]
    (tmp_path / "r.json").write_text(json.dumps({"diagnosis": {"a": {"retention": retention}}}))
    filled = tables.fill("<!-- table: r.json components -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3:5] == ["| stem | 25.0 % | 20 % |", "| head | 25.0 % | 75 % |"]
    assert filled[6] == "a: 7,140 trials."


def test_components_of_sets_without_a_diagnosis(tmp_path):
    def fill(diagnosis):
        (tmp_path / "r.json").write_text(json.dumps({"diagnosis": diagnosis}))
        return tables.fill("<!-- table: r.json components -->\n<!-- end -->", tmp_path).splitlines()

    about = {"experiment": "mirror", "component": "stem", "parameters": 0.25, "trials": 7, "drift_recovery": 20.0}
    found = {name: {"retention": [about | {"bits": bits}]} for name, bits in (("a", 2), ("b", 3))}
    assert fill(found)[3] == "| stem | 25.0 % | 20 % |  |"  # b has not so few bits
    for nothing in ({}, {"a": {"retention": []}}):
        with pytest.raises(UserError, match=r"r\.json holds no results of .*'components': it lacks 'diagnosis'"):
            fill(nothing)


def test_a_page_that_is_no_utf_8(tmp_path):
    (tmp_path / "a.md").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"cannot read .*a\.md: it is not UTF-8"):
        tables.fill_file(tmp_path / "a.md")


def test_conditions_have_a_row_for_each_number_of_bits(tmp_path):
    low = {"condition": "first=1", "title": "first 1 s", "seconds": 1.0, "bits": 2, "eer": 9.0}
    for name, value, interval in (("eer", 1.5, [-0.5, 2.0]), ("harmful_flip_rate", 2.0, [0.5, 3.0]),
                                  ("mean_abs_drift", 0.1, [0.05, 0.2])):  # fmt: skip
        for kind in ("loss", "growth"):
            low |= {f"{name}_{kind}": value, f"{name}_{kind}_ci95": interval}
    full = {**low, "bits": 32, "eer": 7.5}
    notes = {"data": "x/words", "trials": 100, "targets": 20, "speakers": 5, "utterances": 30}
    (tmp_path / "r.json").write_text(json.dumps({"rows": [full, low], "notes": notes}))
    filled = tables.fill("<!-- table: r.json conditions -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3].startswith("| first 1 s | 1.0 | 7.50 | 2 | 9.00 | +1.50 [-0.50, +2.00] | +1.50 [-0.50, +2.00] |")
    assert filled[3].endswith("| 2.00 % | **+2.00 [+0.50, +3.00]** | 0.100 | **+0.100 [+0.050, +0.200]** |")
    assert filled[5] == "x/words: 100 trials, 20 of them targets, 5 speakers, 30 utterances."
    low |= {"min_dcf": 0.5, "min_dcf_loss": 0.25, "min_dcf_loss_ci95": [0.125, 0.5]}
    (tmp_path / "r.json").write_text(json.dumps({"rows": [full, low], "notes": notes}))
    filled = tables.fill("<!-- table: r.json conditions -->\n<!-- end -->", tmp_path).splitlines()
    assert "| EER % | loss | grows by | minDCF | loss | grows by | harmful flips |" in filled[1]
    assert "| +1.50 [-0.50, +2.00] | 0.500 | **+0.250 [+0.125, +0.500]** |  | 2.00 % |" in filled[3]


def test_a_difference_whose_interval_holds_zero_is_called_none(tmp_path):
    one = {"recipe": "kmqat", "bits": 2, "trained": True, "against": "control", "set": "a"}
    one |= {"min_dcf_change": 0.1, "min_dcf_change_ci95": [-0.1, 0.2]}
    rows = [one | {"eer_change": 1.5, "eer_change_ci95": [0.5, 2.0]}]
    rows += [one | {"against": "distilled", "trained": False, "eer_change": -0.1, "eer_change_ci95": [-0.4, 0.3]}]
    rows += [one | {"eer_change": -0.1, "eer_change_ci95": None}]
    (tmp_path / "r.json").write_text(json.dumps({"differences": rows, "rows": LISTED}))
    filled = tables.fill("<!-- table: r.json differences -->\n<!-- end -->", tmp_path).splitlines()
    minimum = "+0.100 [-0.100, +0.200]"
    shown = "**+1.50 [+0.50, +2.00]**"
    assert filled[3] == f"| kmqat | 2 | full precision, trained alike | a | {shown} | {minimum} | higher |"
    assert filled[4] == f"| kmqat, without training | 2 | distilled | a | -0.10 [-0.40, +0.30] | {minimum} | none |"
    assert filled[5] == f"| kmqat | 2 | full precision, trained alike | a |  | {minimum} |  |"
    assert filled[7] == ABOUT


def test_recipes_have_one_row_each_with_every_comparison(tmp_path):
    def row(recipe, bits, trained, against, change, eers):
        about = {"recipe": recipe, "bits": bits, "trained": trained, "against": against, "set": "a", "seeds": len(eers)}
        return about | {"eer_change": change, "eer_change_ci95": [change - 0.5, change + 0.5], "eer_by_seed": eers}

    rows = [
        row("distilled", 2, False, "full precision", 1.5, [5.5]),
        row("distilled", 2, True, "full precision", 0.25, [4.0, 4.5]),
        row("distilled", 2, True, "control", 0.75, [4.0, 4.5]),
        row("distilled", 32, True, "full precision", -0.5, [3.5, 3.5]),
        row("powers", 2, True, "full precision", 2.0, [6.0, 6.0]),
        row("powers", 2, True, "distilled", 1.75, [6.0, 6.0]),
    ]

    def fill():
        (tmp_path / "r.json").write_text(json.dumps({"differences": rows, "rows": LISTED}))
        return tables.fill("<!-- table: r.json recipes -->\n<!-- end -->", tmp_path).splitlines()

    filled = fill()
    assert filled[1] == (
        "| network | bits | seeds | a, EER % | a, less full precision | a, less trained alike | a, less ours |"
    )
    assert filled[3:7] == [
        "| distilled's loss in full precision | 32 | 2 | 3.50 | -0.50 [-1.00, +0.00] |  |  |",
        "| distilled | 2 | 2 | 4.25 | +0.25 [-0.25, +0.75] | **+0.75 [+0.25, +1.25]** |  |",
        "| powers | 2 | 2 | 6.00 | **+2.00 [+1.50, +2.50]** |  | **+1.75 [+1.25, +2.25]** |",
        "| k-means, without training | 2 | 1 | 5.50 | **+1.50 [+1.00, +2.00]** |  |  |",
    ]
    assert filled[8] == ABOUT
    # The change of minDCF against full precision, not against others, where a file has it.
    rows = [one | {"min_dcf_change": 0.125, "min_dcf_change_ci95": [-0.25, 0.5]} for one in rows]
    rows[4]["min_dcf_change_ci95"] = [0.0625, 0.5]
    filled = fill()
    assert filled[1].endswith("| a, less ours | a, minDCF less full precision |")
    assert filled[4].endswith("| **+0.75 [+0.25, +1.25]** |  | +0.125 [-0.250, +0.500] |")
    assert filled[5].endswith("| **+1.75 [+1.25, +2.25]** | **+0.125 [+0.062, +0.500]** |")


def test_speeds_are_of_the_newest_line_of_each_benchmark(tmp_path):
    lines = [
        {"bench": "quant", "processors": 2, "weights": 59.8e6, "channels": 51200, "speedup_over_sklearn": 64.2,
         "times_jnp_sort": 0.671},
        {"bench": "qat", "processors": 2, "model": "resnet36", "batch": 16, "frames": 200, "dtype": "float32",
         "full precision": {"ratio": 1.0}, "4 bits": {"ratio": 9.0}},
        {"bench": "qat", "processors": 2, "model": "resnet36", "batch": 16, "frames": 200, "dtype": "float32",
         "full precision": {"ratio": 1.0}, "4 bits": {"ratio": 0.98}},
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = tables.fill("<!-- table: r.jsonl speed -->\n<!-- end -->", tmp_path).splitlines()
    what = "k-means, 59.8 M weights, 51,200 channels"
    assert filled[3:6] == [
        f"| {what} | scikit-learn, `n_init=10`, on a part of them | 64 times as fast |",
        f"| {what} | one `jnp.sort` of the same weights | 0.67 of its time |",
        "| training step, resnet36, 16 x 200 frames, float32, 4 bits | the same in full precision | 0.98 of its time |",
    ]
    assert filled[7] == "On 2 processors."


def test_biases_and_cells_of_memory_have_a_row_each(tmp_path):
    one = {"eer": 2.5, "eer_half": 2.51, "eer_change": 0.01, "eer_change_ci95": [-0.02, 0.03], "min_dcf_change": 0.0,
           "min_dcf_change_ci95": [0.0, 0.0], "min_cosine": 0.9999996, "trials": 10, "targets": 4}  # fmt: skip
    rows = [{"bits": 2, "bytes": 2000, "bytes_half": 1900, "sets": {"/data/words/dev": one}}]
    (tmp_path / "b.json").write_text(json.dumps({"rows": rows}))
    filled = tables.fill("<!-- table: b.json biases -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3].startswith("| 2 | 2,000 | 1,900 | 2.500 | 2.510 | +0.010 [-0.020, +0.030] | +0.0000 [")
    assert filled[3].endswith("| 1.000000 |") and filled[5] == "words: 10 trials, 4 of them targets."
    cells = [{"network": "n", "bits": 4, "what": "total", "published": "7.68", "mib": mib} for mib in (7.684, 7.686)]
    (tmp_path / "m.json").write_text(json.dumps({"rows": cells}))
    filled = tables.fill("<!-- table: m.json memory -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3:5] == ["| n | 4 | total | 7.68 | 7.68 | equal |", "| n | 4 | total | 7.68 | 7.69 | **differs** |"]


def accelerator_rows(tmp_path, lines):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = tables.fill("<!-- table: r.jsonl accelerator -->\n<!-- end -->", tmp_path)
    return filled.splitlines()[3:-3], filled.splitlines()[-2]


def test_an_accelerator_has_a_row_for_each_speed(tmp_path):
    lines = [
        {"part": "step", "what": "whole", "card": "H200", "examples_per_second": 9.0},
        {"part": "step", "what": "whole", "card": "H200", "examples_per_second": 1386.8, "share_of_peak": 0.4043},
        {"part": "step", "what": "whole kernels", "card": "H200", "milliseconds": {}},
        {"part": "kmqat", "error": "stopped after 47 s"},
    ]
    rows, note = accelerator_rows(tmp_path, lines)
    assert rows == ["| step | whole | 1,387 examples/s, 40.4 % of peak | H200 |"]
    assert "tiny" not in note and "tiny" in accelerator_rows(tmp_path, [{**lines[0], "tiny": True}])[1]


def test_what_follows_from_an_accelerators_lines_is_computed(tmp_path):
    step = {"card": "H200", "step_seconds": 0.5, "xla_tflop_per_step": 100.0, "peak_tflop_per_second": 1000.0}
    lines = [
        {"part": "torch", "what": "compiled", "card": "H200", "examples_per_second": 100.0, "our_speed_over_it": 7.0},
        {"part": "torch", "what": "eager", "card": "L4", "examples_per_second": 100.0, "our_speed_over_it": 7.0},
        {"part": "step", "what": "network", **step, "examples_per_second": 110.0},
        {"part": "step200", "what": "old", **step, "remat": True},
        {"part": "step200", "what": "new", **step, "remat": True, "remat_keeps": "statistics"},
    ]
    rows, _ = accelerator_rows(tmp_path, lines)
    assert rows == [
        "| torch | compiled | 100 examples/s, ours 1.100 times as fast | H200 |",
        "| torch | eager | 100 examples/s | L4 |",  # ours was measured on another card
        "| step | network | 110 examples/s, 20.0 % by XLA's count | H200 |",
        "| step200 | old | 20.0 % by XLA's count, blocks kept nothing, before `remat_keeps`: neither policy that "
        "is timed now | H200 |",
        "| step200 | new | 20.0 % by XLA's count | H200 |",
    ]


def test_a_first_page_has_bytes_errors_and_their_changes_against_the_control(tmp_path):
    def row(method, bits, size, eer, cost):
        found = {"eer": eer, "min_dcf": cost, "trials": 900, "utterances": 40}
        return {"method": method, "bits": bits, "bytes": size, "sets": {"a": found}}

    rows = [row("full precision", 32, 8_000_000, 2.0, 0.25), row("without training", 2, 500_000, 9.0, 0.75)]
    rows += [row("trained", 2, 500_000, 3.5, 0.5), row("trained, kmqat", 2, 500_000, 8.0, 0.9)]
    rows += [row("trained, full precision", 32, 8_000_000, 1.5, 0.2)]
    ours = {"recipe": "distilled", "bits": 2, "trained": True, "against": "control", "set": "a"}
    figures = {
        "eer_change": 2.0,
        "eer_change_ci95": [0.5, 2.5],
        "min_dcf_change": 0.3,
        "min_dcf_change_ci95": [-0.1, 0.4],
    }
    others = [{**ours, **figures, "eer_change": 7.0, **change} for change in
              ({"against": "full precision"}, {"trained": False}, {"recipe": "kmqat"})]  # fmt: skip
    summary = {"rows": rows, "differences": [*others, {**ours, **figures}, *others]}
    (tmp_path / "r.json").write_text(json.dumps(summary))
    filled = tables.fill("<!-- table: r.json gains -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[1] == "| weights | MB | times smaller | EER %, a | change | minDCF | change |"
    assert filled[3:6] == [
        "| full precision | 8.0 | 1.0 | 2.00 |  | 0.250 |  |",
        "| full precision, trained | 8.0 | 1.0 | 1.50 |  | 0.200 |  |",
        "| 2 bits, trained | 0.5 | 16.0 | 3.50 | **+2.00 [+0.50, +2.50]** | 0.500 | +0.300 [-0.100, +0.400] |",
    ]
    assert filled[7] == "a: 900 trials, 40 utterances."


def test_a_threshold_stands_with_its_intervals_and_what_it_did_to_others(tmp_path):
    found = {"threshold": 0.25, "speakers": 8, "recordings": 40, "false_accept_rate": 0.05, "false_reject_rate": 0.0}
    found |= {"false_accept_rate_ci95": [0.001, 0.25], "false_reject_rate_ci95": [0.0, 0.489]}
    judged = {"set": "b", "speakers": 11, "trials": 9000, "false_accept_rate": 0.118, "false_reject_rate": 0.0005}
    found |= {"judged_on": judged}
    (tmp_path / "r.json").write_text(json.dumps(found))
    filled = tables.fill("<!-- table: r.json threshold -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3] == "| 0.2500 | 8, 40 | 5 % [0.1, 25] | 0 % [0, 48.9] |"
    assert filled[4] == "| the same, on b | 11, 9,000 trials | 11.8 % | 0.05 % |"


def test_a_table_without_an_end_takes_nothing_from_the_next(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({}))
    text = "<!-- table: r.json house -->\nkept\n<!-- table: r.json memory -->\n<!-- end -->\n"
    with pytest.raises(UserError, match=r"the table 'house' of r\.json has no <!-- end -->"):
        tables.fill(text, tmp_path)


def test_networks_stand_side_by_side(tmp_path):
    def row(bits, change, interval):
        found = {"eer": 3.0, "eer_change": change, "eer_change_ci95": interval, "min_dcf": 0.5}
        found |= {"min_dcf_change": 0.1, "min_dcf_change_ci95": [-0.1, 0.2], "trials": 9}
        return {"bits": bits, "method": "without training", "bytes": 2_000_000, "sets": {"a": found}}

    full = {
        "bits": 32,
        "method": "full precision",
        "bytes": 8e6,
        "sets": {"a": {"eer": 2.0, "min_dcf": 0.4, "trials": 9}},
    }
    mirror = {"experiment": "mirror", "bits": 2, "parameters": 0.25}
    retention = [
        mirror | {"component": name, "drift_recovery": drift} for name, drift in (("stem", 9.0), ("head", 70.2))
    ]
    about = {"network": "one", "diagnosis": {"a": {"retention": retention}}}
    studies = {
        # At 4 bits the change may be chance, at 3 it is not: what lies below does not count.
        "a.json": about | {"rows": [full, row(4, 0.2, [-0.1, 0.5]), row(3, 0.9, [0.1, 2.0]), row(2, 0.1, [-0.1, 0.3])]},
        "b.json": about | {"network": "two", "rows": [full, row(8, 0.3, [0.1, 0.5])]},
        "c.json": about | {"network": "few speakers", "rows": [full, row(8, 0.3, None)]},
    }
    for name, study in studies.items():
        (tmp_path / name).write_text(json.dumps(study))
    text = "<!-- table: a.json,b.json,c.json KIND -->\n<!-- end -->"
    filled = tables.fill(text.replace("KIND", "architectures"), tmp_path).splitlines()
    assert filled[1] == "| network | bits | weights | MB | a, EER % | against FP32 | minDCF | against FP32 |"
    assert filled[3] == "| one | 32 | full precision | 8.00 | 2.00 |  | 0.400 |  |"
    assert filled[5].startswith("| one | 3 | without training | 2.00 | 3.00 | **+0.90 [+0.10, +2.00]** | 0.500 |")
    kind = "without training"
    knees = f"one, {kind}: 4; two, {kind}: none; few speakers, {kind}: none"
    assert filled[12] == f"Fewest bits without a loss of EER beyond chance: {knees}."
    filled = tables.fill(text.replace("KIND", "fragile"), tmp_path).splitlines()
    assert filled[3] == "| one, 2 bits | head 70 %, 25.0 %; stem 9 %, 25.0 % |"


def test_a_network_that_comes_again_adds_its_trained_rows_and_times_stand_where_they_are_known(tmp_path):
    def row(model, bits, method, eer, **more):
        sets = {name: {"eer": eer, "min_dcf": 0.5, "trials": 9} for name in ("a", "b")}
        return {"model": model, "bits": bits, "method": method, "bytes": 1e6, "sets": sets, **more}

    took = {"embed-fp32-32-a": 60.4, "embed-fp32-32-b": 30.0, "embed-ptq-2-2-a": 50.0}
    first = [row("fp32.kmq", 32, "full precision", 2.0), row("ptq-2.kmq", 2, "without training", 5.0)]
    again = [*first, row("d", 2, "trained", 3.0, training={"seconds": 5330.0, "steps": 9, "cores": 2})]
    again[2]["sets"]["a"] |= {"eer_change": 1.0, "eer_change_ci95": [0.5, 1.5]}
    again += [row("n", 2, "trained, nested", 3.5)]
    (tmp_path / "a.json").write_text(json.dumps({"network": "one", "rows": first, "seconds": took}))
    (tmp_path / "b.json").write_text(json.dumps({"network": "one", "rows": again}))
    filled = tables.fill("<!-- table: a.json,b.json architectures -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[1].endswith("| minDCF | against FP32 | training | embedding, s |")
    same = "2.00 |  | 0.500 |  | 2.00 |  | 0.500 |"
    assert filled[3] == f"| one | 32 | full precision | 1.00 | {same}  |  | 90 |"
    assert filled[4].endswith("| 5.00 |  | 0.500 |  |  |  |")  # of one set alone the time is known
    changed = "3.00 | **+1.00 [+0.50, +1.50]** | 0.500 |  | 3.00 |  | 0.500 |"
    assert filled[5] == f"| one | 2 | trained | 1.00 | {changed}  | 89 min, 2 cores |  |"
    assert filled[7].endswith("one, without training: none; one, trained: none.")


def test_cascades_across_networks_have_a_row_a_system_and_list(tmp_path):
    base = {"eer": 2.5, "min_dcf": 0.25, "eer_change": 0.5, "eer_change_ci95": [0.25, 0.75], "min_dcf_change": 0.0}
    base |= {"min_dcf_change_ci95": None, "harmful_flip_rate": 0.0125, "trial_ratio": 0.5, "recording_ratio": 0.75}
    rows = [base | {"system": "a > b", "alpha": 0.005, "escalated": 0.25, "bytes": 3e6}]
    rows += [base | {"system": "a", "alpha": None, "escalated": 0.0, "bytes": 1e6}]
    one = {"data": "x/words/dev", "trials": 9, "targets": 3, "speakers": 2, "recordings": 4, "rows": rows}
    (tmp_path / "r.json").write_text(json.dumps({"sets": [one]}))
    filled = tables.fill("<!-- table: r.json across -->\n<!-- end -->", tmp_path).splitlines()
    change = "2.50 | **+0.50 [+0.25, +0.75]** | 0.250 |  | 1.25 %"
    assert filled[3] == f"| words | a > b | 0.5 % | {change} | 25.0 % | 0.50 | 0.75 | 3.00 |"
    assert filled[4] == f"| words | a |  | {change} |  | 0.50 | 0.75 | 1.00 |"
    assert filled[6] == "words: 9 trials, 3 of them targets, 2 speakers, 4 utterances."
    timed = {"trial_seconds": 0.0125, "recording_seconds": 0.02}
    one["rows"] = [rows[0] | timed | {"beaten_by": ["a", "b"]}, rows[0] | timed | {"beaten_by": []}, rows[1] | timed]
    (tmp_path / "r.json").write_text(json.dumps({"sets": [one]}))
    filled = tables.fill("<!-- table: r.json across -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[1].endswith("| time by trial | by recording | ms by trial | by recording | MB | loses to |")
    assert filled[3].endswith("| 25.0 % | 0.50 | 0.75 | 12.5 | 20.0 | 3.00 | a |")
    assert filled[4].endswith("| 12.5 | 20.0 | 3.00 | none |") and filled[5].endswith("| 12.5 | 20.0 | 1.00 |  |")


def test_what_a_cascade_gains_back_is_told_beside_what_its_first_level_loses():
    def change(low, high):
        return {"eer_change": (low + high) / 2, "eer_change_ci95": [low, high]}

    def table(rows):
        study = {"rows": rows, "cascades": [cascade, cascade]}
        return study_tables.rescue_table(study).splitlines()

    full = {"method": "full precision", "bits": 32, "sets": {"dev": {"eer": 2.0}, "test": {"eer": 3.0}}}
    low = {"method": "without training", "bits": 2, "sets": {"dev": {"eer": 4.0}, "test": {"eer": 5.0} | change(1, 3)}}
    other = {"method": "trained", "bits": 2, "sets": {"dev": {"eer": 9.0}, "test": {"eer": 9.0}}}
    found = {"eer": 3.25, "harmful_flip_rate": 0.001, "sequential_bits": 2.5, "utterance_bits": 5.0}
    found |= {"each_level_alone": {"2": {"harmful_flip_rate": 0.02}}}
    test = found | {"changes": {"reference": change(-0.5, 1), "first": change(-3, -0.5)}}
    cascade = {"name": "2>4", "family": "ptq", "bits": [2, 4], "sets": {"dev": found, "test": test}}
    lines = table([full, other, low])
    assert lines[0].endswith(" first level | harmful flips | bits a trial | bits an utterance | by utterance |")
    nothing = "gains nothing: 4 bits alone cost less"
    assert lines[2:] == [
        "| test | 2 bits, without training | 5.00 | **+2.00 [+1.00, +3.00]** |  | 2.00 % | 2 | 2 |  |",
        f"| test | 2>4 | 3.25 | +0.25 [-0.50, +1.00] | **-1.75 [-3.00, -0.50]** | 0.10 % | 2.50 | 5.00 | {nothing} |",
    ]
    # With minDCF, and the trials of the sets that are shown.
    full["sets"]["dev"] |= {"min_dcf": 0.5}
    full["sets"]["test"] |= {"min_dcf": 0.5, "trials": 900, "utterances": 40}
    cost = {"min_dcf_change": 0.25, "min_dcf_change_ci95": [0.125, 0.5]}
    low["sets"]["test"] |= {"min_dcf": 0.75, **cost}
    test |= {"min_dcf": 0.625, "utterance_bits": 3.0}
    test["changes"]["reference"] |= {"min_dcf_change": 0.125, "min_dcf_change_ci95": [-0.5, 0.5]}
    lines = table([full, other, low])
    assert "|  | 0.750 | **+0.250 [+0.125, +0.500]** | 2.00 % |" in lines[2]
    assert lines[3].endswith("| 0.625 | +0.125 [-0.500, +0.500] | 0.10 % | 2.50 | 3.00 | saves 25 % of 4 |")
    assert lines[5] == "test: 900 trials, 40 utterances."


@pytest.mark.parametrize(
    ("family", "method"),
    [("kmqat", "trained, kmqat"), ("distilled", "trained"), ("distilled-nested", "trained, nested")],
)
def test_a_cascade_of_another_recipe_stands_beside_its_own_first_level(family, method):
    eers = {"full precision": 2.0, "without training": 8.0, "trained": 4.0, "trained, kmqat": 40.0}
    if "nested" in family:  # of a study by KMQAT that trains this project's recipe too
        eers |= {"trained, distilled": 41.0, "trained, nested": 6.0}
    rows = [
        {"method": name, "bits": 32 if name == "full precision" else 2, "sets": {"test": {"eer": eer}}}
        for name, eer in eers.items()
    ]
    found = {"eer": 3.0, "harmful_flip_rate": 0.0, "sequential_bits": 2.5, "utterance_bits": 3.0}
    found |= {"incremental_bits": 2.25, "utterance_incremental_bits": 2.5}
    found |= {"each_level_alone": {"2": {"harmful_flip_rate": 0.02}}, "changes": {"reference": {}, "first": {}}}
    cascade = {"name": "2>4", "family": family, "bits": [2, 4], "sets": {"test": found}}
    level = study_tables.rescue_table({"rows": rows, "cascades": [cascade]}).splitlines()[2]
    assert level == f"| test | 2 bits, {method} | {eers[method]:.2f} |  |  | 2.00 % | 2 | 2 |  |"


def test_mistakes(tmp_path):
    with pytest.raises(
        UserError,
        match="of r.json must be one of .*bits, gains, differences, recipes, cascades, rescues, components",
    ):
        tables.fill("<!-- table: r.json colours -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match=r"absent\.json"):
        tables.fill("<!-- table: absent.json bits -->\n<!-- end -->", tmp_path)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match=r"r\.json holds no results of the table 'bits': it lacks 'rows'"):
        tables.fill("<!-- table: r.json bits -->\n<!-- end -->", tmp_path)


def test_runtimes_have_one_row_each_and_what_does_not_open_says_so():
    near = {"mean": 0.99951, "least": 0.98761}
    row = {"model": "W2A8", "form": "--opset=18", "bytes": 1_835_223, "runtime": "openvino"}
    rows = [row | {"cosine": near, "integer_convolutions": 35}, row | {"form": "smallest", "refused": "no such type"}]
    found = {"versions": {"openvino": "2026.4.1"}, "recordings": 8, "rows": rows}
    lines = tables.TABLES["runtimes"](found).splitlines()
    assert lines[2] == "| W2A8 | `--opset=18` | 1.84 | openvino | 0.9995 | 0.9876 | 35 |"
    assert lines[3] == "| W2A8 | smallest | 1.84 | openvino | does not open |  |  |"
    assert lines[-1] == "8 recordings; openvino 2026.4.1."
