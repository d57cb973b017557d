"""Filterbank features beside kaldi-native-fbank on the same audio, and the cost of augmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.benchmarks.options import FrontendBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.data.source import open_source
from kmq_jax.frontend import KIWANO, WESPEAKER, FbankConfig, FrontEnd, RoomConfig, augment_batch, fbank, num_frames

_PRESETS = {"kiwano": KIWANO, "wespeaker": WESPEAKER}


def kaldi_fbank(wave: np.ndarray, config: FrontEnd) -> np.ndarray:
    """Computes the features of one waveform [samples] by kaldi-native-fbank -> [frames, features].

    Raises:
        UserError: the front end is not Kaldi's.
    """
    import kaldi_native_fbank as knf

    if not isinstance(config, FbankConfig):
        raise UserError("kaldi-native-fbank has no features but Kaldi's, and this model's are others")
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
    """Pads batches of waveforms, sorted by length, to whole numbers of seconds, so that few shapes are compiled."""
    batches = []
    for start in range(0, len(waves), size):
        rows = waves[start : start + size]
        rows += rows[-1:] * (size - len(rows))  # the last batch is filled up with its longest recording
        # Rounded up to whole seconds of 16 kHz.
        batch = np.zeros((size, -(-max(map(len, rows)) // 16000) * 16000), np.float32)
        for row, wave in zip(batch, rows):
            row[: len(wave)] = wave
        batches.append(batch)
    return batches


def compare(waves: list[np.ndarray], config: FbankConfig, batch: int, repeats: int) -> dict[str, float]:
    """Runs both on the same waveforms.

    Returns:
        `speedup` over kaldi-native-fbank, `audio_seconds_per_second` of each, and the greatest and mean absolute
        difference of the log features.
    """
    waves = sorted(waves, key=len)  # recordings of like length share a batch
    batches = _batches(waves, batch)
    seconds = medians(
        in_turns(
            {
                "ours": lambda: [np.asarray(fbank(jnp.asarray(rows), config)) for rows in batches],
                "kaldi": lambda: [kaldi_fbank(wave, config) for wave in waves],
            },
            repeats,
        )
    )
    ours = [row for rows in batches for row in np.asarray(fbank(jnp.asarray(rows), config))]
    # `ours` may have rows that only fill up the last batch: `zip` drops them.
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
    return medians(
        in_turns(
            {
                "augment_batch_seconds": lambda: augment(key, example),
                "fbank_batch_seconds": lambda: fbank(example["wave"], KIWANO),
            },
            repeats,
        )
    )


def main(options: FrontendBench) -> None:
    """Prints the comparison of each preset, and the cost of augmenting a training batch."""
    try:
        import kaldi_native_fbank  # noqa: F401
    except ImportError:
        raise UserError("kaldi-native-fbank is not installed: pip install 'kmq_jax[test]'") from None
    source = open_source(options.data)
    chosen = np.linspace(0, len(source) - 1, min(options.utterances, len(source))).astype(int)
    waves = [source.load(int(i)) for i in chosen]
    result: Figures = {"data": options.data, "utterances": len(waves), "presets": {}}
    for name, config in _PRESETS.items():
        figures = compare(waves, config, options.batch, options.repeats)
        result["presets"][name] = figures
        print(
            f"{name:10s} {figures['ours_audio_seconds_per_second']:7.0f} s of audio a second, "
            f"{figures['speedup']:.1f} times kaldi-native-fbank; "
            f"difference max {figures['max_difference']:.1e}, mean {figures['mean_difference']:.1e}"
        )
    result["batch_16x2s"] = augmentation_seconds(16, 2.0, options.repeats)
    times = {name: 1000 * value for name, value in result["batch_16x2s"].items()}
    print(
        f"training batch 16 x 2 s: augmentation {times['augment_batch_seconds']:.1f} ms, "
        f"features {times['fbank_batch_seconds']:.1f} ms"
    )
    if options.json:
        write_json(options.json, result)
