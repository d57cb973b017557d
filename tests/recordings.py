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


def cnceleb(root: Path, with_map: bool = True) -> Path:
    """CN-Celeb's release in miniature, each recording a tone of its own; returns `root`."""
    first = root / "CN-Celeb_flac"
    names = (
        "data/id00010/singing-01-001", "data/id00010/vlog-01-001", "data/id00800/singing-01-001",
        "data/id00800/interview-01-002", "eval/enroll/id00800-enroll", "eval/test/id00800-singing-01-005",
        "eval/test/id00801-movie-01-001",
    )  # fmt: skip
    for i, name in enumerate(names):
        write(first / f"{name}.flac", tone(hertz=200 + 150 * i, seed=i))
    write(root / "CN-Celeb2_flac" / "data" / "id10020" / "vlog-01-001.flac")
    (first / "dev").mkdir()
    (first / "dev" / "dev.lst").write_text("id00010\n")
    lists = first / "eval" / "lists"
    lists.mkdir()
    (lists / "enroll.lst").write_text("id00800-enroll enroll/id00800-enroll.wav\n")
    (lists / "trials.lst").write_text(
        "id00800-enroll test/id00800-singing-01-005.wav 1\nid00800-enroll test/id00801-movie-01-001.wav 0\n"
    )
    if with_map:
        (lists / "enroll.map").write_text("id00800-enroll id00800/singing-01-001.wav id00800/interview-01-002.wav\n")
    return root
