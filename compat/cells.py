"""One cell of the matrix: a patch of a model type or of a trainer on what is installed, held to stock in every respect.

`python compat/cells.py OUT.jsonl [PART OF [few]]` runs all cells in this process, or those of each OF-th model type
from PART, and appends one JSON line for each; cells that the file already holds are not run again. With `few`, patches
of an architecture run together only.
"""

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import skip_lists
import trainers
from lock import changed_code
from verdicts import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Cell, Training, gradient_distance, lora

TOGETHER = "all together"
STEPS = 8


@contextlib.contextmanager
def counted_checkpoints() -> Iterator[list[int]]:
    """Counts calls of torch's checkpoint function, by whatever name upstream has imported it."""
    import torch.utils.checkpoint

    calls = [0]
    real = torch.utils.checkpoint.checkpoint

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return real(*args, **kwargs)

    places: list[Any] = [torch.utils.checkpoint]
    for name in ("transformers.modeling_utils", "transformers.modeling_layers"):
        module = import_module(name)
        places += [module] if getattr(module, "checkpoint", None) is real else []
    for place in places:
        place.checkpoint = counting
    try:
        yield calls
    finally:
        for place in places:
            place.checkpoint = real


def train(build: Callable[[], Any], selection: str, *, checkpointing: bool) -> Training:
    """Eight steps of Trainer with LoRA; `selection` comes in through the seam, as with SLOTH_PLUGINS."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    import sloth_plugins
    from sloth_plugins.activation import deactivate
    from sloth_plugins.application import patched_modules

    class Watch(TrainerCallback):  # type: ignore[misc]  # untyped upstream
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            named = given["model"].named_parameters()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            calls.append(count[0])
            count[0] = 0

    class Exact(Trainer):  # type: ignore[misc]  # untyped upstream
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    losses: list[float] = []
    gradients: list[dict[str, Any]] = []
    calls: list[int] = []
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 88, (13,), generator=generator).tolist() for _ in range(2 * STEPS)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    set_seed(1)
    model = lora(build())
    with tempfile.TemporaryDirectory() as folder, counted_checkpoints() as count:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            optim="sgd",
            learning_rate=0.02,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        if selection:
            sloth_plugins.activate(selection)
        try:
            Exact(model=model, args=arguments, train_dataset=data, callbacks=[Watch()]).train()
        finally:
            deactivate()
    return Training(losses, gradients, calls, sum(1 for _ in patched_modules(model)))


def compare_training(cell: Cell, found: Training, stock: Training, what: str, *, has_blocks: bool) -> None:
    """Same losses, gradients and checkpoint calls, step by step; fused blocks are those that need no checkpoint."""
    if not found.patched:
        cell.fail("application", f"no module was patched {what}")
        return
    worst = max((abs(a - b) / abs(b) for a, b in zip(found.losses, stock.losses, strict=True)), default=float("inf"))
    if len(found.losses) != STEPS or not worst <= LOSS_TOLERANCE:
        cell.fail("losses", f"{worst:.1e} from stock {what}")
    distances = [gradient_distance(a, b) for a, b in zip(found.gradients, stock.gradients, strict=True)]
    if len(distances) != STEPS or not max(distances) <= GRADIENT_TOLERANCE:
        cell.fail("gradients", f"{max(distances, default=float('inf')):.1e} from stock {what}")
    expected = [0] * STEPS if has_blocks else stock.checkpoint_calls
    if found.checkpoint_calls != expected:
        cell.fail("checkpoint calls", f"{found.checkpoint_calls}, expected {expected} {what}")


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_saving(cell: Cell, build: Callable[[], Any], selection: str) -> None:
    """A patched model saves byte for byte what a stock one saves, and loads as a stock model."""
    import sloth_plugins
    from sloth_plugins.application import patched_modules

    stock, model = build(), build()
    sloth_plugins.patch(model, selection)
    with tempfile.TemporaryDirectory() as folder:
        for each, name in ((stock, "stock"), (model, "patched")):
            each.save_pretrained(Path(folder) / name)
        if files_of(Path(folder) / "stock") != files_of(Path(folder) / "patched"):
            cell.fail("save and reload", "a patched model saves other files")
        loaded = type(stock).from_pretrained(Path(folder) / "patched")
        if [type(m) for m in loaded.modules()] != [type(m) for m in stock.modules()] or any(patched_modules(loaded)):
            cell.fail("save and reload", "what is loaded is not a stock model")
        state, expected = loaded.state_dict(), stock.state_dict()
        if state.keys() != expected.keys() or any(not tensor.equal(expected[key]) for key, tensor in state.items()):
            cell.fail("save and reload", "other weights after reloading")


def check_revert(cell: Cell, build: Callable[[], Any], selection: str) -> None:
    """Reverting leaves every object as it was before."""
    import sloth_plugins
    from sloth_plugins.testing import anatomy

    model = lora(build())
    before = anatomy(model)
    sloth_plugins.patch(model, selection)
    if anatomy(model) == before:
        cell.fail("application", "patching changed nothing")
    sloth_plugins.revert(model)
    after = anatomy(model)
    changed = [str(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        cell.fail("revert", f"{len(changed)} objects differ, {changed[0]} for one")


def cell_names(plugins: Any) -> list[tuple[str, str, str]]:
    """(architecture, model type, patch) of every cell; a trainer spec stands for both, and so does what is no patch."""
    found = []
    for name, spec in plugins.architectures.items():
        patches = [patch.name for patch in plugins.patches(name)]
        found += [(name, kind, patch) for kind in spec.model_types for patch in (*patches, TOGETHER)]
    found += [(name, name, patch.name) for name, spec in plugins.trainers.items() for patch in spec.patches]
    return [*found, (skip_lists.KIND, skip_lists.KIND, skip_lists.NAME)]


def few_of(names: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The cells in which patches of an architecture run alone left out."""
    alone = {architecture for architecture, _, patch in names if patch == TOGETHER}
    return [name for name in names if name[0] not in alone or name[2] == TOGETHER]


