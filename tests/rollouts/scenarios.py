"""What is done with an engine, each in a process of its own; what was found is returned, and judged by the tests."""

import contextlib
import functools
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from types import SimpleNamespace

import peft
import safetensors.torch
import torch
import trainers
import transformers
from accelerate import Accelerator
from launching import free_port
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from vllm import SamplingParams, _custom_ops
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry

import sloth_plugins
from sloth_plugins.patches.kernels import notices
from sloth_plugins.patches.rollouts import adapter, engine, swap
from sloth_plugins.patches.rollouts.files import AdapterFolder
from sloth_plugins.patches.rollouts.rescue import RolloutError
from sloth_plugins.statistics.history import PHASES

# Compiling takes longer than all that is done here.
vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True)
# vLLM looks at a class of models in a process that imports all of it anew.
registry._run_in_subprocess = lambda look: look()
PATTERNS = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}}


def plain_layout():
    """On CPUs vLLM packs weights for oneDNN, out of reach of everybody, TRL's sync too; on GPUs it does not."""
    _custom_ops._supports_onednn = False
    torch.cpu._is_amx_tile_supported = lambda: False


def network(folder, **config):
    transformers.set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"vocab_size": trainers.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = {"model_type": "llama", "initializer_range": 0.2, **sizes, **heads, **tokens, **config}
    kind = made.pop("model_type")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **made))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                param.normal_(std=0.1).add_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(folder)
    trainers.tokenizer().save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder, config=(), **lora):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return peft.get_peft_model(network(folder, **dict(config)), peft.LoraConfig(**options))


def rollouts(model, **options):
    given = {"mode": "colocate", "max_model_length": 320, "gpu_memory_utilization": 0.3, "temperature": 0.0}
    given |= {"max_completion_length": 12, "max_num_seqs": 16, "logprobs": 0, **options}
    return VLLMGeneration(model, Accelerator(cpu=True), trainers.tokenizer(), **given)


def prompts():
    generator = torch.Generator().manual_seed(5)
    # The last one is of several blocks of the cache of keys and values.
    return [torch.randint(3, trainers.VOCABULARY, (size,), generator=generator).tolist() for size in (3, 9, 17, 200)]


