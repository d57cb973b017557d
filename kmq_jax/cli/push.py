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
    license: str = option("short name of the licence, such as cc-by-4.0: that of the network it was made from")
    source: str = option("what the model was made from and how, for the card")
    metrics: Path | None = option("JSON of `score`, for the card", None)
    card: Path | None = option("write the card here and push nothing", None, writes="file")
    private: bool = option("a new repository is private", False)


COMMAND = Command(
    "push",
    "Puts a packed model and a model card on the Hugging Face Hub, as one commit; `hf auth login` first. Whoever has\n"
    "kmq_jax then names it hf://ORG/NAME wherever a MODEL is asked for.",
    "kmq-jax push --model=runs/r34-4bit.kmq --repo=me/r34-4bit --license=cc-by-4.0 \\\n"
    '      --source="WeSpeaker ResNet34 on VoxCeleb2, 4 bits" --metrics=metrics.json',
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.core.files import atomic_write, read_object
    from kmq_jax.models import hub
    from kmq_jax.models.speaker_model import load_model

    if not files.model.is_file():
        raise UserError(f"`model` (={files.model}) must be a .kmq file")
    about = {"license": files.license, "source": files.source}
    metrics = read_object(files.metrics) if files.metrics else None
    text = hub.card(load_model(files.model), files.repo, about, metrics)
    if files.card:
        with atomic_write(files.card) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        print(hub.push(files.model, text, files.repo, files.private))