class Matrix:
    """The cells of the installed transformers; stock runs are made once for each model type."""

    def __init__(self) -> None:
        import torch

        from sloth_plugins.discovery import Plugins

        torch.set_num_threads(1)
        self.plugins = Plugins(load_entry_points=False)
        self._stock: dict[tuple[str, bool], Training] = {}

    def names(self) -> list[tuple[str, str, str]]:
        """(architecture, model type, patch) of every cell."""
        return cell_names(self.plugins)

    def stock(self, kind: str, build: Callable[[], Any], checkpointing: bool) -> Training:
        """The stock run that a model type is held to."""
        if (kind, checkpointing) not in self._stock:
            self._stock[kind, checkpointing] = train(build, "", checkpointing=checkpointing)
        return self._stock[kind, checkpointing]

    def run(self, architecture: str, kind: str, patch: str) -> Cell:
        """All checks of one cell; the first that cannot be made ends it, the others are all named."""
        # Modules stay; a trainer, which collects garbage whenever it begins, is not to look through them.
        gc.collect()
        gc.freeze()
        cell, start = Cell(kind, patch), time.monotonic()
        try:
            self._run(cell, architecture, kind, patch)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever upstream has become, the cell is red and says so
            cell.fail("exception", f"{type(error).__name__}: {error}")
        cell.seconds = round(time.monotonic() - start, 2)
        return cell

    def _run(self, cell: Cell, architecture: str, kind: str, name: str) -> None:
        from sloth_plugins.registry import Experimental
        from sloth_plugins.testing import tiny_model

        if architecture == skip_lists.KIND:
            skip_lists.run(cell)
            return
        if architecture in self.plugins.trainers:
            trainers.run(cell, self.plugins.trainers[architecture], name)
            return
        spec = self.plugins.architectures[architecture]

        def build() -> Any:
            return tiny_model(spec, kind)

        patches = self.plugins.patches(architecture)
        if name == TOGETHER:
            # By name, so that one that steps aside for code it does not know is an error here.
            apart = [Cell(kind, patch.name) for patch in patches]
            names = [c.patch for c, patch in zip(apart, patches, strict=True) if self._resolves(c, spec, kind, patch)]
        else:
            patch = next(patch for patch in patches if patch.name == name)
            if not self._resolves(cell, spec, kind, patch):
                return
            if isinstance(patch.status, Experimental):
                cell.state, cell.reason = "experimental", patch.status.note
            names = [name]
        selection = f"{architecture}:{'+'.join(names)}"
        for checkpointing in (False, True):
            what = "with checkpointing" if checkpointing else "without checkpointing"
            stock = self.stock(kind, build, checkpointing)
            found = train(build, selection, checkpointing=checkpointing)
            compare_training(cell, found, stock, what, has_blocks="blocks" in names)
        check_saving(cell, build, selection)
        check_revert(cell, build, selection)

    def _resolves(self, cell: Cell, spec: Any, kind: str, patch: Any) -> bool:
        """Requirements, target, signature and fingerprint; False if there is nothing to train."""
        from sloth_plugins.environment import probe
        from sloth_plugins.planning import unmet_condition
        from sloth_plugins.registry import Skip
        from sloth_plugins.resolving import bind
        from sloth_plugins.testing import tiny_config

        config = tiny_config(spec, kind).get_text_config()
        unmet = unmet_condition(patch, spec, config, probe())
        if cell.is_unsupported(unmet):
            return False
        if unmet is not None:
            cell.fail("config", str(unmet))
            return False
        bound = bind(patch)
        if isinstance(bound, Skip):
            cell.fail("signature" if "signature" in bound.reason else "target", bound.reason)
            return False
        diff = changed_code(patch)
        if diff is not None:
            cell.fail("fingerprint", bound.drift or "not in compat/upstream.lock")
            cell.diff = diff
        return True


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The cells that a file holds; a line that is just being written, or was cut off, does not count."""
    cells = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            cell = json.loads(line)
            cells[cell["model_type"], cell["patch"]] = cell
    return list(cells.values())


def part_of(names: list[tuple[str, str, str]], part: int, of: int) -> list[tuple[str, str, str]]:
    """The cells of each `of`-th model type from `part`, all of one together: they share its stock runs."""
    kinds = list(dict.fromkeys(kind for _, kind, _ in names))
    return [name for name in names if kinds.index(name[1]) % of == part]


def main(file: Path, part: int = 0, of: int = 1, *, few: bool = False) -> int:
    """Run the cells that are not in the file yet."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    matrix, done = Matrix(), {(cell["model_type"], cell["patch"]) for cell in read_cells(file)}
    if file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n"):
        with file.open("a", encoding="utf-8") as lines:
            lines.write("\n")  # after a line that was cut off
    parent = os.getppid()
    names = few_of(matrix.names()) if few else matrix.names()
    for architecture, kind, patch in part_of(names, part, of):
        if os.getppid() != parent:
            return 1  # whoever started this is gone, and may start another that writes to the same file
        if (kind, patch) not in done:
            cell = matrix.run(architecture, kind, patch)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(cell)) + "\n")
    gc.unfreeze()  # extension modules complain of what nobody frees at the end
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), few="few" in sys.argv[4:]))
