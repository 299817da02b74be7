"""One GGUF file from a model's tensors, one tensor in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sloth_plugins.registry import ArchitectureSpec, GgufFormat

from ..chat import turn_end
from ..progress import progress
from ..weights import Weights
from .metadata import architecture_of, describe_model, differences, neutral_name
from .methods import WRITTEN, file_type
from .rope import Rope, describe_rope
from .tensors import byte_shape, encode, gguf_names, prepare, require_range, type_of
from .tokens import Tokens, read_tokens

if TYPE_CHECKING:
    import gguf

EMBEDDING = "token_embd.weight"


@dataclass(slots=True)
class Source:
    """All that a file is made of, read and checked before anything is written."""

    weights: Weights
    spec: ArchitectureSpec
    form: GgufFormat
    rope: Rope
    tokens: Tokens
    tokenizer: Any
    names: dict[str, str]
    """GGUF's names by the checkpoint's."""
    name: str
    notes: list[str]

    def plan(self, method: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and GGML type by GGUF's name, in the order of the file."""
        shapes = self.weights.shapes()
        sizes = {to: shapes[name] for name, to in self.names.items()}
        matrices = {to: (shape, type_of(to, shape, WRITTEN[method])) for to, shape in sizes.items()}
        return {name: ((len(values),), "F32") for name, values in self.rope.tensors.items()} | matrices

    def bytes(self, method: str) -> int:
        """The size of the tensors."""
        return sum(math.prod(byte_shape(shape, kind)) for shape, kind in self.plan(method).values())


def read_source(weights: Weights, tokenizer: Any, name: str, pre_tokenizer: str | None = None) -> Source:
    """Describe a model for llama.cpp. Raises SlothError for whatever it could not run as transformers does."""
    config = weights.config
    spec, form = architecture_of(config)
    shapes = weights.shapes()
    names = gguf_names(shapes, form, config.num_hidden_layers)
    rows = next((shapes[name][0] for name, to in names.items() if to == EMBEDDING), config.vocab_size)
    rope = describe_rope(config)
    tokens = read_tokens(tokenizer, rows, config, pre_tokenizer)
    notes = [*differences(config, form), *rope.notes, *tokens.notes]
    name = neutral_name(name) if tokens.name is None else f"{tokens.name} {neutral_name(name)}"
    return Source(weights, spec, form, rope, tokens, tokenizer, names, name, notes)


def write(source: Source, path: Path, method: str) -> None:
    """Write a file of one of the methods in `WRITTEN`.

    Raises OSError where the disk is full or not writable, and SlothError for values that its types cannot hold.
    """
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, source.form.architecture)
    try:
        _add_metadata(writer, source, method)
        plan = source.plan(method)
        for name, (shape, kind) in plan.items():
            stored = byte_shape(shape, kind)
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), math.prod(stored), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in source.rope.tensors.values():
            writer.write_tensor_data(numpy.array(values, dtype=numpy.float32))
        with progress(f"writing {method}", source.bytes(method)) as advance:
            for name, to in source.names.items():
                tensor = prepare(name, source.weights.read(name), source.spec, source.form, source.weights.config)
                require_range(name, tensor, plan[to][1])
                data = encode(tensor, plan[to][1])
                del tensor
                writer.write_tensor_data(data)
                advance(data.nbytes)
        writer.flush()
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, source: Source, method: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(file_type(method))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in describe_model(source.weights.config, source.form, source.rope).items():
        _add(writer, f"{source.form.architecture}.{key}", value)
    _add_tokens(writer, source)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokens(writer: gguf.GGUFWriter, source: Source) -> None:
    tokens, vocabulary = source.tokens, source.tokens.vocabulary
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([text or "" for text in vocabulary.texts])
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is None:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for name, token in tokens.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    end = turn_end(source.tokenizer)
    if end is not None and end != tokens.special.get("eos"):
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(tokens.add_eos)
    template = getattr(source.tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
