"""One process for each engine, all of them forked from one that has imported vLLM already: `python engines.py`.

It reads lines of JSON, [scenario, arguments, file of the result], and writes one for each as it ends.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
# What makes vLLM start in seconds on a small machine, whatever TRL passes to it.
QUICK = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    os.environ.update(QUICK)
    sys.path[:0] = [str(TESTS / "rollouts"), str(TESTS.parent / "compat"), str(TESTS)]
    warnings.simplefilter("ignore")
    import scenarios

    print("ready", flush=True)
    for line in sys.stdin:
        name, arguments, result = json.loads(line)
        child = os.fork()
        if child == 0:
            run(getattr(scenarios, name), arguments, Path(result))
        os.waitpid(child, 0)
        print("done", flush=True)
    # Finalising all that was imported takes seconds.
    os._exit(0)


def run(scenario, arguments, result) -> None:
    """In the child: write what the scenario returns, or how it failed, and end without finalising."""
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        text = json.dumps({"returned": scenario(result.parent, **arguments)})
    except BaseException:  # noqa: BLE001 - whatever it is, it is the parent's to show
        text = json.dumps({"raised": traceback.format_exc()})
    result.write_text(text)
    os._exit(0)


if __name__ == "__main__":
    main()