def stir(model, seed):
    """Other weights of the adapter, as a step makes them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.normal_(std=0.15, generator=generator)


@torch.no_grad()
def distance(model, outputs):
    """How far log-probabilities of greedy completions are from those of the model, and whether it chooses the same."""
    worst, same = 0.0, True
    prompt_ids, completion_ids, logprobs, _ = outputs
    for prompt, completion, found in zip(prompt_ids, completion_ids, logprobs, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1)
        same &= expected.argmax(-1).tolist() == list(completion)
        chosen = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
        worst = max(worst, float((chosen - torch.tensor(found)[:, 0]).abs().max()))
    return [worst, same]


def copies(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def changed(model, before, *, base=True):
    return [n for n, p in model.named_parameters() if ("lora_" not in n) == base and not torch.equal(p, before[n])]


def tick(what, since=time.perf_counter()):  # noqa: B008 - since the process of all engines has imported this
    print(f"{time.perf_counter() - since:8.2f} s {what}", flush=True)


def said():
    return sorted(line for line in notices._said if line.startswith("rollouts"))


def swaps(folder):
    """An engine through several adapters, traps, a refusal and a revert."""
    plain_layout()
    sloth_plugins.activate("trl")
    model = adapted(folder / "model", **PATTERNS).eval()
    with torch.no_grad():
        # What is trained need not be what is on disk.
        model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight.mul_(1.5)
    tick("model")
    rolling = rollouts(model)
    tick("engine")
    before, found = copies(model), {"steps": [], "seconds": []}
    for step in range(3):
        stir(model, step)
        started = time.perf_counter()
        rolling.sync_weights()
        found["seconds"].append(time.perf_counter() - started)
        held = copies(model)
        found["steps"].append(distance(model, rolling.generate(prompts(), None, 1)))
        found.setdefault("aliased", []).extend(changed(model, held, base=False))
    tick("swaps")
    found["registered"] = sorted(rolling.llm.llm_engine.list_loras())
    stir(model, 7)
    found["without sync"] = distance(model, rolling.generate(prompts(), None, 1))
    found["base"] = changed(model, before)
    found["dtype"] = str(rolling.llm.llm_engine.model_config.dtype)
    found["traps"] = traps(folder, model, rolling.llm)
    tick("traps")
    # An adapter that vLLM refuses: TRL's sync, which merges.
    collect = swap.collect
    swap.collect = lambda model: adapter.Adapter(
        {**collect(model).tensors, f"{adapter.PREFIX}model.gone.lora_A.weight": torch.zeros(4, 4)}, 6
    )
    rolling.sync_weights()
    found["refused"] = distance(model, rolling.generate(prompts(), None, 1))
    swap.collect = collect
    del rolling._sloth_refused
    stir(model, 8)
    rolling.sync_weights()
    # The base in vLLM holds what was merged into it, and gets what is trained again.
    found["after a refusal"] = distance(model, rolling.generate(prompts(), None, 1))
    sloth_plugins.revert(model)
    found["stock again"] = type(rolling) is VLLMGeneration
    found["reverted"] = distance(model, rolling.generate(prompts(), None, 1))
    stir(model, 9)
    rolling.sync_weights()
    found["reverted and synced"] = distance(model, rolling.generate(prompts(), None, 1))
    found["said"] = said()
    tick("revert")
    return found


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 32, "vocab_size": trainers.VOCABULARY + 3},
    "phi3": {"pad_token_id": 0},
}


def sharing(folder, family):
    """One base for a model and an engine: edits on either side, a swap, saving, and who loads weights."""
    plain_layout()
    sloth_plugins.activate("trl,trl:vllm_shared_weights")
    model = adapted(folder / "model", tuple({"model_type": family, **FAMILIES[family]}.items())).eval()
    before = copies(model)
    rolling = rollouts(model)
    theirs = rolling.llm.apply_model(engine.itself)[0]
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in theirs.parameters()]
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    inside = [any(start <= p.data_ptr() and p.data_ptr() + p.nbytes <= end for start, end in spans) for p in base]
    found = {"inside": sum(inside), "of": len(inside), "changed": changed(model, before)}
    stir(model, 1)
    rolling.sync_weights()
    found["shared"] = distance(model, rolling.generate(prompts()[:3], None, 1))
    held = rolling.generate(prompts()[:3], None, 1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("model.norm.weight", "1.mlp.down_proj.base_layer.weight")):
                param.mul_(-1.5)
    found["edit here"] = distance(model, rolling.generate(prompts()[:3], None, 1))
    found["edit is seen"] = distance(model, held)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            # One that is there by itself, one of the fused ones.
            if name.endswith(("model.norm.weight", "0.self_attn.qkv_proj.base_layer.weight")):
                param.mul_(0.7)
    found["edit there"] = distance(model, rolling.generate(prompts()[:3], None, 1))
    model.get_base_model().save_pretrained(folder / "saved")
    held = copies(model)
    sloth_plugins.revert(model)
    stir(model, 2)
    rolling.sync_weights()
    found["loaded"] = distance(model, rolling.generate(prompts()[:3], None, 1))
    found["moved"] = max(float((p - held[n]).abs().max()) for n, p in model.named_parameters() if "lora_" not in n)
    found["inside then"] = sum(any(start <= p.data_ptr() < end for start, end in spans) for p in base)
    found["said"] = said()
    return found


def start_server(folder, port):
    """vLLM's own server, in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    os.setpgid(0, 0)
    try:
        options = ["--model", str(folder), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
        options += ["--enable-lora", "--max-lora-rank", "8", "--logprobs-mode", "processed_logprobs", "--enforce-eager"]
        sys.argv = ["api_server", *options, "--max-model-len", "64"]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
    except BaseException:  # noqa: BLE001 - it is shown with the log
        traceback.print_exc()
    os._exit(1)


def served(folder):
    """GRPO against a server, which dies before the last step."""
    plain_layout()
    network(folder / "model")
    port = free_port()
    server = start_server(folder / "model", port)
    found = {}
    # That much in the middle of training, before it is given up.
    vllm_client.Retry = lambda **options: 0

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            client = trainer.vllm_generation.vllm_client
            names = [model["id"] for model in client._get(f"{client.base_url}/v1/models")["data"]]
            found.setdefault("served", []).append(names)
            found["files"] = [path.name for path in client._folder.path.iterdir()]
            if state.global_step == 2:
                trainer.vllm_generation.temperature = 0.0
                trainer.vllm_generation.sync_weights()
                outputs = trainer.vllm_generation.generate([ids[:40] for ids in prompts()], None, 1)
                found["greedy"] = distance(trainer.model, outputs)
                os.killpg(server, signal.SIGKILL)

    tick("before")
    try:
        sloth_plugins.activate("trl")
        address = {"vllm_server_base_url": f"http://127.0.0.1:{port}", "vllm_server_timeout": 240}
        # The same weights, in a folder that the server does not read meanwhile.
        trainer = grpo_trainer(folder, "trained", max_steps=3, vllm_mode="server", **address)
        tick("server")
        trainer.add_callback(Watch())
        before = copies(trainer.model)
        try:
            trainer.train()
        except RolloutError as error:
            found["error"] = str(error)
        tick("trained")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)
    found["differences"] = logged(trainer, "sampling/sampling_logp_difference/max")
    found["base"] = changed(trainer.model, before)
    state = folder / "out" / "checkpoint-2"
    found["saved"] = sorted(path.name for path in state.iterdir())
    held = safetensors.torch.load_file(state / "adapter_model.safetensors")
    trained = peft.get_peft_model_state_dict(trainer.model)
    place = trainer.vllm_generation.vllm_client._folder.path
    found["files"].append(place.is_dir())
    del trainer.vllm_generation.vllm_client._folder
    found["left"] = place.exists()
    found["same"] = held.keys() == trained.keys() and all(torch.equal(held[name], trained[name]) for name in held)
    return found


