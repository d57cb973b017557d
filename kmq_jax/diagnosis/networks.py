"""Experiments on networks: single components and layers at fewer bits, and quantization noise in every block."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.core.tree import Variables, named_leaves
from kmq_jax.data import source
from kmq_jax.data.trials import Trials
from kmq_jax.diagnosis import layers, people, scores, variants
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.metrics.bootstrap import enough, percentile_interval, speaker_bootstrap
from kmq_jax.metrics.detection import Array, check_trials, eer
from kmq_jax.models import walk
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of
from kmq_jax.nn import integers
from kmq_jax.scoring.cosine import average, cosine_scores

COMPONENT_DRAWS = 5
"""Intervals of components' EER are of one in so many draws of speakers: there are many components."""

_CAPTURED = 4  # recordings in a batch while every part's output of two networks is held


Numbers = TypeVar("Numbers", float, Array)


def check_same_network(reference: SpeakerModel, quantized: SpeakerModel, name: str) -> None:
    """Raises `UserError` where two models cannot exchange layers. Either may round activations alone."""
    for what in ("architecture", "frontend"):
        one, two = getattr(reference, what), getattr(quantized, what)
        if one != two:
            raise UserError(f"{name}: its {what} is {two}, the reference's {one}")
    weights = [{**m.variables, integers.COLLECTION: {}} for m in (reference, quantized)]
    shapes = [
        {leaf_name: tuple(leaf.shape) for leaf_name, leaf in named_leaves(tree, quant.is_codebook_tensor)}
        for tree in weights
    ]
    for leaf_name in sorted(set(shapes[0]) | set(shapes[1])):
        if shapes[0].get(leaf_name) != shapes[1].get(leaf_name):
            raise UserError(
                f"{name}: {leaf_name} has shape {shapes[1].get(leaf_name, 'none')}, "
                f"in the reference {shapes[0].get(leaf_name, 'none')}"
            )


