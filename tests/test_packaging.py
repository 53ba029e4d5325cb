"""The package map, the two packages called tokenizers, and what `import cm3` costs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.discovery import PEP420PackageFinder

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("tokenizers", "training", "eval")


def run(code: str, cwd: Path = ROOT, path: str = "") -> str:
    """Run `code` in a fresh interpreter with `path` as PYTHONPATH and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def distribution() -> Distribution:
    from distutils.core import run_setup

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return run_setup("setup.py", stop_after="init")
    finally:
        os.chdir(before)


def test_every_folder_with_modules_is_in_the_package_map(distribution: Distribution):
    expected = {"cm3"} | {
        f"cm3.{package}"
        for package in PEP420PackageFinder.find(str(ROOT / "cm3"))
        if list((ROOT / "cm3" / package.replace(".", "/")).glob("*.py"))
    }
    for folder in MAPPED:
        expected |= {f"cm3.{folder}"} | {
            f"cm3.{folder}.{package}"
            for package in PEP420PackageFinder.find(str(ROOT / folder))
            if list((ROOT / folder / package.replace(".", "/")).glob("*.py"))
        }
    assert set(distribution.packages) == expected, "the map in setup.py and the folders differ"
    assert distribution.package_dir == {"cm3": "cm3"} | {f"cm3.{folder}": folder for folder in MAPPED}


def test_names_of_the_distribution(distribution: Distribution):
    assert distribution.get_name() == "open-cm3"
    assert distribution.entry_points == {"console_scripts": ["cm3 = cm3.cli:main"]}
    assert set(distribution.extras_require) >= {"flash", "retrieval", "eval", "serve", "interop", "dev"}


def test_every_dependency_is_pinned(distribution: Distribution):
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = [extra for name, extra in distribution.extras_require.items() if name != "flash"]  # GPU only
    needed = {
        re.split(r"[\[<>=;\s]", requirement)[0].lower().replace("_", "-")
        for requirement in [*distribution.install_requires, *sum(extras, [])]
    }
    assert needed <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_mapped_folders_have_no_init():
    assert not [folder for folder in MAPPED if list((ROOT / folder).rglob("__init__.py"))]


@pytest.mark.parametrize("path", ["", str(ROOT)], ids=["root", "pythonpath"])
def test_both_packages_called_tokenizers(path: str, tmp_path: Path):
    code = (
        "import tokenizers, cm3.tokenizers\n"
        "from importlib.util import find_spec\n"
        "print(tokenizers.Tokenizer.__module__, tokenizers.__file__)\n"
        "for name in ('cm3.tokenizers.vocabulary', 'cm3.training.engine', 'cm3.eval.task'):\n"
        "    print(find_spec(name).origin)"
    )
    hugging_face, *ours = run(code, cwd=tmp_path if path else ROOT, path=path).splitlines()
    assert hugging_face.startswith("tokenizers ") and str(ROOT / "tokenizers") not in hugging_face
    assert ours == [str(ROOT / name) for name in ("tokenizers/vocabulary.py", "training/engine.py", "eval/task.py")]


def test_import_brings_nothing_heavy():
    code = "import sys, cm3; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(code).split())
    heavy = {"torch", "numpy", "PIL", "datasets", "deepspeed", "transformers", "safetensors", "jsonargparse"}
    assert not loaded & heavy


def test_the_public_names_lead_to_their_homes():
    code = (
        "import cm3\n"
        "from cm3 import CM3, Document, Image, Text\n"
        "print(CM3.__module__, Document.__module__, Image.__module__, Text.__module__)\n"
        "assert set(cm3.__all__) <= set(dir(cm3))\n"
        "try: cm3.nothing\n"
        "except AttributeError as error: print(error)"
    )
    homes, error = run(code).splitlines()
    assert homes == "cm3.pipeline" + " cm3.tokenizers.segments" * 3
    assert error == "module 'cm3' has no attribute 'nothing'"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the sources, so that no build folder is left in the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("cm3", *MAPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        str(output),
    ]
    subprocess.run([sys.executable, "-m", "pip", *build, str(source)], check=True, timeout=300)
    [path] = output.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_has_one_top_level_name(wheel: list[str]):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"cm3"}


def test_the_wheel_holds_every_module_and_asset(wheel: list[str]):
    files = [path.relative_to(ROOT) for folder in ("cm3", *MAPPED) for path in (ROOT / folder).rglob("*.py")]
    files += [path.relative_to(ROOT) for path in (ROOT / "cm3/assets").rglob("*") if path.is_file()]
    files += [path.relative_to(ROOT) for path in (ROOT / "cm3/model").glob("*.cpp")]
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    expected = {name if name.startswith("cm3/") else f"cm3/{name}" for name in expected}
    assert expected | {"cm3/py.typed"} <= set(wheel)
