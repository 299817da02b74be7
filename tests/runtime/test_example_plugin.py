"""OLMo 2 as a third party ships it: installed with pip, found, chosen, and patched in a launched script."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from launching import WARM, launch, python, warm
from paths import EXAMPLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def installed(folder, module, source):
    """A site folder that holds a plugin of one module, as pip would leave it."""
    site = folder / "site"
    info = site / f"{module}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sloth_plugins]\n{module} = {module}\n")
    (site / f"{module}.py").write_text(source)
    return site


def path(site):
    from launching import environment

    return {"PYTHONPATH": os.pathsep.join([str(site), environment()["PYTHONPATH"]])}


def test_a_launched_script_is_patched_and_trains_to_the_same_losses(site, tmp_path):
    arguments = ["--model-type", "olmo2"]
    stock, _ = launch("train_trainer.py", tmp_path, arguments=arguments, through=WARM)
    options = {"flag": "olmo2:rms_norm+rope+glu", "arguments": arguments, "through": WARM, **path(site)}
    patched, log = launch("train_trainer.py", tmp_path, **options)
    assert patched == pytest.approx(stock, rel=1e-5)
    assert re.search(r"olmo2:rms_norm +9 +applied", log)
    assert re.search(r"olmo2:rope +2 +applied", log)
    assert re.search(r"olmo2:glu +2 +applied", log)


def test_it_is_listed_with_its_plugin_and_a_typo_is_caught(site, tmp_path):
    listed = warm(
        ["-c", "import sys; sys.argv = ['x', 'list', '--json']; from sloth_plugins.cli import main; main()"],
        tmp_path,
        **path(site),
    )
    assert '"plugin": "olmo2"' in listed.stdout
    typo = python("import torch", tmp_path, flag="olmo:rope", **path(site))
    assert typo.returncode == 2
    assert "did you mean 'olmo2'" in typo.stderr


CONTRACT = """
import sys
sys.path[:0] = {folders!r}
import models
from sloth_plugins.discovery import Plugins
models.KNOWN = Plugins()
from sloth_plugins.verification import compare
import torch
for dtype in (torch.float32, torch.bfloat16):
    for selection in ("olmo2:rms_norm", "olmo2:rope", "olmo2:glu", "olmo2"):
        verdict = compare(lambda: models.build("olmo2", "olmo2").to(dtype), selection, tokens=33, seed=1)
        assert verdict.passed, (dtype, selection, verdict.rows[:3])
print("COMPARED", verdict.truth)
"""


def test_its_patches_keep_the_contract_of_accuracy(site, tmp_path):
    folders = [str(EXAMPLE.parent), str(EXAMPLE.parent / "contract")]
    done = warm(["-c", CONTRACT.format(folders=folders)], tmp_path, **path(site))
    assert "COMPARED float64" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nowhere", "cannot be imported: ModuleNotFoundError"),
        (
            "from sloth_plugins.registry import ArchitectureSpec, hookimpl\n"
            "@hookimpl\ndef sloth_architectures():\n"
            "    yield ArchitectureSpec(name='llama', model_types=('x',), patches=())",
            "declares architecture 'llama', which plugin 'llama' already declares",
        ),
    ],
)
def test_a_broken_plugin_is_one_line_and_training_goes_on(source, said, tmp_path):
    site = installed(tmp_path, "broken_plugin", source)
    losses, log = launch("train_loop.py", tmp_path, flag="1", through=WARM, **path(site))
    assert len(losses) == 6
    assert log.count(said) == 1
    assert "llama:rms_norm       5        applied" in log


BAD_TARGETS = """
from sloth_plugins.registry import Patch, hookimpl
LLAMA = "transformers.models.llama.modeling_llama"
FORWARDS = "sloth_plugins.patches.forwards"
def wrong(original):
    def forward(self, a, b): return original(self, a)
    return forward
def raises(original): raise RuntimeError("not here")
@hookimpl
def sloth_patches(architecture):
    if architecture.name == "llama":
        norm = f"{FORWARDS}.rms_norm:cast_before_weight"
        yield Patch(name="no_class", target=f"{LLAMA}:LlamaRMSNrom", replacement=norm)
        yield Patch(name="no_module", target="transformers.models.lama:Norm", replacement=f"{FORWARDS}.glu:gated")
        yield Patch(name="no_factory", target=f"{LLAMA}:LlamaMLP", replacement=f"{FORWARDS}.glu:gatd")
        yield Patch(name="signature", target=f"{LLAMA}:LlamaMLP", replacement="bad_targets:wrong")
        yield Patch(name="factory_raises", target=f"{LLAMA}:LlamaMLP", replacement="bad_targets:raises")
        yield Patch(name="no_within", target=f"{LLAMA}:apply_rotary_pos_emb", replacement=f"{FORWARDS}.rope:promote")
"""


def test_every_target_that_cannot_be_patched_is_a_reason_in_the_table(tmp_path):
    site = installed(tmp_path, "bad_targets", BAD_TARGETS)
    losses, log = launch("train_loop.py", tmp_path, flag="1", through=WARM, **path(site))
    assert len(losses) == 6
    expected = {
        "no_class": "did you mean 'LlamaRMSNorm'",
        "no_module": "cannot be imported (ModuleNotFoundError",
        "no_factory": "did you mean 'gated'",
        "signature": "does not fit the signature",
        "factory_raises": "raised RuntimeError: not here",
        "no_within": "`within` must name the class",
    }
    for patch, reason in expected.items():
        (line,) = [line for line in log.splitlines() if f"llama:{patch} " in line]
        assert " skipped " in line
        assert reason in line
    assert ["llama:glu", "2", "applied"] in [line.split() for line in log.splitlines()]
