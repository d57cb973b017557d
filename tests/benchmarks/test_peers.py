"""What other runtimes need is found before any of them is made."""

import importlib.util

import pytest

from kmq_jax.benchmarks import peers
from kmq_jax.core.errors import UserError


def test_what_is_missing_is_told_before_any_peer_is_made(monkeypatch):
    assert set(peers.PACKAGES) == set(peers.PEERS)
    peers.check(["onnxruntime", "onnxruntime-int8"], has_speech=True)
    with pytest.raises(UserError, match=r"`peers` \(=onnxruntime-int8\) needs `calibration`"):
        peers.check(["onnxruntime", "onnxruntime-int8"], has_speech=False)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else there("json"))
    peers.check(["openvino"], has_speech=True)
    with pytest.raises(UserError, match=r"`peers` \(=openvino-int8\): the package nncf is not installed"):
        peers.check(["onnxruntime", "openvino-int8"], has_speech=True)


def test_features_of_every_peer_need_kaldis(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "kaldi" in name else there("json"))
    for name in peers.PEERS:
        with pytest.raises(UserError, match=rf"`peers` \(={name}\): the package kaldi_native_fbank is not installed"):
            peers.check([name], has_speech=True)
