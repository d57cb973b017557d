"""Models that travel: a model card, and both pushed to the Hugging Face Hub (`core.hub` fetches)."""

from collections.abc import Mapping
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.core.hub import FILE, library, said
from kmq_jax.models import summary
from kmq_jax.models.speaker_model import SpeakerModel

CARD = "README.md"


def card(model: SpeakerModel, repo: str, about: Mapping[str, str], metrics: Json | None = None) -> str:
    """The model card: what the Hub shows of a model, with its front matter.

    Args:
        model: what is pushed.
        repo: `ORG/NAME`.
        about: `license`, a licence's short name; `source`, what the model was made from and how.
        metrics: as `score --json` writes them.

    >>> from kmq_jax.models import registry
    >>> import jax
    >>> variables = registry.initialize(registry.build("wespeaker_resnet34", width=4), jax.random.key(0))
    >>> tiny = SpeakerModel("wespeaker_resnet34", {"width": 4}, "wespeaker", variables)
    >>> print(card(tiny, "org/name", {"license": "mit", "source": "nowhere"}).splitlines()[1])
    license: mit
    """
    totals = summary.totals_of(model)
    lines = ["---", f"license: {about['license']}", "library_name: kmq_jax", "tags:"]
    lines += ["- speaker-verification", "- quantization", "---", "", f"# {repo}", ""]
    lines += [f"{model!r}, for speaker verification.", "", f"Source: {about['source']}", ""]
    lines += ["```python", "import kmq_jax", f'model = kmq_jax.load("hf://{repo}")']
    lines += ['embedding = model.embed("alice.wav")', "```", ""]
    facts = {name: value for name, value in totals.items() if isinstance(value, (int, float))}
    lines += ["| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in facts.items())]
    if metrics:
        shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        lines += ["", "By `kmq-jax score`:", "", "| | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in shown.items()]
    return "\n".join(lines) + "\n"


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
