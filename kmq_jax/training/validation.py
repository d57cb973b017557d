"""Equal error rate on a trial list, measured as training goes."""

import dataclasses
from collections.abc import Mapping, Sequence

from kmq_jax.data import source, trials
from kmq_jax.metrics import detection
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all
from kmq_jax.scoring import cosine
from kmq_jax.training.options import ValidationOptions


@dataclasses.dataclass(frozen=True)
class Validation:
    """A trial list and the recordings it names."""

    utterances: source.Utterances
    trials: trials.Trials

    def eer(self, model: SpeakerModel) -> float:
        """Equal error rate in percent (cosine of raw embeddings)."""
        embeddings = embed_all(model, self.utterances)
        scores = cosine.cosine_scores(embeddings, embeddings, self.trials.enrol, self.trials.test)
        return 100 * detection.eer(scores, self.trials.label)[0]

    def figures(self, model: SpeakerModel, smaller_bits: Sequence[int] = ()) -> dict[str, float]:
        """`validation_eer`, and of nested codebooks also `validation_eer_2bit` and so on."""
        smaller = {f"validation_eer_{bits}bit": self.eer(at_bits(model, bits)) for bits in smaller_bits}
        return {"validation_eer": self.eer(model), **smaller}


def open_validation(options: ValidationOptions) -> Validation | None:
    """Opens the validation set; None where the options name none.

    Raises:
        UserError: it cannot be read.
    """
    if not options.data:
        return None
    utterances = source.open_source(options.data)
    return Validation(utterances, trials.open_trials(options.trials, utterances))


def in_words(figures: Mapping[str, float]) -> str:
    """What `Validation.figures` found, as a line for people.

    >>> in_words({"validation_eer": 2.5, "validation_eer_2bit": 3.0})
    'validation EER 2.50 %, validation EER 2bit 3.00 %'
    """
    return ", ".join(f"{name.replace('_', ' ').replace('eer', 'EER')} {eer:.2f} %" for name, eer in figures.items())
