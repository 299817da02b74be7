"""`sloth-plugins verify`: one batch through a model, stock and patched, against the same model in higher precision."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sloth_plugins.registry import Report

from .errors import SlothError, nearest
from .inspection import language_model_class, load_config
from .patching import examine, revert
from .report import columns, text
from .selection import Selection, parse

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FACTOR = 4.0
"""A patched result may be this many times as far from the truth as torch's own."""

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One compared quantity: relative errors of stock and patched, and the limit for the latter."""

    name: str
    stock: float
    patched: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the patched error is within its limit; NaN is not."""
        return self.patched <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """All rows of one model, worst first, and the report of what was patched."""

    rows: tuple[Row, ...]
    report: Report
    truth: str

    @property
    def passed(self) -> bool:
        """Whether something was patched and every row is within its limit."""
        return bool(self.report.applied) and all(row.ok for row in self.rows)


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def load_model(model: str, dtype: str, seed: int) -> Any:
    """The model with its weights, or with random ones where the folder holds only a config."""
    if dtype != "auto" and dtype not in DTYPES:
        raise SlothError(
            f"--dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}{nearest(dtype, ['auto', *DTYPES])}"
        )
    config = load_config(model)
    auto = language_model_class(config)
    if auto is None:
        raise SlothError(f"--model {model!r}: transformers has no language model of model type {config.model_type!r}")
    path = Path(model).expanduser()
    folder = path if path.is_dir() else path.parent
    torch.manual_seed(seed)
    try:
        if path.exists() and not _has_weights(folder):
            built = auto.from_config(config)
            built = built.to(DTYPES.get(dtype, built.dtype))
        else:
            wanted: Any = DTYPES.get(dtype, "auto")
            built = auto.from_pretrained(model if not path.is_file() else folder, dtype=wanted)
    except Exception as error:  # noqa: BLE001 - damaged files, no language model, no room: the reason is passed on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SlothError(f"--model {model!r} cannot be loaded as a language model: {reason}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return built if getattr(built, "hf_device_map", None) else built.to(device)


def _step(model: Any, batch: torch.Tensor) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    gradients = {
        name: parameter.grad.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def _distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _error(gradients: Gradients, name: str, truth: torch.Tensor) -> float:
    """Relative distance of one gradient from the truth; infinite where it is missing."""
    return _distance(gradients[name], truth) if name in gradients else float("inf")


def _room_for(model: Any, dtype: torch.dtype) -> bool:
    """Whether the model fits a second time, with gradients, in `dtype`."""
    import psutil

    needed = 2 * sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return bool(needed < 0.8 * free)


def _truth(model: Any, batch: torch.Tensor, dtype: torch.dtype) -> tuple[str, float, Gradients] | None:
    wider = [wide for wide in (torch.float64, torch.float32) if wide.itemsize > dtype.itemsize]
    wide = next((wide for wide in wider if _room_for(model, wide)), None)
    if wide is None or getattr(model, "is_quantized", False):
        return None
    loss, gradients = _step(model.to(wide), batch)
    return str(wide).removeprefix("torch."), loss, gradients


def _text(model: Any, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random tokens [batch, sequence], none of which stands for a picture or a sound that is not there."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    named = {name: value for name, value in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))}
    media = [value for name, value in named.items() if name[:3] not in ("bos", "eos", "pad") and isinstance(value, int)]
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(media)))
    return allowed[torch.randint(0, len(allowed), shape, generator=generator)]


def compare(build: Callable[[], Any], selection: str | Selection, *, tokens: int, seed: int) -> Verdict:
    """Compare a model that `build` makes; it is used up. Dropout is off. Raises `SlothError` if nothing is selected."""
    selection = parse(selection, "selection") if isinstance(selection, str) else selection
    if selection.is_off:
        raise SlothError(f"{selection.source}={selection.text!r} selects nothing, so there is nothing to verify")
    model = build().eval()
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    dtype, device = parameter.dtype, parameter.device
    generator = torch.Generator().manual_seed(seed)
    batch = _text(model, (2, tokens), generator).to(device)
    stock_loss, stock = _step(model, batch)
    report = examine(model, selection)
    patched_loss, patched = _step(model, batch)
    revert(model)
    epsilon = torch.finfo(dtype).eps
    truth = _truth(model, batch, dtype)
    if truth is None:
        # Without a truth, two roundings of the same result are compared: twice the allowance.
        rows = [Row("loss", 0.0, abs(patched_loss - stock_loss) / abs(stock_loss), 2 * FACTOR * epsilon)]
        rows += [Row(name, 0.0, _error(patched, name, stock[name]), 2 * FACTOR * epsilon) for name in stock]
        return Verdict(_worst_first(rows), report, "stock itself")
    name, loss, gradients = truth
    errors = (abs(stock_loss - loss) / abs(loss), abs(patched_loss - loss) / abs(loss))
    # A loss is a mean over tokens in fp32: its error is a fraction of its inputs' rounding.
    floor = max(epsilon / 16, 2 * torch.finfo(torch.float32).eps)
    rows = [Row("loss", *errors, FACTOR * max(errors[0], floor))]
    for key, exact in gradients.items():
        stock_error, patched_error = _error(stock, key, exact), _error(patched, key, exact)
        rows.append(Row(key, stock_error, patched_error, FACTOR * max(stock_error, epsilon)))
    return Verdict(_worst_first(rows), report, name)


def _worst_first(rows: list[Row]) -> tuple[Row, ...]:
    return (rows[0], *sorted(rows[1:], key=lambda row: row.patched / row.limit, reverse=True))


def verify_model(model: str, selection: Selection, *, dtype: str = "auto", tokens: int = 128, seed: int = 0) -> Verdict:
    """Load a model and compare it. Raises `SlothError` for a model that cannot be loaded."""
    return compare(lambda: load_model(model, dtype, seed), selection, tokens=tokens, seed=seed)


def print_verdict(verdict: Verdict, out: "Console", most: int = 8) -> None:
    """Print what was patched, the worst rows and the verdict."""
    out.print(text(verdict.report), markup=False)
    table = [("relative error against " + verdict.truth, "stock", "patched", "allowed", "")]
    table += [
        (row.name, f"{row.stock:.1e}", f"{row.patched:.1e}", f"{row.limit:.1e}", "ok" if row.ok else "WRONG")
        for row in verdict.rows[:most]
    ]
    out.print("\n".join(columns(table)), markup=False)
    wrong = sum(not row.ok for row in verdict.rows)
    if not verdict.report.applied:
        out.print("nothing was patched, so there is nothing to verify", markup=False)
    else:
        checked = f"{len(verdict.rows) - 1} gradients and the loss compared"
        out.print(f"{checked}: {f'{wrong} WRONG' if wrong else 'all within their limits'}", markup=False)
