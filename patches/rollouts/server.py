"""A client of a vLLM server that serves an adapter: the server reads it from files, and is told so over HTTP.

There is no group of processes for weights, so that trainer and server need no common network of GPUs. Completions are
asked of the adapter's name, which is a new one each time.
"""

import functools
import uuid
from typing import Any

from .adapter import Adapter
from .engine import AdapterRefused
from .files import AdapterFolder

RUNTIME = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


@functools.cache
def serving(kind: Any) -> Any:
    """The class of clients `kind` (`VLLMClient`), whose server serves the adapters that it is told of."""

    class ServingClient(kind):  # type: ignore[misc]  # known at run time only
        _folder: AdapterFolder | None = None
        _given = 0
        _served = ""
        _base = ""
        _device: Any = None

        def init_communicator(self, device: Any = 0) -> None:
            # What only a transfer of all weights needs is made when there is one.
            self._device, self._base = device, self.model

        def take(self, adapter: Adapter) -> None:
            """Serve an adapter from now on. Raises `AdapterRefused`, and then serves the one before."""
            if self._folder is None:
                self._folder = AdapterFolder()
                # Another trainer of this server, or this one in another life, may have counted before.
                self._prefix = f"policy-{uuid.uuid4().hex[:8]}"
            self._given += 1
            name = f"{self._prefix}-{self._given}"
            try:
                place = self._folder.write(name, adapter)
            except OSError as error:
                raise AdapterRefused(f"its files cannot be written: {error}") from error
            answer = self._tell("load_lora_adapter", lora_name=name, lora_path=str(place))
            if answer.status_code != 200:
                self._folder.remove(name)
                # A server that takes none does not know the address.
                hint = f"; start it with {RUNTIME} and --enable-lora" if answer.status_code == 404 else ""
                raise AdapterRefused(f"{self.base_url} answers {answer.status_code}: {answer.text:.300}{hint}")
            before, self._served = self._served, name
            self.model = name
            if before:
                self._tell("unload_lora_adapter", lora_name=before)
                self._folder.remove(before)

        def update_named_params(self, *args: Any, **kwargs: Any) -> Any:
            # All weights are sent after all, as TRL does it once the patch is reverted, or an adapter was refused.
            if self.communicator is None:
                super().init_communicator(self._device)
            self.model = self._base
            return super().update_named_params(*args, **kwargs)

        def _tell(self, what: str, **said: str) -> Any:
            return self.session.post(f"{self.base_url}/v1/{what}", json=said)

    return ServingClient
