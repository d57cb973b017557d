"""`kmq-jax push`: a packed model and its card, to the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: Path = option("the .kmq file", metavar="FILE")
    repo: str = option("ORG/NAME", metavar="ORG/NAME")
    license: str | None = option(
        "short name of the licence, such as cc-by-4.0: that of the network it was made from; left out: as the file "
        "tells it",
        None,
    )
    source: str | None = option("what the model was made from and how; left out: as the file tells it", None)
    metrics: Path | None = option("JSON of `score`; left out: as the file tells it", None)
    card: Path | None = option("write the card here and push nothing", None, writes="file")
    out: Path | None = option(
        "write the .kmq file that tells all this of itself here and push nothing", None, writes="file"
    )
    private: bool = option("a new repository is private", False)


COMMAND = Command(
    "push",
    "Puts a packed model and a model card on the Hugging Face Hub, as one commit; `hf auth login` first. Whoever has\n"
    "kmq_jax then names it hf://ORG/NAME wherever a MODEL is asked for. The file tells of itself what the card says.",
    "kmq-jax push --model=runs/r34-4bit.kmq --repo=me/r34-4bit --license=cc-by-4.0 \\\n"
    '      --source="WeSpeaker ResNet34 on VoxCeleb2, 4 bits" --metrics=metrics.json',
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    import tempfile

    from kmq_jax.core.files import atomic_write, read_object
    from kmq_jax.models import hub
    from kmq_jax.models.speaker_model import load_model, save_model

    if not files.model.is_file():
        raise UserError(f"`model` (={files.model}) must be a .kmq file")
    metrics = read_object(files.metrics) if files.metrics else None
    model = hub.with_about(load_model(files.model), files.license, files.source, metrics)
    text = hub.card(model, files.repo)
    if files.card:
        with atomic_write(files.card) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if files.out:
        save_model(files.out, model)
    if not (files.card or files.out):
        with tempfile.TemporaryDirectory() as place:
            # What the card says, the file tells, too.
            save_model(Path(place, hub.FILE), model)
            print(hub.push(Path(place, hub.FILE), text, files.repo, files.private))
