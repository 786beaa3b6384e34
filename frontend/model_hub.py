"""Turns what a user calls a model (a folder, the name `demo`, a hub id) into a local Hugging Face folder."""

import logging
import os
import re
from pathlib import Path

from folovllm.common.errors import ModelError

logger = logging.getLogger(__name__)

DEMO = "demo"
_CONFIG = "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What an engine needs of a repository, which often holds the same weights in several formats.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_HUB_COPIES = ["original/*", "consolidated*"]


def resolve(model: str | os.PathLike[str]) -> Path:
    """The local folder of a model.

    Args:
        model: a local Hugging Face folder; or `demo`, a small model that is made on first use (see demo_model.py); or
            the id `organisation/name` of a repository on the Hugging Face hub, downloaded where the hub can be reached.
            An existing folder comes first, but one called `demo` only if it holds a model.

    Raises:
        TypeError: it is no text and no path.
        ModelError: it is none of the three, the folder lacks config.json, or the download fails.
    """
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model={model!r} must be a folder, {DEMO!r} or a hub id, as text or path")
    path = Path(model).expanduser()
    name = os.fspath(model)
    if path.is_dir() and (name != DEMO or (path / _CONFIG).is_file()):
        return _checked(path)
    if name == DEMO:
        from folovllm.frontend.demo_model import demo_model_dir

        return demo_model_dir()
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _checked(_download(name))
    raise ModelError(
        f"model {name!r} is not known: it is neither a local folder ({path.absolute()} is none), "
        f"nor the name {DEMO!r}, nor a hub id of the form 'organisation/name'"
    )


def _checked(folder: Path) -> Path:
    if (folder / _CONFIG).is_file():
        return folder
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    hint = ""
    if any(name.endswith(".gguf") for name in names):
        hint = "; GGUF files cannot be loaded, take the model's safetensors version"
    raise ModelError(
        f"{folder.absolute()} is not a Hugging Face model folder: {_CONFIG} is missing "
        f"(found: {found or 'nothing'}){hint}"
    )


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelError(
            f"model {repo_id!r} looks like a hub id, but huggingface_hub is not installed: "
            f"`pip install huggingface_hub`, or give a local folder, or use {DEMO!r}"
        ) from error
    logger.info("looking up %s on the Hugging Face hub", repo_id)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot get model {repo_id!r} from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}). "
            f"There is no local folder of that name either. Check the name and the network (and `hf auth login` for a "
            f"gated model), download it elsewhere and give its folder, or use {DEMO!r}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
