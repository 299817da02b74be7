"""What every function here does with a dataset: each split on its own, streaming or not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from ..errors import SlothError


def each_split(dataset: Any, work: Callable[[Any], Any]) -> Any:
    """`work` of a dataset, or of every split of a DatasetDict. Raises SlothError for anything else."""
    if isinstance(dataset, dict) and dataset and all(hasattr(split, "map") for split in dataset.values()):
        return type(dataset)({name: work(split) for name, split in dataset.items()})
    if not hasattr(dataset, "map"):
        raise SlothError(
            f"a datasets.Dataset or IterableDataset is needed, not {type(dataset).__name__}; "
            "datasets.Dataset.from_list(rows) makes one of a list of dicts"
        )
    return work(dataset)


def is_streaming(dataset: Any) -> bool:
    """Whether rows come one after another, so that none can be asked for by its number."""
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def column_names(dataset: Any) -> list[str]:
    """The columns; a streaming dataset that does not know them shows its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def first_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """At most `count` rows from the beginning."""
    return list(islice(dataset, count))
