"""All figures of a scored trial list at once, as the `score` command reports them."""

from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.metrics.bootstrap import enough, percentile_interval, speaker_bootstrap
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap, cllr, cross_calibrate, min_cllr
from kmq_jax.metrics.detection import act_dcf, check_trials, eer, min_dcf, number_speakers


def evaluate(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
    p_target: float = 0.01,
    calibration: AffineMap | IsotonicMap | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> Json:
    """Evaluates the scores of a trial list.

    Raw scores are not likelihood ratios, so actDCF and Cllr are measured on calibrated scores: calibrated by
    `calibration` where given, else by logistic maps, each fitted on other speakers than it is applied to
    (`cross_calibrate`). Intervals are the central 95 % of `speaker_bootstrap`.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.
        enrol_speaker: `[trials]`, a nonnegative integer for the speaker of each enrolment.
        test_speaker: `[trials]`, the same for the test utterance.
        p_target: prior probability of a target trial, for minDCF and actDCF; both costs are 1.
        calibration: a map to log likelihood ratios, fitted elsewhere.
        replicates: draws of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap and the folds.

    Returns:
        `eer` (percent), `eer_ci95`, `threshold` (at the EER), `min_dcf`, `min_dcf_ci95`, `act_dcf`, `cllr`, `min_cllr`,
        `p_target`, `trials`, `targets`, `speakers`, and how it was done: `calibration`, `intervals`. A figure for
        which there are too few speakers is None.

    Raises:
        UserError: as `detection.eer` and `normalised_dcf`, or the speakers do not fit the trials.

    >>> scores = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]
    >>> enrol, test = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]
    >>> figures = evaluate(scores, [1, 1, 1, 0, 0, 0], enrol, test, replicates=0)
    >>> figures["eer"], figures["min_dcf"], figures["trials"], figures["speakers"]
    (0.0, 0.0, 6, 3)
    """
    scores, labels = check_trials(scores, labels)
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(scores))
    rate, threshold = eer(scores, labels)
    result: Json = {
        "eer": 100 * rate,
        "eer_ci95": None,
        "threshold": threshold,
        "min_dcf": min_dcf(scores, labels, p_target),
        "min_dcf_ci95": None,
        "act_dcf": None,
        "cllr": None,
        "min_cllr": min_cllr(scores, labels),
        "p_target": p_target,
        "trials": len(scores),
        "targets": int(labels.sum()),
        "speakers": speakers,
    }

    try:
        if calibration is None:
            llrs = cross_calibrate(scores, labels, enrol, test, seed=seed)
            result["calibration"] = "logistic, cross-validated: every trial by a fit on trials of other speakers"
        else:
            llrs = calibration(scores)
            result["calibration"] = "given"
        result["act_dcf"], result["cllr"] = act_dcf(llrs, labels, p_target), cllr(llrs, labels)
    except UserError as error:
        result["calibration"] = f"none: {error}"

    result["intervals"] = "none"
    if replicates:
        draws = speaker_bootstrap(scores, labels, enrol, test, replicates, seed, p_target)
        if not enough(len(draws.eer), replicates):
            result["intervals"] = f"none: {speakers} speakers are too few to resample"
        else:
            low, high = percentile_interval(draws.eer)
            result["eer_ci95"] = [100 * low, 100 * high]
            result["min_dcf_ci95"] = list(percentile_interval(draws.min_dcf))
            result["intervals"] = f"central 95 % of {len(draws.eer)} bootstrap draws of speakers"
    return result
