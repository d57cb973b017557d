"""What half precision of biases costs: packed files with biases in float16 beside the same files with float32."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks.extract import cosines
from kmq_jax.benchmarks.options import BiasesBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.core.files import Json, write_json
from kmq_jax.core.progress import progress
from kmq_jax.data import source
from kmq_jax.data.trials import open_trials
from kmq_jax.diagnosis.run import used_only
from kmq_jax.metrics.paired import Errors
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, load_model
from kmq_jax.ptq.quantize import quantize_model, with_half_biases
from kmq_jax.scoring.cosine import cosine_scores


def both_forms(model: SpeakerModel, bits: int, fit: str, skip: Sequence[str] = ()) -> tuple[SpeakerModel, SpeakerModel]:
    """A network at so many bits, fitted on `fit`, with biases in float32 and in float16; all else is the same."""
    # The first rule that matches a name counts: what is skipped comes before all kernels.
    rules = [*(quant.QuantRule(pattern, None) for pattern in skip), quant.QuantRule("/kernel$", quant.QuantSpec(bits))]
    single = quantize_model(model, rules, fit or None)
    params = with_half_biases(single.variables["params"])
    return single, dataclasses.replace(single, variables={**single.variables, "params": params})


def compared(forms: Sequence[SpeakerModel], data: str, listed: str, options: BiasesBench) -> Json:
    """What the second form changes on a trial list.

    Returns:
        Numbers of `trials`, `targets`, `speakers` and `utterances`; `eer` and `eer_half` of the two forms, in percent;
        changes of EER and minDCF with paired intervals, as `metrics.paired.Errors.minus` gives them; and `min_cosine`,
        the least cosine of the two embeddings of an utterance.
    """
    table = source.open_source(data)
    table, pairs = used_only(table, open_trials(listed, table))
    single, half = (embed_all(model, table, engine=options.engine) for model in forms)
    about = pairs.label, table.labels[pairs.enrol], table.labels[pairs.test]
    scores = [cosine_scores(rows, rows, pairs.enrol, pairs.test) for rows in (single, half)]
    errors = [Errors.of(row, *about, options.replicates) for row in scores]
    near = cosines(single, half)
    return {
        "trials": len(pairs.label),
        "targets": int(np.sum(pairs.label)),
        "speakers": len(np.unique(np.concatenate(about[1:]))),
        "utterances": len(table),
        "eer": errors[0].eer,
        "eer_half": errors[1].eer,
        **errors[1].minus(errors[0]),
        "min_cosine": float(near.min()),
    }


def main(options: BiasesBench) -> None:
    """Prints the changes, a line for each number of bits and list."""
    model, rows = load_model(options.model), []
    for bits in progress(list(options.bits), desc="biases", unit="file"):
        forms = both_forms(model, bits, options.fit, options.skip)
        sizes = [quant.size_bytes(one.variables).total for one in forms]
        sets = {data: compared(forms, data, listed, options) for data, listed in zip(options.data, options.trials)}
        rows.append({"bits": bits, "bytes": sizes[0], "bytes_half": sizes[1], "sets": sets})
        for data, one in sets.items():
            low, high = one["eer_change_ci95"] or (float("nan"),) * 2
            changed = f"{one['eer_change']:+.3f} [{low:+.3f}, {high:+.3f}]"
            print(f"{bits} bits, {data}: {sizes[0]:,} -> {sizes[1]:,} bytes; least cosine {one['min_cosine']:.7f}")
            print(f"  EER {one['eer']:.3f} -> {one['eer_half']:.3f} %, change {changed}")
    figures: Figures = {"kind": "biases", "fit": options.fit, "skip": list(options.skip), "rows": rows}
    if options.json:
        write_json(options.json, figures)
