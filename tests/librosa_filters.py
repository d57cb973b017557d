"""Mel filters by librosa, kept in frontend/golden_filters.json: to import librosa compiles for a third of a minute.

Each is a name, librosa's own settings, and of every filter the first bin that is not zero and the values from there.
"""

import json
from pathlib import Path

import numpy as np

KEPT = json.loads((Path(__file__).parent / "frontend" / "golden_filters.json").read_text())
COMMON = {"sr": 16000, "n_fft": 512, "n_mels": 40}


def filters(name: str) -> np.ndarray:
    """Those of a name, float64 `[40, 257]`."""
    found = np.zeros((40, 257))
    for row, (first, values) in zip(found, KEPT[name]["filters"], strict=True):
        row[first : first + len(values)] = values
    return found
