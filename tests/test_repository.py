"""Facts about the house itself: requirements, imports, docstrings, scripts."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "jaxrm").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests" / "accelerator" / "run.sh", ROOT / ".ci" / "run"]
READMES = [
    path
    for path in sorted(ROOT.rglob("README.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
]
# Names of locals that do not say what the thing is.
RIDDLES = {"found", "told", "asked", "kept", "held", "planned"}
# What a machine without them must still be able to import jaxrm's modules beside; each is slow to import as well.
LAZY = ("datasets", "grain", "transformers", "torch", "tensorflow", "sentencepiece", "gguf", "wandb")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(tree: ast.AST) -> set[str]:
    """Top-level packages that any import statement of `tree` names, at whatever depth it stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def requirement_lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


# --- requirements


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt", "tests/requirements-torch.txt"])
def test_every_requirement_has_a_lower_and_an_upper_bound(name):
    lines = requirement_lines(ROOT / name)
    assert lines
    for line in lines:
        assert "==" in line or (">=" in line and "<" in line), line


def test_no_requirement_is_named_twice():
    names = [re.split(r"[\[<>=! ;]", line)[0].lower() for line in requirement_lines(ROOT / "requirements.txt")]
    assert len(set(names)) == len(names)


def test_torch_and_tensorflow_are_not_required_at_run_time():
    text = "\n".join(requirement_lines(ROOT / "requirements.txt")).lower()
    assert not re.search(r"^(torch|tensorflow|clu)\b", text, re.MULTILINE)


def test_the_package_depends_on_what_requirements_txt_lists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert project["project"]["requires-python"] == ">=3.11"


# --- modules


def test_there_are_modules_to_check():
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_has_a_docstring_and_imports_no_torch(path):
    """Nor does it import tensorflow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    assert not imported_names(tree) & {"torch", "tensorflow"}


def test_no_module_unpickles_or_trusts_remote_code():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert not imported_names(tree) & {"pickle", "cloudpickle", "dill", "shelve", "joblib"}, relative(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, relative(path)


def test_no_module_is_called_utils_helpers_or_misc():
    for path in MODULES:
        assert not re.fullmatch(r"_?(utils?|helpers?|misc|common)", path.stem), relative(path)
        assert not re.fullmatch(r"_?(utils?|helpers?|misc|common)", path.parent.name), relative(path)


def loaded_after(code: str) -> set[str]:
    """Runs `code` in a fresh interpreter; the top-level packages that are loaded there afterwards."""
    code += "\nimport sys\nprint('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("loaded:")[2].split())


@pytest.mark.slow
def test_importing_any_module_loads_none_of_the_heavy_packages():
    # Command lines define flags as they are imported, so each has a process of its own; the others share one, and
    # get their own only to name the culprit.
    commands = [path for path in MODULES if "__main__" in path.read_text(encoding="utf-8")]
    names = [module_name(path) for path in MODULES if path not in commands]
    loaded = loaded_after("\n".join(f"import {name}" for name in names)) & set(LAZY)
    culprits = {name: found for name in names if loaded and (found := loaded_after(f"import {name}") & loaded)}
    assert not loaded, culprits
    for path in commands:
        assert not loaded_after(f"import {module_name(path)}") & set(LAZY), relative(path)


# --- names and prose


def stored_names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_locals_say_what_they_hold(path):
    """A name such as ``scores`` says more than ``found``."""
    names = stored_names(ast.parse(path.read_text(encoding="utf-8")))
    assert not {name for name in names if name in RIDDLES or name.startswith("of_")}


def test_readmes_wrap_and_link_to_files_that_exist():
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for line in prose.splitlines():
            assert len(line) <= 100 or line.startswith(("|", "![")), f"{relative(path)}: {line}"
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose):
            assert (path.parent / link).exists(), f"{relative(path)}: {link}"


def test_the_readme_is_at_most_120_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# --- configs


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_has_a_docstring_with_its_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{relative(path)} has no docstring"
    command = re.search(r"python -m jaxrm\.\w+ --config=(\S+)|\./launch/\w+\.sh", docstring)
    assert command, f"{relative(path)} does not say its command"
    if command[1]:
        assert command[1].partition(":")[0] == relative(path)


# --- tests


def test_test_names_have_at_most_60_characters():
    """What a name has no room for goes into the docstring of the test."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= 60, f"{relative(path)}: {node.name}"


# --- scripts and files


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_script_is_strict_and_says_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] in ("#!/usr/bin/env bash", "# shellcheck shell=bash")
    assert lines[1].startswith("# ")
    if lines[0].startswith("#!"):
        assert os.access(path, os.X_OK)
        assert "set -euo pipefail" in lines


def test_scripts_are_clean_by_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--external-sources", *map(str, SCRIPTS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def kept_files() -> list[Path]:
    """Files that git tracks or would add; without git, those of the folders that make up the repository."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    folders = ("jaxrm", "configs", "launch", "tests", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    return files + [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_no_file_names_somebodys_home_folder():
    home = re.compile(r"(?<![\w.$}])/(?:root|home/[a-z][\w-]*|Users/[A-Za-z][\w-]*)/")
    for path in kept_files():
        if path.suffix in {".py", ".sh", ".md", ".toml", ".txt", ".yaml", ".yml", ".ipynb", ".json", ""}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not (found := home.search(text)), f"{relative(path)}: {found and found[0]}"


def test_no_kept_file_is_large_and_no_weights_are_pickled():
    for path in kept_files():
        assert path.stat().st_size < 1_000_000, relative(path)
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".pickle"}, relative(path)
