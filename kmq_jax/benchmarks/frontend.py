"""Filterbank features beside kaldi-native-fbank on the same audio: speed and greatest difference; and augmentation.

Ours runs in batches on all cores, compilation not counted; kaldi-native-fbank as it is called from Python, one
utterance after another on one core.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.data.source import open_source
from kmq_jax.frontend import KIWANO, WESPEAKER, FbankConfig, RoomConfig, augment_batch, fbank, num_frames

_PRESETS = {"kiwano": KIWANO, "wespeaker": WESPEAKER}


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    flags.add_argument("--data", default="synthetic:dev", help="audio: any DATA form (default: synthetic voices)")
    flags.add_argument("--utterances", type=int, default=64, help="how many, evenly over the data")
    flags.add_argument("--batch", type=int, default=16, help="utterances in a batch")
    flags.add_argument("--repeats", type=int, default=7, help="timed rounds, each side in turn; the median counts")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def kaldi_fbank(wave: np.ndarray, config: FbankConfig) -> np.ndarray:
    """Computes the features of one waveform [samples] by kaldi-native-fbank -> [frames, features]."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.samp_freq = config.sample_rate
    options.frame_opts.frame_length_ms = config.frame_length_ms
    options.frame_opts.frame_shift_ms = config.frame_shift_ms
    options.frame_opts.dither = 0.0
    options.frame_opts.preemph_coeff = config.preemphasis
    options.frame_opts.window_type = config.window
    options.mel_opts.num_bins = config.num_mel_bins
    options.mel_opts.low_freq = config.low_freq
    options.mel_opts.high_freq = config.high_freq
    options.use_energy = config.use_energy
    extractor = knf.OnlineFbank(options)
    # A list passes into C++ faster than an array does.
    extractor.accept_waveform(config.sample_rate, (wave * np.float32(config.waveform_scale)).tolist())
    extractor.input_finished()
    frames = [extractor.get_frame(i) for i in range(extractor.num_frames_ready)]
    return np.array(frames, np.float32).reshape(-1, config.num_features)


def _batches(waves: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Sorts by length and pads each batch to a whole number of seconds, so that few shapes are compiled."""
    batches = []
    for start in range(0, len(waves), size):
        rows = waves[start : start + size]
        rows += rows[-1:] * (size - len(rows))
        batch = np.zeros((size, -(-max(map(len, rows)) // 16000) * 16000), np.float32)
        for row, wave in zip(batch, rows):
            row[: len(wave)] = wave
        batches.append(batch)
    return batches


def _interleave(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each task, measured in turns after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in [False] + [True] * repeats:
        for name, task in tasks.items():
            start = time.perf_counter()
            jax.block_until_ready(task())
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def compare(waves: list[np.ndarray], config: FbankConfig, batch: int, repeats: int) -> dict[str, float]:
    """Runs both on the same waveforms.

    Returns:
        `speedup` over kaldi-native-fbank, `audio_seconds_per_second` of each, and the greatest and mean absolute
        difference of the log features.
    """
    waves = sorted(waves, key=len)
    batches = _batches(waves, batch)
    seconds = _interleave(
        {
            "ours": lambda: [np.asarray(fbank(jnp.asarray(rows), config)) for rows in batches],
            "kaldi": lambda: [kaldi_fbank(wave, config) for wave in waves],
        },
        repeats,
    )
    ours = [row for rows in batches for row in np.asarray(fbank(jnp.asarray(rows), config))]
    differences = np.concatenate(
        [
            np.abs(mine[: num_frames(len(wave), config)] - kaldi_fbank(wave, config)).ravel()
            for mine, wave in zip(ours, waves)
        ]
    )
    audio = sum(map(len, waves)) / config.sample_rate
    return {
        "speedup": seconds["kaldi"] / seconds["ours"],
        "ours_audio_seconds_per_second": audio / seconds["ours"],
        "kaldi_audio_seconds_per_second": audio / seconds["kaldi"],
        "max_difference": float(differences.max()),
        "mean_difference": float(differences.mean(dtype=np.float64)),
    }


def augmentation_seconds(batch: int, seconds: float, repeats: int) -> dict[str, float]:
    """Times `augment_batch` and `fbank` on a training batch of noise, one example in five reverberant."""
    rng = np.random.default_rng(0)
    wave = rng.standard_normal((batch, int(16000 * seconds)), np.float32) * 0.1
    example = {
        "wave": jnp.asarray(wave),
        "interference": jnp.asarray(wave[::-1]),
        "snr_db": jnp.full(batch, 10.0),
        "reverb": jnp.arange(batch) % 5 == 0,
    }
    augment = jax.jit(functools.partial(augment_batch, config=RoomConfig()))
    key = jax.random.key(0)
    return _interleave(
        {
            "augment_batch_seconds": lambda: augment(key, example),
            "fbank_batch_seconds": lambda: fbank(example["wave"], KIWANO),
        },
        repeats,
    )


def main(args: argparse.Namespace) -> None:
    """Prints the comparison of each preset, and the cost of augmenting a training batch."""
    for name in ("utterances", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} (={getattr(args, name)}) must be at least 1")
    try:
        import kaldi_native_fbank  # noqa: F401
    except ImportError:
        raise UserError("kaldi-native-fbank is not installed: pip install 'kmq_jax[test]'") from None
    source = open_source(args.data)
    chosen = np.linspace(0, len(source) - 1, min(args.utterances, len(source))).astype(int)
    waves = [source.load(int(i)) for i in chosen]
    result: dict = {"data": args.data, "utterances": len(waves), "presets": {}}
    for name, config in _PRESETS.items():
        figures = compare(waves, config, args.batch, args.repeats)
        result["presets"][name] = figures
        print(
            f"{name:10s} {figures['ours_audio_seconds_per_second']:7.0f} s of audio a second, "
            f"{figures['speedup']:.1f} times kaldi-native-fbank; "
            f"difference max {figures['max_difference']:.1e}, mean {figures['mean_difference']:.1e}"
        )
    result["batch_16x2s"] = augmentation_seconds(16, 2.0, args.repeats)
    times = {name: 1000 * value for name, value in result["batch_16x2s"].items()}
    print(
        f"training batch 16 x 2 s: augmentation {times['augment_batch_seconds']:.1f} ms, "
        f"features {times['fbank_batch_seconds']:.1f} ms"
    )
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
