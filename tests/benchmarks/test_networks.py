"""The table of all networks: every shipped one with a source has its counts; times are ratios; mistakes are told."""

import json

import pytest

from kmq_jax.benchmarks import networks
from kmq_jax.benchmarks.options import NetworksBench
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.study import tables


@pytest.mark.parametrize("name", ["wespeaker_resnet34", "ecapa_speechbrain_c1024", "xvector", "ge2e"])
def test_counts_are_those_of_the_source(name):
    row = networks.counts(name, registry.build(name), networks.SOURCES[name])
    assert row["parameters_as_source"] and row.get("gmacs_as_source", True)
    assert row["parameters"] + row["source_has_more"] == networks.SOURCES[name].parameters


def test_every_source_is_of_a_network():
    assert set(networks.SOURCES) <= set(registry.names())


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
    path.write_text(json.dumps({"reference": "wespeaker_resnet34", "rows": rows}))
    lines = tables.fill("<!-- table: n.json networks -->\n<!-- end -->", tmp_path).splitlines()
    assert lines[1].endswith("| GMAC | time, wespeaker_resnet34 = 1 |")
    assert lines[4].startswith("| ge2e | 40 | 32 | 6,304 | Resemblyzer (1) | 0.00 |")
    assert "But for (1) one bias." in lines


def test_an_unknown_network_is_told_before_the_work():
    with pytest.raises(UserError, match="unknown model 'gee2e'"):
        networks.measure(NetworksBench(network=("wespeaker_resnet34", "gee2e")))
