"""Made-up recordings for the tests of the data package."""

from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float = 1.0, hertz: float = 220.0, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A tone in a little noise, float32 `[samples]`."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + 0.01 * noise).astype(np.float32)


def write(path: Path, wave: np.ndarray | None = None, rate: int = 16000, **settings: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(rate=rate) if wave is None else wave, rate, **settings)
    return path


def kaldi(root: Path, speakers: int = 3, each: int = 4, seconds: float = 1.0) -> Path:
    """A Kaldi directory of 16-bit WAV files; returns `root`."""
    scp, utt2spk = [], []
    for s in range(speakers):
        for u in range(each):
            name = f"s{s}-u{u}"
            write(root / "audio" / f"{name}.wav", tone(seconds + 0.1 * u, 150 + 60 * s, seed=10 * s + u))
            scp.append(f"{name} audio/{name}.wav\n")
            utt2spk.append(f"{name} s{s}\n")
    (root / "wav.scp").write_text("".join(scp))
    (root / "utt2spk").write_text("".join(utt2spk))
    return root
