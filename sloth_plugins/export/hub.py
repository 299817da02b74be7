"""Exports on the Hub, by huggingface_hub's own upload: what arrived before an interruption is not sent again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import SlothError
from .card import CARD, TAG, write_card
from .marking import LOCK, MARK
from .sources import model_folder


def push(folder: str | Path, repo: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Upload a folder to the model repository `repo` ("user/name"), which is made if need be; returns its address.

    Called again after an interruption it sends only what has not arrived. A card in the repository that is not ours
    stays. `token` defaults to that of `hf auth login` or HF_TOKEN; it goes nowhere but to the Hub. Raises SlothError
    where the Hub refuses or cannot be reached, and where `private` is asked for a repository that is public.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not folder.is_dir():
        raise SlothError(f"{folder} is no folder; export a model first, then push the folder")
    api = HfApi(token=token)
    address = _made_ready(repo, token, private)
    with _one_line(repo, token, "; run it again, and what has arrived is not sent again"):
        kept = [CARD] if (folder / CARD).is_file() and _is_somebody_elses(api, repo) else []
        with _bars():
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Upload by sloth-plugins",
                ignore_patterns=[*kept, MARK, ".cache/*", "*.partial", "*.partial/*", "*.part", LOCK],
            )
    return address


def push_to_hub_merged(
    source: Any,
    repo: str,
    tokenizer: Any = None,
    *,
    save_method: str = "merged_16bit",
    token: str | None = None,
    private: bool | None = None,
    datasets: str | Iterable[str] | None = None,
    **options: Any,
) -> str:
    """Ask the Hub for the repository, `merge` into a folder in the present one, `push` that and remove it.

    A second call after an interruption merges again, to the same bytes, and sends the files that have not arrived.
    `datasets` names the data in the card, where the run's folder does not. Returns the repository's address.
    """
    from .merging import merge

    with _folder(source) as folder:
        _made_ready(repo, token, private)
        merge(source, folder, tokenizer, method=save_method, datasets=datasets, **options)
        return push(folder, repo, token=token, private=private)


def push_to_hub_gguf(
    source: Any,
    repo: str,
    tokenizer: Any = None,
    quantization_method: str | Iterable[str] = "q8_0",
    *,
    token: str | None = None,
    private: bool | None = None,
    datasets: str | Iterable[str] | None = None,
    **options: Any,
) -> str:
    """The same with GGUF files, see `save_pretrained_gguf`."""
    from .gguf import export

    with _folder(source) as folder:
        _made_ready(repo, token, private)
        made = export(source, folder, tokenizer, quantization_method, **options)
        names = ", ".join(file.name for file in made.files)
        write_card(folder, source, f"GGUF for llama.cpp and Ollama: {names}", datasets=datasets, library="gguf")
        return push(folder, repo, token=token, private=private)


def _made_ready(repo: str, token: str | None, private: bool | None) -> str:
    """The address of the repository, which is made if need be, and which the token may write."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _one_line(repo, token):
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if "write" in signature(api.auth_check).parameters:  # older releases cannot ask
            api.auth_check(repo, write=True)
        public = bool(private) and not api.repo_info(repo).private
    if public:
        raise SlothError(f"{repo} exists and is public; make it private in its settings, or push without --private")
    return address


@contextmanager
def _folder(source: Any) -> Iterator[Path]:
    """A folder for what is made of `source`: here, and not in the system's temporary one, which may be memory."""
    if isinstance(source, str | Path):
        model_folder(Path(source))  # before anything is made on the Hub
    here = Path.cwd()
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".sloth-plugins-", dir=here)
    except OSError as error:
        raise SlothError(
            f"cannot write {here}: {error.strerror}; what is pushed is made there first: go to another folder"
        ) from None
    with temporary as folder:
        yield Path(folder) / "model"


def _is_somebody_elses(api: Any, repo: str) -> bool:
    from huggingface_hub import ModelCard

    if not api.file_exists(repo, CARD):
        return False
    return TAG not in (ModelCard.load(api.hf_hub_download(repo, CARD)).data.tags or [])


@contextmanager
def _one_line(repo: str, token: str | None, advice: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - refusals, timeouts, broken connections: each has a kind of its own
        # "Error while uploading" alone does not say why.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join((str(cause) or type(cause).__name__).split())
        reason = reason.replace(token, "***") if token else reason
        raise SlothError(f"the Hub did not take {repo}: {reason[:300]}{advice}") from None


@contextmanager
def _bars() -> Iterator[None]:
    """The Hub's own bars, on a terminal alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from ..terminal import err

    quiet = not err.is_terminal and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()
