"""An Ollama Modelfile: the chat template in Go, where its tokens end an answer, sampling as the model asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..beside import beside
from ..chat_template import Around, Unexpressible
from ..errors import SlothError
from .chat import ChatFormat, read_format, turn_end, unlike_ollama
from .checkpoint import line
from .sources import ADAPTER, base_folder, model_folder

MODELFILE = "Modelfile"
# Ollama's names of generation_config's; num_ctx is left to Ollama, which fits it to the memory there is.
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
QUOTES = '"""'


def write_modelfile(
    path: Path, model: Path, tokenizer: Any, add_bos: bool, generation: Mapping[str, Any] | None = None
) -> list[str]:
    """Write a Modelfile for the GGUF file `model`, which lies beside it; returns a line for all that is not the same.

    `add_bos` says that llama.cpp puts BOS before the text, so that the template must not. A chat template that Go
    cannot express gives a Modelfile without TEMPLATE, and a line that says so.
    """
    text, notes = modelfile(model.name, tokenizer, add_bos, generation or {})
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return notes


def modelfile(model: str, tokenizer: Any, add_bos: bool, generation: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The Modelfile's text and its notes."""
    try:
        chat = read_format(tokenizer)
        template = f"TEMPLATE {_quoted(go_template(chat, _bos(tokenizer) if add_bos else ''))}"
        system = [f"SYSTEM {_quoted(chat.default_system)}"] if chat.default_system else []
        lines, notes = [f"FROM ./{model}", template, *system], unlike_ollama(tokenizer, chat)
    except Unexpressible as reason:
        lines, notes = [f"FROM ./{model}", f"# No TEMPLATE: {reason}."], [f"no TEMPLATE in the Modelfile: {reason}"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops(tokenizer)]
    for key, name in PARAMETERS.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n", notes


def stops(tokenizer: Any) -> list[str]:
    """The tokens at which an answer ends: the one that the chat template writes there, and EOS."""
    ids = dict.fromkeys(id for id in (turn_end(tokenizer), tokenizer.eos_token_id) if id is not None)
    return [str(text) for text in tokenizer.convert_ids_to_tokens(list(ids))]


def go_template(chat: ChatFormat, bos: str = "") -> str:
    """The format as a Go template over Ollama's `.Messages` (`.Role`, `.Content`) and `.System`, without leading `bos`.

    `.System` holds the system messages, which are among `.Messages` too, before the others.
    """
    system = "" if chat.system is None else _message(chat.system, "$.System")
    before = ""
    top, roles = "", ""
    if chat.system is None:
        pass
    elif chat.system_in == "first":
        before = f"{{{{ if and $.System (le $i 1) }}}}{system}{{{{ end }}}}"
    elif chat.system_in == "last":
        before = f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{system}{{{{ end }}}}"
    elif chat.always_system:
        top = system
    else:
        roles = f'{{{{ else if eq .Role "system" }}}}{_message(chat.system, ".Content")}'
    user = _literal(chat.user.before) + before + "{{ .Content }}" + _literal(chat.user.after)
    index = "$i, $_ := " if before else ""
    return (
        _literal(chat.start.removeprefix(bos))
        + top
        + f'{{{{ range {index}.Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        + f'{{{{ else if eq .Role "assistant" }}}}{_message(chat.assistant, ".Content")}'
        + roles
        + "{{ end }}{{ end }}"
        + _literal(chat.generation)
    )


def generation_of(source: Any, base: str | Path | None = None) -> dict[str, Any]:
    """What the model's generation_config asks for; nothing where it has none. Raises SlothError where it is damaged."""
    if not isinstance(source, str | Path):
        config = getattr(source, "generation_config", None)
        return {} if config is None else dict(config.to_diff_dict())
    folder = model_folder(Path(source))
    if (folder / ADAPTER).is_file():
        folder = base_folder(folder) if base is None else model_folder(Path(base))
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlothError(f"{file} cannot be read: {line(error)}; mend it, or remove it") from None
    if not isinstance(values, dict):
        raise SlothError(f"{file} cannot be read: it is no object; mend it, or remove it")
    return values


def _message(around: Around, content: str) -> str:
    return f"{_literal(around.before)}{{{{ {content} }}}}{_literal(around.after)}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if QUOTES in text or text.endswith('"'):
        raise Unexpressible("the chat template has quotes that a Modelfile cannot hold")
    return f"{QUOTES}{text}{QUOTES}"


def _bos(tokenizer: Any) -> str:
    return str(tokenizer.bos_token or "")
