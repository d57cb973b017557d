"""A threshold from one's own recordings, its file, and decisions by it: `kmq-jax threshold`, `verify --threshold`."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_object, write_json
from kmq_jax.core.progress import say_once
from kmq_jax.data import audio, source, speech
from kmq_jax.metrics.threshold import Rate, Threshold, choose_threshold
from kmq_jax.models.choices import Engine
from kmq_jax.models.embedder import Embedder
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.options import ThresholdOptions

Place = str | os.PathLike[str]
Recording = Place | tuple[np.ndarray, int]

KIND, VERSION = "threshold", 2
_MOST = 3000  # recordings: their 4.5 million pairs take some hundred megabytes


@dataclass(frozen=True)
class Found:
    """A threshold found on recordings.

    Attributes:
        threshold: with its error rates.
        recordings: how many there were.
        model: the fingerprint of the model that scored them.
        vad: whether what is not speech was left out of them.
    """

    threshold: Threshold
    recordings: int
    model: str
    vad: bool = False


def find_threshold(model: Place, data: str, options: ThresholdOptions | None = None) -> Found:
    """Embeds recordings of a few speakers, scores all pairs of them by cosine, and finds the threshold.

    Args:
        model: the MODEL.
        data: the DATA.
        options: what is wanted; the defaults where left out.

    Raises:
        UserError: the recordings are too few or too many to find a threshold, or the model or one of them cannot be
            read.
    """
    from kmq_jax.models.speaker_model import embed_all, fingerprint, load_model  # with JAX, which `decide` may not need

    how = options or ThresholdOptions()
    utterances = source.open_source(data)
    _check_speakers(utterances, data)
    network = load_model(os.fspath(model), how.bits)
    utterances = speech.of_table(utterances) if how.vad else utterances
    embeddings = embed_all(network, utterances, engine=how.engine)
    one, two = np.triu_indices(len(utterances), 1)  # each pair once, and none with itself
    speaker = utterances.labels
    scores = cosine_scores(embeddings, embeddings, one, two)
    same = speaker[one] == speaker[two]
    try:
        found = choose_threshold(scores, same, speaker[one], speaker[two], how.false_accept, how.replicates, how.seed)
    except UserError as error:
        raise UserError(f"`data` (={data}): {error}") from error
    return Found(found, len(utterances), fingerprint(network), how.vad)


def _check_speakers(utterances: source.Utterances, data: str) -> None:
    """Refuses recordings that no threshold can be found on, before any is embedded."""
    names = utterances.speaker_names
    if len(names) < 2:
        raise UserError(f"`data` (={data}) has recordings of one speaker only ({names[0]}): it takes two or more")
    if len(names) == len(utterances):
        raise UserError(f"`data` (={data}) has one recording a speaker only: some must have two or more")
    if len(utterances) > _MOST:
        raise UserError(f"`data` (={data}) has {len(utterances)} recordings: all pairs are of at most {_MOST}")


def save_threshold(path: Place, found: Found, model: Place, data: str, command: str) -> None:
    """Writes a threshold for `read_threshold`, as JSON; rates are fractions.

    Args:
        path: the file.
        found: what `find_threshold` gave.
        model: the MODEL it was found with.
        data: the DATA it was found on.
        command: the command line that found it.
    """
    chosen = found.threshold
    value: Json = {
        "kind": KIND,
        "version": VERSION,
        "threshold": chosen.value,
        "threshold_ci95": [chosen.low, chosen.high],
        "wanted_false_accept_rate": chosen.wanted,
    }
    for name, rate in (("false_accept_rate", chosen.false_accept), ("false_reject_rate", chosen.false_reject)):
        value |= {name: rate.value, f"{name}_ci95": [rate.low, rate.high]}
        value |= {f"{name}_trials": rate.trials, f"{name}_units": rate.units}
    value |= {
        "smallest_false_accept_rate": chosen.smallest,
        "rule_of_three": chosen.rule_of_three,
        "speakers": chosen.speakers,
        "speakers_to_halve": chosen.speakers_to_halve,
        "speaker_pairs": chosen.pairs,
        "recordings": found.recordings,
        "trials": chosen.false_accept.trials + chosen.false_reject.trials,
        "vad": found.vad,
        "fingerprint": found.model,
        "model": os.fspath(model),
        "data": data,
        "command": command,
    }
    write_json(path, value)


def describe(found: Found) -> str:
    """A threshold for people, in a few lines."""
    chosen = found.threshold
    accepts, rejects = chosen.false_accept, chosen.false_reject
    top = "no upper end" if chosen.high is None else f"{chosen.high:.4f}"
    return "\n".join(
        [
            f"threshold      {chosen.value:.4f} [{chosen.low:.4f}, {top}] for {_percent(chosen.wanted)} false accepts",
            f"false accepts  {_with_interval(accepts)} of {accepts.trials:,} comparisons of two speakers",
            f"false rejects  {_with_interval(rejects)} of {rejects.trials:,} comparisons within a speaker",
            f"{found.recordings} recordings of {chosen.speakers} speakers, worth {accepts.units:.0f} independent pairs "
            "of speakers; intervals: 95 %",
            f"an estimate: {chosen.speakers_to_halve} more speakers would halve the intervals; more recordings of the "
            "same speakers help less",
        ]
    )


def warning(found: Found) -> str | None:
    """A warning where the speakers are too few for the wanted false-accept rate; None otherwise."""
    chosen = found.threshold
    if chosen.wanted >= chosen.smallest:
        return None
    units = f"{chosen.false_accept.units:.0f}"
    return (
        f"warning: {chosen.speakers} speakers are too few for {_percent(chosen.wanted)} false accepts: they are worth "
        f"{units} independent pairs, and no rate below {_percent(chosen.smallest)} (1/{units}) can be told; without a "
        f"false accept it could still be {_percent(chosen.rule_of_three)} (rule of three); an estimate: it takes "
        f"{chosen.speakers_needed} speakers"
    )


@dataclass(frozen=True)
class Decider:
    """A threshold to decide by.

    Attributes:
        value: accept when `score >= value`.
        model: fingerprint of the model it is for; None where it was given as a number.
        known: its error rates, as a clause behind a verdict; empty where they are not known.
        false_accept: how often one comparison accepts a stranger; None where it is not known.
        vad: whether it was found on speech alone; None where that is not known.
    """

    value: float
    model: str | None = None
    known: str = ""
    false_accept: Rate | None = None
    vad: bool | None = None

    def require(self, own: str, name: str) -> None:
        """Refuses a model other than the one that the threshold was found with.

        Args:
            own: the fingerprint of the model in use.
            name: what messages call that model.

        Raises:
            UserError: it is another model.
        """
        if self.model not in (None, own):
            raise UserError(f"`threshold` was found with the model {self.model}, but {name} is {own}")

    def warn_of_vad(self, vad: bool) -> None:
        """Warns where the threshold was found with voice activity detection and `vad` is off now, or the reverse."""
        if self.vad not in (None, vad):
            then, now = ("without", "with") if vad else ("with", "without")
            say_once(f"warning: `threshold` was found {then} vad, now it is {now}: its error rates are others")


def read_threshold(text: str) -> Decider:
    """Reads a threshold: a number, or a file that `save_threshold` wrote.

    Raises:
        UserError: it is neither, or the file is damaged.

    >>> read_threshold("0.5")
    Decider(value=0.5, model=None, known='', false_accept=None, vad=None)
    """
    try:
        number = float(text)
    except ValueError:
        return _from_file(text)
    check_threshold(number, text)
    return Decider(number)


def check_threshold(value: float, shown: str | None = None) -> None:
    """Refuses a number that is no threshold of cosines.

    Args:
        value: the threshold.
        shown: how messages show it; None: as a number.

    Raises:
        UserError: it is not finite, or not between -1 and 1.
    """
    shown = str(value) if shown is None else shown
    if not math.isfinite(value):
        raise UserError(f"`threshold` (={shown}) must be a finite number, or a file of `kmq-jax threshold`")
    if abs(value) > 1:
        raise UserError(f"`threshold` (={shown}) must lie between -1 and 1, as cosines do")


def needed_threshold(text: str | None, model: str, vad: bool) -> Decider:
    """As `read_threshold`, but a threshold must be given; if not, the error says how to get one for this model.

    Args:
        text: a number or a file; None or empty where none was given.
        model: the MODEL, for the message.
        vad: whether recordings are decided by their speech alone; see `Decider.warn_of_vad`.

    Raises:
        UserError: none is given, or it cannot be read.
    """
    if not text:
        how = f"kmq-jax threshold --model={model} --data=FOLDER --out=threshold.json"
        raise UserError(f"`model` needs `threshold`; to get one from recordings of a few speakers: {how}")
    threshold = read_threshold(text)
    threshold.warn_of_vad(vad)
    return threshold


def _from_file(path: str) -> Decider:
    """A threshold from a file, which may come from anyone."""
    try:
        held = read_object(path)
    except UserError as error:
        raise UserError(f"`threshold`: {error}") from error
    if held.get("kind") != KIND or held.get("version") != VERSION:
        raise UserError(f"`threshold` (={path}) is no file of `kmq-jax threshold --out` that this version reads")
    try:
        value, speakers = _number(held["threshold"], -math.inf), int(_number(held["speakers"]))
        accepts, rejects = (_read_rate(held, name) for name in ("false_accept_rate", "false_reject_rate"))
        model, vad = held["fingerprint"], held.get("vad", False)  # there was no `vad` before files had it
        if not isinstance(model, str) or not isinstance(vad, bool):
            raise TypeError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"`threshold` (={path}) is damaged: a number or the model's fingerprint is missing") from None
    check_threshold(value, f"{value} in {path}")
    known = (
        f"; at it {_with_interval(accepts)} of different speakers are accepted, {_with_interval(rejects)} of same "
        f"speakers rejected (95 %; from {speakers} speakers, one recording against one)"
    )
    return Decider(value, model, known, accepts, vad)


def _read_rate(held: Json, name: str) -> Rate:
    low, high = held[f"{name}_ci95"]
    value, low, high = (_number(one, 0, 1) for one in (held[name], low, high))
    return Rate(value, low, high, int(_number(held[f"{name}_trials"])), _number(held[f"{name}_units"]))


def _number(value: object, low: float = 0, high: float = math.inf) -> float:
    # A bool is an int in Python. NaN lies within no range.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{value!r} is no number from {low} to {high}")
    return float(value)


@dataclass(frozen=True)
class Decision:
    """What one model says of two recordings.

    Attributes:
        decision: whether it takes them for one speaker.
        score: their cosine.
        threshold: what the score was compared with.
    """

    decision: bool
    score: float
    threshold: float

    def describe(self, threshold: Decider) -> str:
        """The verdict in one line, with what is known of the threshold.

        >>> Decision(True, 0.625, 0.5).describe(Decider(0.5))
        'same speaker: score 0.6250 is at least the threshold 0.5000'
        """
        sides = "same speaker: score" if self.decision else "different speakers: score"
        where = "at least" if self.decision else "below"
        return f"{sides} {self.score:.4f} is {where} the threshold {self.threshold:.4f}{threshold.known}"


def decide(
    model: Place,
    enrol: Sequence[Recording],
    test: Recording,
    threshold: Decider,
    bits: int | None = None,
    engine: Engine = "auto",
) -> Decision:
    """Decides by one model whether a recording is of the claimed speaker.

    Args:
        model: the MODEL.
        enrol: recordings of the claimed speaker, at least one; files or `(wave, sample rate)`. The mean of their
            length-normalised embeddings is compared.
        test: the recording to verify.
        threshold: what to decide by.
        bits: at which a nested model is read; None is the most it has.
        engine: what runs the network.

    Raises:
        UserError: there is no recording of the claimed speaker; the threshold is none, or was found with another model;
            or a recording or the model cannot be read.
    """
    if not enrol:  # the test would be compared with itself
        raise UserError("there is no recording of the claimed speaker")
    check_threshold(threshold.value)
    embedder = Embedder(model, bits, engine)
    threshold.require(embedder.fingerprint, os.fspath(model))
    # One call for all recordings; the one to verify comes last.
    rows = embedder.embed([audio.read_recording(one) for one in (*enrol, test)])
    speaker = average(rows, [range(len(enrol))]) if len(enrol) > 1 else rows[:1]
    score = float(cosine_scores(speaker, rows, [0], [len(enrol)])[0])
    # Scores are float32: a threshold that a score equals in float32 must accept it.
    return Decision(score >= float(np.float32(threshold.value)), score, threshold.value)


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def _with_interval(rate: Rate) -> str:
    value, low, high = (f"{round(100 * one, 2):.3g}" for one in (rate.value, rate.low, rate.high))
    return f"{value} % [{low}, {high}]"
