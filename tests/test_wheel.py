"""The wheel: what travels in it, and a run outside a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import jaxrm

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("jaxrm", "configs", "setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def run(*command, cwd=None, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, since a build writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir=dist",
        ".",
    )
    run(*build, cwd=folder)
    (file,) = (folder / "dist").iterdir()
    return file


@pytest.mark.slow
def test_the_wheel_has_all_of_jaxrm_and_the_configs(wheel):
    """Python files, what draws the pages, and ``configs/`` as ``jaxrm/configs/``; the version is that of jaxrm."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (ROOT / "jaxrm").rglob("*") if path.suffix in {".py", ".html", ".css", ".js", ".txt"}]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert {f"jaxrm/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= names
    assert not [name for name in names if not name.startswith("jaxrm")]
    assert wheel.name == f"jaxrm-{jaxrm.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_an_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    """The environment sees the packages of this one, and jaxrm from the wheel alone."""
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty.mkdir()
    train = (python, "-m", "jaxrm.train", "--config=sft_tiny", "--config.num_steps=2", "--config.run_dir=run")
    output = run(*train, "--config.data.max_records=100", "--config.evaluation.samples=1", cwd=empty)
    assert (empty / "run" / "checkpoints" / "2").is_dir(), output
    assert [path.name for path in empty.iterdir()] == ["run"]
