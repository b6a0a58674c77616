"""The notebook: it runs from top to bottom, and what is saved in it is what its cells say.

Outputs are made anew, at the notebook's own size, by running this file: .venv/bin/python tests/launch/test_colab.py
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
AGAIN = "make the outputs anew: .venv/bin/python tests/launch/test_colab.py"
PROGRESS = re.compile(r"(\w[\w -]*?) [\d,]+(/[\d,]+)? (steps|prompts|records|pairs|responses)\b")


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def source_hash(notebook):
    sources = "\n\n".join(cell.source for cell in code_cells(notebook).values())
    return hashlib.sha256(sources.encode()).hexdigest()


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def displayed(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def execute(folder):
    """The notebook with the outputs of a run in `folder`, which stands for the checkout: all is written there."""
    for name in ("jaxrm", "configs", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "launch").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook).values():
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder / "launch")}}
    options = {"timeout": 3600, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    return NotebookClient(notebook, resources=resources, **options).execute()


# --- a run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The cells by name after a small run on one CPU device."""
    folder, home = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXRM_NOTEBOOK_SIZE", "0.04")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        patch.setenv("PIP_NO_INDEX", "1")  # all is there; pip must not change the environment of the tests
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(home / name.lower()))
        return code_cells(execute(folder))


@pytest.mark.slow
def test_the_commands_run_to_their_end(ran):
    assert [cell.execution_count for cell in ran.values()] == list(range(1, len(ran) + 1))
    assert "jaxrm is ready" in printed(ran["install"])
    assert "CpuDevice" in printed(ran["devices"])
    assert "ppo_seq2seq: done" in printed(ran["train"])


@pytest.mark.slow
def test_token_rewards_are_shown_in_color(ran):
    for name in ("token-rewards", "scalar-rewards"):
        (page,) = displayed(ran[name], "text/html")
        colors = re.findall(r"background: rgba\([\d, ]+, (0\.[1-9]\d|0\.0[1-9])\)[^>]*title=", page)
        assert len(colors) >= (12 if name == "token-rewards" else 2), page


@pytest.mark.slow
def test_every_response_has_a_correction(ran):
    assert len(re.findall(r"^correction  ", printed(ran["corrections"]), re.MULTILINE)) == 3


@pytest.mark.slow
def test_the_loop_of_ones_own_trains(ran):
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)$", printed(ran["loop"]), re.MULTILINE)]
    assert len(losses) == 10 and losses[-1] < losses[0]


@pytest.mark.slow
def test_the_closing_table_has_both_arms(ran):
    table = printed(ran["train"]).partition("Policies on")[2]
    assert re.search(r"^SFT .*\n^ppo_scalar \(scalar\) .*\n^ppo_seq2seq \(literal\) ", table, re.MULTILINE), table


@pytest.mark.slow
def test_curves_are_drawn(ran):
    (image,) = displayed(ran["curves"], "image/png")
    assert len(image) > 10_000


@pytest.mark.slow
def test_every_policy_answers(ran):
    answers = printed(ran["ask"])
    assert re.findall(r"^(\w+): ", answers, re.MULTILINE) == ["sft", "ppo_scalar", "ppo_seq2seq"], answers


# --- the first cell elsewhere


@pytest.fixture
def install(tmp_path):
    """Runs the first cell in an empty folder, with an address filled in."""

    def run(address):
        source = code_cells(nbformat.read(NOTEBOOK, as_version=4))["install"].source
        script = tmp_path / "install.py"
        script.write_text(source.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}"))
        folder = tmp_path / "empty"
        folder.mkdir()
        command = [sys.executable, str(script)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)

    return run


def test_without_a_checkout_an_address_is_asked_for(install):
    result = install("")
    assert result.returncode and "paste the address" in result.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_address_of_the_notebook_is_enough(install, tmp_path):
    origin = tmp_path / "origin"
    (origin / "configs").mkdir(parents=True)
    (origin / "configs" / "quickstart.py").touch()
    (origin / "requirements.txt").touch()
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b.example commit -m all"):
        subprocess.run(["git", *command.split()], cwd=origin, capture_output=True, check=True)
    result = install(f"{origin.as_uri()}/blob/main/launch/colab.ipynb")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "empty" / "jaxrm" / "configs" / "quickstart.py").is_file()
    assert result.stdout.endswith("jaxrm is ready\n")


# --- what is saved


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_saved_outputs_are_those_of_the_saved_cells(saved):
    nbformat.validate(saved)
    assert saved.metadata.get("executed") == source_hash(saved), f"a code cell of {NOTEBOOK.name} has changed; {AGAIN}"


def test_the_saved_outputs_are_complete(saved):
    cells = code_cells(saved).values()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    for cell in cells:
        assert cell.outputs, f"{cell.id} has no output; {AGAIN}"
        assert all(output.output_type != "error" for output in cell.outputs), f"{cell.id} raised; {AGAIN}"


def test_the_saved_outputs_are_small_and_clean(saved):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert "\\u001b" not in text and "\x1b" not in text, f"escape sequences of a terminal; {AGAIN}"
    for cell in code_cells(saved).values():
        texts = [printed(cell), *displayed(cell, "text/html"), *displayed(cell, "text/plain")]
        for found in re.finditer(r"(?<![\w.:/<])/[A-Za-z][\w.-]*/[\w./-]*|file://\S*|[A-Z]:\\\S*", "\n".join(texts)):
            pytest.fail(f"{cell.id} names a place of the machine that ran it, {found[0]}; {AGAIN}")


# --- making the outputs


def without_progress(text):
    """Of the lines that stand for a progress bar, the last one of each phase."""
    lines, kept = text.splitlines(keepends=True), []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        now, then = PROGRESS.match(line), PROGRESS.match(following)
        if not (now and then and now[1] == then[1]):
            kept.append(line)
    return "".join(kept)


def main():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder).resolve())
    for cell in code_cells(notebook).values():
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = without_progress(output.text)
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.executed = source_hash(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
