"""A run's model as a checkpoint that stock transformers loads: base and adapter in one, shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from ..errors import SlothError, check_known
from . import writing
from .card import CARD, card_of
from .checkpoint import INDEX, SINGLE
from .formats import FourBit, Rounded, dtype_of
from .progress import progress
from .sources import ADAPTER, model_folder, tokenizer_folder
from .tokenizers import require_same_rows, require_tokenizer, save_tokenizer
from .weights import open_weights

if TYPE_CHECKING:
    from .changes import Merged

METHODS = ("merged_16bit", "merged_4bit", "lora")
SHARD = 2_000_000_000
GENERATION = "generation_config.json"


def merge(
    source: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype | None = None,
    method: str = "merged_16bit",
    base: str | Path | None = None,
    force: bool = False,
    datasets: str | Iterable[str] | None = None,
    shard_bytes: int = SHARD,
) -> Path:
    """Write the model of `source` (a folder or a live model, see `open_weights`) into the folder `out`.

    `method` is "merged_16bit": weights dequantised, plus adapters in fp32, rounded once to `dtype` (the base's own
    where it has 16 bits, else bfloat16; "float32" rounds nothing); "merged_4bit": the same with linear layers
    quantised as the base was, or to NF4, as bitsandbytes stores it; "lora": the adapter alone. Without `tokenizer` (an
    object or a folder) its files are copied from the run or from the base. `datasets` names the data in the model card,
    where the run's own does not. A shard takes `shard_bytes` of memory.

    Nothing is under the name `out` before all is written. An interrupted run of folders goes on where it stopped. An
    earlier export is replaced only with `force`. Raises SlothError for what the user must act on.
    """
    out = Path(out)
    check_known("save_method", method, METHODS)
    require_tokenizer(tokenizer)
    folders = [model_folder(Path(source))] if isinstance(source, str | Path) else []
    given = [Path(tokenizer)] if isinstance(tokenizer, str | Path) else []
    if method == "lora":
        if dtype is not None or base is not None:
            raise SlothError("the method lora saves the adapter as it is; leave out dtype and base")
        writing.check_target(out, [*folders, *given], force=force)
        return _save_adapter(source, folders, out, tokenizer, datasets)
    weights = open_weights(source, base)
    folders += [weights.base.folder] if weights.base.folder is not None else []
    writing.check_target(out, [*folders, *given], force=force)
    dtype = dtype_of(dtype, weights.config)
    form = FourBit(weights.base, weights.config, dtype) if method == "merged_4bit" else Rounded(dtype)
    layout = layout_of(weights, form, shard_bytes)
    place = tokenizer_folder(source, base) if folders and isinstance(source, str | Path) else weights.base.folder
    if tokenizer is None:
        require_same_rows(place, weights.base.folder, weights)
    card = card_of(source, method.replace("_", ", "), datasets=datasets)
    inputs = inputs_of(folders, layout, method, dtype) if isinstance(source, str | Path) else None
    with writing.Staged(out, inputs).open() as folder:
        files = write_shards(weights, form, layout, folder)
        write_index(files, folder)
        write_config(weights, form, dtype, folder)
        save_tokenizer(tokenizer, place, folder)
        card.save(folder / CARD)
    return out


def save_pretrained_merged(
    model: Any, save_directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
) -> Path:
    """`merge` by the names that fine-tuning scripts know: a model, a folder, its tokenizer and the method."""
    return merge(model, save_directory, tokenizer, method=save_method, **options)


def layout_of(weights: Merged, form: Rounded, shard_bytes: int) -> dict[str, list[str]]:
    """File names with the tensors that each holds."""
    from huggingface_hub import split_torch_state_dict_into_shards

    whole = {name: form.like(name, shape) for name, shape in weights.shapes().items()}
    split = split_torch_state_dict_into_shards(
        whole, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    return dict(split.filename_to_tensors)


def inputs_of(
    folders: list[Path], layout: Mapping[str, list[str]], method: str, dtype: torch.dtype
) -> dict[str, object]:
    """What a shard is made of. Another run of the same writes the same bytes."""
    files = sorted(path for folder in folders for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))
    read = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"read": read, "layout": dict(layout), "method": method, "dtype": str(dtype), "version": __version__}


def write_shards(
    weights: Merged, form: Rounded, layout: Mapping[str, list[str]], folder: Path, text: str = "merging"
) -> dict[str, Path]:
    """Each stored tensor's name with its file. Shards that an earlier run completed are kept."""
    shapes = weights.shapes()
    sizes = {name: _bytes(form.like(name, shape)) for name, shape in shapes.items()}
    missing = [file for file, names in layout.items() if not writing.holds(folder / file, names)]
    writing.check_space(folder, sum(sizes[name] for file in missing for name in layout[file]))
    with progress(text, sum(sizes.values())) as advance:
        for file, names in layout.items():
            if file not in missing:
                advance(sum(sizes[name] for name in names))
                continue
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                shard |= form.stored(name, weights.read(name))
                advance(sizes[name])
            writing.save_shard(folder / file, shard)
    return {name: folder / file for file in layout for name in writing.names_in(folder / file)}


def write_index(files: Mapping[str, Path], folder: Path) -> None:
    """Where several shards hold the tensors, the file that says which has which."""
    shards = set(files.values())
    if shards == {folder / SINGLE}:
        return
    total = sum(writing.tensor_bytes(path) for path in shards)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: path.name for name, path in sorted(files.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(weights: Merged, form: Rounded, dtype: torch.dtype, folder: Path) -> None:
    """config.json, with the form's quantisation, and the base's generation_config.json."""
    config = weights.config
    config.dtype = dtype
    if form.quantization is not None:
        config.quantization_config = form.quantization
    config.save_pretrained(folder)
    base = weights.base
    if base.generation_config is not None:
        # Not save_pretrained, which refuses what a model was loaded with.
        base.generation_config.to_json_file(folder / GENERATION)
    elif base.folder is not None and (base.folder / GENERATION).is_file():
        shutil.copyfile(base.folder / GENERATION, folder / GENERATION)


def _save_adapter(
    source: Any, folders: list[Path], out: Path, tokenizer: Any, datasets: str | Iterable[str] | None
) -> Path:
    adapter = next((folder for folder in folders if (folder / ADAPTER).is_file()), None)
    if (folders and adapter is None) or (not folders and not getattr(source, "peft_config", None)):
        raise SlothError(f"{folders[0] if folders else type(source).__name__} has no adapter to save")
    card = card_of(source, "lora", datasets=datasets, library="peft")
    with writing.Staged(out, None).open() as folder:
        if adapter is None:
            source.save_pretrained(folder)
        else:
            for path in adapter.glob("adapter_*"):
                shutil.copyfile(path, folder / path.name)
        save_tokenizer(tokenizer, tokenizer_folder(adapter) if adapter is not None else None, folder)
        card.save(folder / CARD)
    return out


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
