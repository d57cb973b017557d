"""Files of the Hugging Face Hub by `hf://ORG/NAME`, through huggingface_hub, which is an extra."""

import re
from pathlib import Path
from types import ModuleType

from kmq_jax.core.errors import UserError

FILE = "model.kmq"
"""What a repository's model is called, unless another file is named."""

# Repository, revision, file. `Path` makes one slash of two, so that one is enough.
_PLACE = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./-]+\.kmq))?")


def is_place(text: str) -> bool:
    """Whether a MODEL is meant to be fetched.

    >>> is_place("hf://org/name"), is_place("runs/hf")
    (True, False)
    """
    return text.startswith("hf:/")


def fetch(text: str) -> Path:
    """Fetches one `.kmq` file of a repository, unless it was fetched before.

    Args:
        text: `hf://ORG/NAME`, with `@REVISION` or `/FILE.kmq` or both behind it.

    Returns:
        The file in the library's cache.

    Raises:
        UserError: the place has another form, huggingface_hub is not installed, or there is no such file.
    """
    found = _PLACE.fullmatch(text)
    if not found:
        raise UserError(f"{text} must be hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FILE.kmq")
    repo, revision, file = found.groups()
    try:
        return Path(library().hf_hub_download(repo, file or FILE, revision=revision))
    except UserError:
        raise
    except Exception as error:  # of the library, or of what it connects by
        raise UserError(f"hf://{repo}: {said(error)}") from error


def library() -> ModuleType:
    """Imports huggingface_hub.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError('hf:// needs huggingface_hub: pip install "kmq_jax[hub]"') from error
    return huggingface_hub


def said(error: Exception) -> str:
    """An error's text as one line, or the name of its class where it has no text.

    >>> said(OSError("no such   file")), said(OSError())
    ('no such file', 'OSError')
    """
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
