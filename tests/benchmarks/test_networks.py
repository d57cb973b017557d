"""The table of all networks: every shipped one with a source has its counts; times are ratios; mistakes are told."""

import json
import math

import pytest

from kmq_jax.benchmarks import networks
from kmq_jax.benchmarks.options import NetworksBench
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry, walk
from kmq_jax.study import tables

# Of many layers, each of which is traced.
LARGE = {"resnet101", "resnet200", "campplus", *(f"redimnet_b{n}" for n in (0, 2, 3, 4, 5, 6))}
LARGE |= {f"wespeaker_resnet{depth}" for depth in (101, 152, 221, 293)}


def slow_if_large(name, *more):
    return pytest.param(name, *more, marks=pytest.mark.slow if name in LARGE else ())


@pytest.mark.parametrize("name", [slow_if_large(name) for name in networks.SOURCES])
def test_counts_are_those_of_the_source(name):
    source = networks.SOURCES[name]
    row = networks.counts(name, registry.build(name), source)
    assert row["parameters_as_source"]
    # test_campplus.py counts what CAM++ spares by one context a segment. Resemblyzer's cells are no layers to count.
    assert row.get("gmacs_as_source") == {"campplus": False, "ge2e": None}.get(name, True)
    if isinstance(source.parameters, int):
        assert row["parameters"] + row["source_has_more"] == source.parameters


# GMAC of 200 frames in WeSpeaker's README (examples/voxceleb/v2 at dfa7419), counted by thop.
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        slow_if_large("wespeaker_resnet34", "4.55"),
        slow_if_large("wespeaker_resnet221", "21.29"),
        slow_if_large("wespeaker_resnet293", "28.10"),
        slow_if_large("ecapa_c512", "1.04"),
        slow_if_large("ecapa_c1024", "2.65"),
        slow_if_large("campplus", "1.15"),
    ],
)
def test_what_wespeaker_prints_counts_normalisations_as_well(name, printed):
    assert networks.SOURCES[name].printed[1] == printed
    layers = walk.layers(registry.build(name), 200)
    normalised = sum(math.prod(layer.inputs) for layer in layers if layer.kind == walk.NORMALISATION)
    total = sum(layer.macs for layer in layers) + 4 * normalised  # four operations for each value
    if name == "campplus":  # there the gates are made for each of 100 frames, here for one segment
        total += 52 * (128 * 64 + 64 * 32) * 99
    assert math.floor(total / 1e7) == round(100 * float(printed))  # digits are cut off, not rounded


def test_every_network_has_a_source():
    # Other tests register networks of their own.
    shipped = {name for name in registry.names() if type(registry.build(name)).__module__.startswith("kmq_jax.")}
    assert set(networks.SOURCES) == shipped - {"graph"}


def test_without_names_all_networks_are_counted(tmp_path):
    networks.main(NetworksBench(tiny=True, repeats=0, json=tmp_path / "n.json"))
    rows = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(networks.SOURCES) and len(rows) > 20
    assert all(row["parameters"] > 0 and row["macs"] > 0 for row in rows)


def test_a_network_with_other_counts_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(networks.SOURCES, "xvector", networks.Source("WeSpeaker", 4_610_525))
    options = NetworksBench(network=("xvector",), repeats=0, json=tmp_path / "n.json")
    with pytest.raises(UserError, match="xvector: parameters are not those of the source"):
        networks.main(options)
    (row,) = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert not row["parameters_as_source"] and "seconds" not in row


def test_times_are_ratios_and_make_a_table(tmp_path, capsys):
    path = tmp_path / "n.json"
    networks.main(NetworksBench(network=("wespeaker_resnet34", "ge2e"), tiny=True, repeats=1, json=path))
    assert "ge2e" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["network"] for row in rows] == ["wespeaker_resnet34", "ge2e"]
    assert rows[0]["time_of_reference"] == 1 and rows[1]["time_of_reference"] > 0
    rows[1] |= {"source": "Resemblyzer", "parameters_as_source": True, "why": "one bias"}
    lines = table_of({"reference": "wespeaker_resnet34", "rows": rows}, tmp_path)
    assert lines[1].endswith("| GMAC | GMAC there | time, wespeaker_resnet34 = 1 | seconds |")
    assert lines[4].startswith("| ge2e | 40 | 32 | 6,304 | Resemblyzer (1) | 0.00 |  |")
    assert lines[6].startswith("But for (1) one bias. Seconds are of other moments than the ratios")


def table_of(found, directory):
    (directory / "n.json").write_text(json.dumps(found))
    return tables.fill("<!-- table: n.json networks -->\n<!-- end -->", directory).splitlines()


def test_ratios_and_seconds_come_of_the_same_medians(monkeypatch):
    """The machine is half as fast in the second network's turns: seconds are those of the reference's median."""
    turns = iter([{"wespeaker_resnet34": [1.0, 1.0, 1.0]}, {"wespeaker_resnet34": [2.0] * 3, "ge2e": [1.0, 1.0, 9.0]},
                  {"wespeaker_resnet34": [1.0] * 3, "xvector": [0.25] * 3}])  # fmt: skip
    monkeypatch.setattr(networks, "in_turns", lambda *_, **__: next(turns))
    monkeypatch.setattr(networks, "embedder", lambda *_: print)
    found = networks.measure(NetworksBench(network=("wespeaker_resnet34", "ge2e", "xvector"), tiny=True, repeats=3))
    assert found["reference_seconds"] == 1
    assert [row["time_of_reference"] for row in found["rows"]] == [1, 0.5, 0.25]
    assert [row["seconds"] for row in found["rows"]] == [1, 0.5, 0.25]


def test_the_table_shows_what_the_source_counts_and_what_is_printed(tmp_path):
    row = {
        "network": "redimnet_b0",
        "features": 60,
        "embedding_size": 192,
        "parameters": 1_001_850,
        "macs": 909_734_400,
    }
    row |= {"source": "WeSpeaker", "parameters_as_source": True, "source_gmacs": "0.61", "source_frames": 200}
    more = {"printed_parameters": "1.0", "printed_gmacs": "0.43", "macs_of_printed_frames": 606_000_000}
    timed = {"time_of_reference": 0.5, "seconds": 0.25}
    about = {"reference": "r", "frames": 300}
    head, _, cells = table_of({**about, "rows": [row]}, tmp_path)[1:4]
    assert head.endswith("| GMAC | GMAC there | time, r = 1 |") and cells.endswith("| 0.91 | 0.61 of 200 frames |  |")
    lines = table_of({**about, "reference_seconds": 0.5, "rows": [row | more | timed, row]}, tmp_path)
    assert lines[1].endswith("| GMAC | GMAC there | printed: M, GMAC | ours | time, r = 1 | seconds |")
    assert lines[3].endswith("| 0.91 | 0.61 of 200 frames | 1.0, 0.43 | 0.61 | 0.50 | 0.250 |")
    assert lines[4].endswith("| 0.61 of 200 frames |  |  |  |  |") and len(lines) == 6


def test_an_unknown_network_is_told_before_the_work():
    with pytest.raises(UserError, match="unknown model 'gee2e'"):
        networks.measure(NetworksBench(network=("wespeaker_resnet34", "gee2e")))
