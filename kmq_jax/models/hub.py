"""Models that travel: a model card, and both pushed to the Hugging Face Hub (`core.hub` fetches)."""

import dataclasses
import html
import re
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row
from kmq_jax.core.hub import FILE, library, said
from kmq_jax.models import summary
from kmq_jax.models.about import METRICS, NAMES, About, numbers, printable
from kmq_jax.models.speaker_model import SpeakerModel

CARD = "README.md"


def card(model: SpeakerModel, repo: str) -> str:
    """The model card: what the Hub shows of a model, with its front matter.

    Args:
        model: what is pushed; its `about` must tell `license`, a licence's short name, and `source`, what it was made
            from and how.
        repo: `ORG/NAME`.

    Raises:
        UserError: it tells no licence or no source, or the licence is not one word.

    >>> from kmq_jax.models import registry
    >>> import jax
    >>> variables = registry.initialize(registry.build("wespeaker_resnet34", width=4), jax.random.key(0))
    >>> tiny = SpeakerModel("wespeaker_resnet34", {"width": 4}, "wespeaker", variables)
    >>> tiny = dataclasses.replace(tiny, about={"license": "mit", "source": "nowhere"})
    >>> print(card(tiny, "org/name").splitlines()[1])
    license: mit
    """
    about = model.about
    for name in ("license", "source"):
        if not about.get(name):
            raise UserError(f"`{name}` must be given: the model does not tell it")
    # YAML and Markdown have syntax of their own: a text from elsewhere must not break out of its place.
    if not re.fullmatch(r"[\w.+-]+", about["license"]):
        raise UserError(f"`license` (={printable(about['license'])}) must be a short name such as cc-by-4.0")
    totals = summary.totals_of(model)
    lines = ["---", f"license: {about['license']}", "library_name: kmq_jax", "tags:"]
    lines += ["- speaker-verification", "- quantization", "---", "", f"# {repo}", ""]
    lines += [f"{model!r}, for speaker verification.", "", *_facts(about), ""]
    lines += ["```python", "import kmq_jax", f'model = kmq_jax.load("hf://{repo}")']
    lines += ['embedding = model.embed("alice.wav")', "```", ""]
    facts = {name: value for name, value in totals.items() if isinstance(value, (int, float))}
    lines += ["| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in facts.items())]
    if metrics := about.get(METRICS):
        lines += ["", "By `kmq-jax score`:", "", "| | |", "|---|---|"]
        lines += [f"| {_plain(name.replace('_', ' '))} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


def _facts(about: About) -> list[str]:
    """What a model tells of itself, as a list of Markdown."""
    names = ["source", *(name for name in NAMES if name not in ("source", "license"))]
    facts = {"source": "Source", **{name: NAMES[name][0].upper() + NAMES[name][1:] for name in names[1:]}}
    return [f"- {facts[name]}: {_plain(about[name])}" for name in names if name in about]


def _plain(text: str) -> str:
    """A text made safe for a line or a table's cell of Markdown: no HTML, no bar, no line break."""
    return html.escape(printable(text), quote=False).replace("|", "\\|")


def with_about(
    model: SpeakerModel, license: str | None = None, source: str | None = None, metrics: Row | None = None
) -> SpeakerModel:
    """The model with what it is to tell of itself; what is left out here stays as it was.

    Args:
        model: any.
        license: a licence's short name.
        source: what it was made from and how.
        metrics: as `score --json` writes them.
    """
    given = {"license": license, "source": source, METRICS: numbers(metrics) if metrics else None}
    about = {**model.about, **{name: value for name, value in given.items() if value}}
    return dataclasses.replace(model, about=about)


def push(file: Path, text: str, repo: str, private: bool = False) -> str:
    """Makes a repository of the Hub where it is missing, and puts the model and its card there.

    Args:
        file: the `.kmq` file.
        text: of the model card.
        repo: `ORG/NAME`.
        private: whether only its members see a new repository.

    Returns:
        Where to look at it.

    Raises:
        UserError: huggingface_hub is not installed, nobody is logged in, or the Hub refuses.
    """
    hub = library()
    api = hub.HfApi()
    operations = [
        hub.CommitOperationAdd(path_in_repo=FILE, path_or_fileobj=str(file)),
        hub.CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()),
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # One commit: nobody finds a model without its card.
        found = api.create_commit(repo, operations, commit_message="Model and card by kmq_jax")
    except Exception as error:  # of the library or of what it connects by
        raise UserError(f"hf://{repo}: {said(error)}") from error
    return str(found.commit_url)