class Networks:
    """A reference network, its quantized versions, and the experiments on them."""

    def __init__(
        self,
        reference: SpeakerModel,
        quantized: Mapping[int, SpeakerModel],
        utterances: source.Utterances,
        options: DiagnosisOptions,
    ):
        """Puts the weights on the devices.

        Args:
            reference: the full-precision model.
            quantized: by bits; the same network.
            utterances: those that trials compare.
            options: how much is computed.

        Raises:
            UserError: the networks differ; or there is no model at `retention_bits`.
        """
        for bits, other in quantized.items():
            check_same_network(reference, other, f"{bits} bits")
        self.models = dict(sorted(quantized.items(), reverse=True))
        self.retention_bits = options.retention_bits or (min(quantized),)
        if missing := set(self.retention_bits) - set(quantized):
            raise UserError(f"retention at {min(missing)} bits: there is no quantized model at these bits")
        self.reference, self.utterances, self.options = reference, utterances, options
        self.network = reference.network(options.compute)
        self.fbank = frontend_of(reference.frontend)
        every = [reference, *self.models.values()]
        self.base, *lows = variants.alike([variants.on_devices(m.variables, m.bits) for m in every])
        self.low = dict(zip(self.models, lows))
        self.snr = np.full(len(utterances), np.nan)
        self.seconds: dict[str, float] = {}

    def _embed(
        self,
        rows: Array | None,
        trees: Sequence[Variables],
        desc: str,
        seen: Callable[[int, Array], None] | None = None,
    ) -> Array:
        """float32 `[variants, rows, dim]`, with the networks' time noted under `desc`."""
        table = self.utterances if rows is None else self.utterances.select(rows)
        shown, seconds, most = f"{desc}, {len(trees)} networks", self.options.max_seconds, self.options.max_frames
        with self.timed(desc):
            batches = variants.feature_batches(
                self.network, self.fbank, table, max_seconds=seconds, max_frames=most, seen=seen, desc=shown
            )
            return variants.embed_variants(self.network, batches, trees, len(table))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes how long what runs within took, as `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def score(self, trials: Trials) -> scores.ScoredTrials:
        """Scores the trials, whose rows are of `utterances`, with every network; notes each utterance's SNR."""

        def measure(i: int, wave: Array) -> None:
            self.snr[i] = people.snr_db(wave)

        check_trials(np.zeros(len(trials)), trials.label)  # before minutes of embedding
        own, *others = self._embed(None, [self.base, *self.low.values()], "scores", measure)

        def score(enrolled: Array, tested: Array) -> Array:
            one = enrolled if trials.models is None else average(enrolled, trials.models)
            return cosine_scores(one, tested, trials.enrol, trials.test)

        full = {bits: score(rows, rows) for bits, rows in zip(self.models, others)}
        test_only = {bits: score(own, rows) for bits, rows in zip(self.models, others)}
        speaker = self.utterances.labels
        # The speaker of a model is that of its first utterance.
        enrolled = speaker if trials.models is None else speaker[[members[0] for members in trials.models]]
        sides = enrolled[trials.enrol], speaker[trials.test]
        return scores.scored_trials(score(own, own), full, test_only, trials.label, *sides)

    def subset(self, count: int) -> tuple[Array, Array, Array, Array]:
        """A subset that `spread_over_speakers` chose, and all pairs of it.

        Returns:
            `rows` `[count]` of the table; `one` and `two` `[pairs]`, places within these; `labels` `[pairs]`.

        Raises:
            UserError: there are no pairs of one speaker, or none of two.
        """
        rows = variants.spread_over_speakers(self.utterances, count, seed=self.options.seed)
        one, two = np.triu_indices(len(rows), 1)
        labels = self.utterances.labels[rows]
        same = labels[one] == labels[two]
        if not same.any() or same.all():
            raise UserError(f"{len(rows)} utterances have no pairs of both one speaker and two: take more")
        return rows, one, two, same

    def retention(self, trials: Trials) -> list[Json]:
        """Retention of components, and its mirror.

        Returns:
            `bits, experiment` ("reference", "low", "retention", "mirror"), `component, parameters` (share), `trials,
            utterances, eer` in percent with `eer_ci95, mean_abs_drift` (against the reference), `recovery` and
            `recovery_ci95` in percent of the EER's rise (of mirror: the share of the rise that the component causes
            alone), None where it does not rise in nine of ten draws of speakers, `drift_recovery` in percent of mean
            |drift| (of mirror: the share).
        """
        count = self.options.retention_utterances
        if trials.models is not None:  # pairs of utterances tell components apart as well as trials of models do
            count = min(count or len(self.utterances), len(self.utterances))
        if 0 < count < len(self.utterances) or trials.models is not None:
            rows, one, two, labels = self.subset(count)
        else:
            rows, one, two, labels = np.arange(len(self.utterances)), trials.enrol, trials.test, trials.label
        tried: list[tuple[int, str, str, Variables]] = [(32, "reference", "", self.base)]
        for bits in sorted(self.retention_bits, reverse=True):
            tried.append((bits, "low", "", self.low[bits]))
            mixes = variants.component_mixes(self.network, self.base, self.low[bits])
            tried += [(bits, *mixed) for mixed in mixes]
        embeddings = self._embed(rows, [tree for *_, tree in tried], "retention")
        speaker = self.utterances.labels[rows]
        with self.timed("retention intervals"):
            found = [
                _Rates.of(cosine_scores(e, e, one, two), labels, speaker[one], speaker[two], self.options)
                for e in embeddings
            ]
        shares = component_shares(self.network, self.reference.variables)
        lows = {bits: rates for (bits, kind, *_), rates in zip(tried, found) if kind == "low"}
        result = []
        for (bits, kind, component, _), rates in zip(tried, found):
            about: Json = {"bits": bits, "experiment": kind, "component": component}
            about |= {"parameters": shares.get(component), "trials": len(labels), "utterances": len(rows)}
            recovery = _recovery(kind, found[0], lows[bits], rates) if component else {}
            result.append(about | rates.row(found[0]) | recovery)
        return result

    def layers(self) -> tuple[list[Json], list[Json]]:
        """Distortion of every kernel, and what it does alone; and activation SQNR of every block.

        Returns:
            Rows of layers: `layer, component, block, weights, bits`, those of `layers.weight_row`, `hessian_trace,
            predicted_loss` (trace over weights x squared error), `activation_sqnr_db` of its block in the quantized
            network, `damage` (mean |drift| on all pairs of the subset when this layer alone is quantized) and
            `damage_cosine` (mean of 1 - cos between an utterance's embeddings). And of blocks: `bits, block, depth,
            sqnr_db, step_db`.
        """
        # Tables go from input to output; a tree's own order is that of the alphabet.
        order = [f"{layer.name}/kernel" for layer in walk.layers(self.network)]
        kernels = layers.kernels_of(self.reference.variables)
        kernels.sort(key=lambda name: order.index(name) if name in order else len(order))
        rows = [row for bits in self.models for row in self._weight_rows(bits, kernels)]
        blocks: list[Json] = []
        if self.options.layer_utterances:
            subset, one, two, _ = self.subset(self.options.layer_utterances)
            self._fill_damage(subset, one, two, kernels, rows)
            blocks = self._fill_activations(subset, rows)
        if self.options.hessian_draws:
            self._fill_traces(kernels, rows)
        return rows, blocks

    def _weight_rows(self, bits: int, kernels: list[str]) -> list[Json]:
        """The rows of `layers` at one number of bits, without what networks must run for."""
        base, quantized = dict(named_leaves(self.reference.variables["params"])), self.models[bits]
        leaves = dict(named_leaves(quantized.variables["params"], quant.is_codebook_tensor))
        rows: list[Json] = []
        for name in kernels:
            part = self.network.part_of(name)
            row: Json = {"layer": name.removesuffix("/kernel"), "component": part.component}
            row |= {"block": part.name, "weights": int(np.size(base[name])), "bits": bits}
            row |= layers.weight_row(base[name], leaves[name], quantized.bits)
            row |= {"hessian_trace": None, "predicted_loss": None, "activation_sqnr_db": None}
            rows.append(row | {"damage": None, "damage_cosine": None})
        return rows

    def _fill_damage(self, subset: Array, one: Array, two: Array, kernels: list[str], rows: list[Json]) -> None:
        """Adds what each layer does alone, on the pairs `one`, `two` of the utterances `subset`."""
        # The reference runs in the same program, so that differences come from the weights alone.
        tried = [self.base]
        for tree in self.low.values():
            tried += variants.layer_mixes(self.base, tree, kernels)
        own, *others = self._embed(subset, tried, "single layers")
        base = cosine_scores(own, own, one, two)
        each = np.arange(len(own))
        for row, rows_of in zip(rows, others, strict=True):  # both go by bits, then by layer
            row["damage"] = float(np.abs(cosine_scores(rows_of, rows_of, one, two) - base).mean(dtype=np.float64))
            row["damage_cosine"] = float(1 - cosine_scores(own, rows_of, each, each).mean(dtype=np.float64))

    def _fill_activations(self, subset: Array, rows: list[Json]) -> list[Json]:
        """Adds the activation SQNR of the part that each layer belongs to; gives the rows of all parts."""
        table, options = self.utterances.select(subset), self.options
        with self.timed("activations"):
            batches = variants.feature_batches(
                self.network,
                self.fbank,
                table,
                max_seconds=options.max_seconds,
                max_frames=options.max_frames,
                desc="activations",
                batch_size=_CAPTURED,
            )
            sqnr = variants.activation_sqnr(self.network, batches, self.base, list(self.low.values()))
        component = {part.name: part.component for part in self.network.parts()}
        blocks: list[Json] = []
        for bits, found in zip(self.low, sqnr):
            steps = steps_db(list(found.values()))
            for depth, (name, value) in enumerate(found.items()):
                about = {"bits": bits, "block": name, "component": component[name], "depth": depth}
                blocks.append(about | {"sqnr_db": value, "step_db": steps[depth]})
        place = {(row["bits"], row["block"]): row["sqnr_db"] for row in blocks}
        for row in rows:
            row["activation_sqnr_db"] = place.get((row["bits"], row["block"]))
        return blocks

    def _fill_traces(self, kernels: list[str], rows: list[Json]) -> None:
        """Adds Hessian traces, measured on crops without padding."""
        options = self.options
        samples = int(options.hessian_seconds * source.SAMPLE_RATE)
        long = np.flatnonzero(self.utterances.lengths() >= samples)
        if not len(long):
            raise UserError(f"no utterance is {options.hessian_seconds:g} s long: give a shorter --hessian_seconds")
        with self.timed("Hessian traces"):
            table = self.utterances.select(long)
            chosen = variants.spread_over_speakers(table, options.hessian_utterances, least=1, seed=options.seed)
            batches = variants.feature_batches(
                self.network,
                self.fbank,
                table.select(chosen),
                max_seconds=options.hessian_seconds,
                batch_size=len(chosen),
            )
            features = next(iter(batches)).features[: len(chosen)]  # without rows of padding
            weights = variants.on_devices(self.reference.variables)
            traces = layers.hessian_traces(
                self.reference.network(), weights, features, kernels, options.hessian_draws, options.seed
            )
        for row in rows:
            trace = traces[f"{row['layer']}/kernel"]
            row |= {"hessian_trace": trace, "predicted_loss": trace / row["weights"] * row["squared_error"]}


def steps_db(values: Sequence[float]) -> list[float | None]:
    """How much each block's SQNR differs from that of the block before; None where nothing differs yet.

    >>> steps_db([float("inf"), 30.0, 20.5])
    [None, None, -9.5]
    """
    pairs = zip([np.inf, *values], values)
    return [after - before if np.isfinite([before, after]).all() else None for before, after in pairs]


def component_shares(network: SpeakerNetwork, variables: Variables) -> dict[str, float]:
    """The share of all parameters that each component has."""
    sizes: dict[str, int] = {}
    for name, leaf in named_leaves(variables["params"], quant.is_codebook_tensor):
        part = network.component_of(name)
        sizes[part] = sizes.get(part, 0) + int(leaf.size)
    total = sum(sizes.values())
    return {part: size / total for part, size in sizes.items()}


@dataclass(frozen=True, eq=False)
class _Rates:
    """Scores of one variant, its EER, and the EER's draws over speakers."""

    scores: Array
    eer: float
    draws: Array | None

    @classmethod
    def of(cls, values: Array, labels: Array, enrol: Array, test: Array, options: DiagnosisOptions) -> "_Rates":
        draws = None
        if options.replicates:
            some = max(options.replicates // COMPONENT_DRAWS, 1)
            found = speaker_bootstrap(values, labels, enrol, test, some, options.seed).eer
            draws = found if enough(len(found), some) else None
        return cls(values, eer(values, labels)[0], draws)

    def row(self, base: "_Rates") -> Json:
        """The columns of `Networks.retention` from `eer` on, those about recovery empty."""
        interval = None if self.draws is None else [100 * x for x in percentile_interval(self.draws)]
        drift = float(np.abs(self.scores - base.scores).mean())
        nothing = {"recovery": None, "recovery_ci95": None, "drift_recovery": None}
        return {"eer": 100 * self.eer, "eer_ci95": interval, "mean_abs_drift": drift, **nothing}


def _recovery(kind: str, base: _Rates, low: _Rates, here: _Rates) -> Json:
    """Recovery of the EER and of drift; of the mirror experiment, the share of the damage."""

    def share(full: Numbers, few: Numbers, mixed: Numbers) -> Numbers:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * ((few - mixed) if kind == "retention" else (mixed - full)) / (few - full)

    row: Json = {"recovery": None, "recovery_ci95": None, "drift_recovery": None}
    shares, risen = None, low.eer > base.eer
    if risen and base.draws is not None and low.draws is not None and here.draws is not None:
        # Where a draw's EER does not rise, there is nothing to recover a share of.
        fine = low.draws > base.draws
        risen = fine.mean() >= 0.9  # else it is chance, and a share of it means nothing
        shares = share(base.draws[fine], low.draws[fine], here.draws[fine])
    if risen:
        row["recovery"] = float(share(base.eer, low.eer, here.eer))
        row["recovery_ci95"] = None if shares is None else list(percentile_interval(shares))
    # Drift can be recovered even where the EER does not rise.
    worst = float(np.abs(low.scores - base.scores).mean())
    if worst > 0:
        row["drift_recovery"] = float(share(0.0, worst, float(np.abs(here.scores - base.scores).mean())))
    return row