def traps(folder, model, llm):
    """What goes wrong where an id or a name is used twice, by vLLM's own interface."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)

    def outputs(request):
        made = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts()], sampling, use_tqdm=False, lora_request=request
        )
        logprobs, _ = vllm_generation.extract_logprobs(made)
        return [o.prompt_token_ids for o in made], [list(o.outputs[0].token_ids) for o in made], logprobs, None

    place, found = folder / "trap", {}
    for trap, options in (("same id", {}), ("same name", {"load_inplace": True})):
        identity = 100 + len(found)
        for step in range(2):
            stir(model, 20 + step)
            shutil.rmtree(place, ignore_errors=True)
            # PEFT's own files would say more of the ranks than vLLM's loader understands.
            AdapterFolder.write(SimpleNamespace(path=folder), "trap", adapter.collect(model))
            request = LoRARequest(f"trap-{identity}", identity, str(place), **options)
            llm.llm_engine.add_lora(request)
            found[f"{trap} {step}"] = distance(model, outputs(request))
        llm.llm_engine.remove_lora(identity)
    return found


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def grpo_trainer(folder, model="model", **options):
    given = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12}
    given |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64, "learning_rate": 0.02, **options}
    given |= {"use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    return GRPOTrainer(
        model=adapted(folder / model),
        args=GRPOConfig(output_dir=str(folder / "out"), gradient_checkpointing=False, disable_tqdm=True, **given),
        reward_funcs=trainers.reward,
        train_dataset=trainers.rows(trainers.RECIPES["GRPOTrainer"].row),
        processing_class=trainers.tokenizer(),
    )


def grpo(folder, selection, layout="plain", **options):
    """Two steps of GRPO, as a script has it."""
    if layout == "plain":
        plain_layout()
    if selection:
        sloth_plugins.activate(selection)
    trainer = grpo_trainer(folder, **options)
    before = copies(trainer.model)
    trainer.train()
    return {
        "differences": logged(trainer, "sampling/sampling_logp_difference/max"),
        "base": changed(trainer.model, before),
        "adapter": len(changed(trainer.model, before, base=False)),
        "dtype": str(trainer.vllm_generation.llm.llm_engine.model_config.dtype),
        "seconds": [
            {name: row[f"{name}_seconds"] for name in (*PHASES, "step") if f"{name}_seconds" in row}
            for row in trainer.state.log_history
            if "loss" in row
        ],
        "own": sorted({"sync_weights"} & vars(trainer.vllm_generation).keys()),
        "said": said(),
    }


def lonely(folder):
    """GRPO by two processes, of which the second dies in the second step."""
    plain_layout()
    port = free_port()
    other = os.fork()
    rank = 0 if other else 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        sloth_plugins.activate("trl")
        trainer = grpo_trainer(folder, f"model-{rank}", max_steps=3)

        def reward(completions, **given):
            if rank == 1 and trainer.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return trainers.reward(completions)

        trainer.reward_funcs = [reward]
        trainer.train()
    except Exception as error:  # noqa: BLE001 - whatever a process says whose other one is gone
        found = {
            "error": type(error).__name__,
            "saved": sorted(p.name for p in (folder / "out" / "checkpoint-1").iterdir()),
        }
    finally:
        if rank == 1:
            os._exit(1)
    os.waitpid(other, 0)
    return found
