"""The wheel holds one top-level package, and all of it; every piece of configuration says the same version."""

import subprocess
import sys
import tomllib
import zipfile

import pytest
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def installed_name(folder):
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "sloth_plugins" else ("sloth_plugins", *parts))


def test_the_package_map_names_every_package_on_disk():
    folders = [
        init.parent for top in ("sloth_plugins", "registry", "patches") for init in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(installed_name, folders))


def test_no_module_lies_outside_a_package():
    for top in ("sloth_plugins", "registry", "patches"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_the_version_is_said_once():
    from sloth_plugins import __version__

    assert PROJECT["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_minimum_versions_are_those_of_the_project():
    from sloth_plugins.planning import MINIMUM

    assert set(MINIMUM) <= set(PROJECT["project"]["dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split() if tracked.returncode == 0 else []
    if not names:
        pytest.skip("a wheel is built from the files that git knows; this is no git checkout")
    for name in names:
        if name.split("/")[0] in ("sloth_plugins", "registry", "patches", "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command = [*pip, "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_all_of_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sloth_plugins"}
    expected = {
        f"{installed_name(file.parent).replace('.', '/')}/{file.name}"
        for top in ("sloth_plugins", "registry", "patches")
        for file in (ROOT / top).rglob("*.py")
    }
    assert expected | {"sloth_plugins/py.typed", "sloth_plugins/compatibility.json"} == {
        name for name in names if name.startswith("sloth_plugins/")
    }


@pytest.mark.slow
def test_the_wheel_patches_a_training_script(wheel, tmp_path):
    from launching import environment
    from paths import SCRIPTS

    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    env = environment("1")
    env["PYTHONPATH"] = f"{target}:{env['PYTHONPATH']}"
    code = f"import sloth_plugins; print(sloth_plugins.__file__); import runpy; runpy.run_path({str(SCRIPTS / 'train_loop.py')!r}, run_name='__main__')"  # noqa: E501 - one program
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(target) in done.stdout
    assert "llama:rms_norm       5        applied" in done.stderr
