"""``run.sh`` at its tiny shape on CPU, its list, and what becomes of checks that fail or take too long."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from accelerator import checks, run
from accelerator.checks import Check

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "accelerator" / "run.sh"
# What a machine with JAX for its accelerator may lack. The finder is the first that Python asks.
HIDDEN = (
    *("grain", "datasets", "ml_collections", "gguf", "tensorboardX", "rapidfuzz", "rouge_score", "orbax"),
    *("transformers", "tokenizers", "sentencepiece", "safetensors", "torch", "httpx2", "anyio", "wandb"),
)
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def launched(*arguments, **environment):
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_list_names_every_check():
    result = launched("--list")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [check.name for check in checks.CHECKS]
    assert "use some of float32," in launched("--only=speed").stderr


def test_modules_of_checks_import_only_what_they_need():
    modules = sorted({f"accelerator.{check.function.partition(':')[0]}" for check in checks.CHECKS})
    code = HIDE + "".join(f"import {name}\n" for name in modules)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def options(out, seconds=60.0):
    return Namespace(out=out, seconds=seconds, shape="tiny")


def test_a_failed_and_a_late_check_are_rows_of_the_table(tmp_path, monkeypatch, capsys):
    """The first one's function raises, the second sleeps; the third, which nothing decides, still runs."""
    broken, late, last = (
        Check("broken", "absent:nothing", 30, "", decides=True, is_torch=True),
        Check("late", "time:sleep", 3, "", is_torch=True),
        Check("last", "torch_peer:train", 60, "", is_torch=True),
    )
    script = tmp_path / "one_check.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from accelerator.report import Report\n"
        "report = Report(Path(sys.argv[3].partition('=')[2]))\n"
        "report.row('tokens', 1234.5, 'tokens/s', beside='a | b')\n"
        "report.within('difference', float('nan'), 0.1)\n"
        "if sys.argv[1] == 'broken': sys.exit('no such device')\n"
        "report.doing('sleep')\n"
        "if sys.argv[1] == 'late': time.sleep(60)\n"
        "report.end('left out', 'not here')\n"
    )
    monkeypatch.setattr(run, "CHILD", [sys.executable, str(script)])
    status = run.run_checks([broken, late, last], options(tmp_path / "out", seconds=65), "run.sh")
    printed, table = capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()
    assert status == 1
    assert "late: at most" in printed
    assert "**failed** | exit status 1; no such device |" in table
    assert "**timed out** | more than" in table and "it was at: " in table
    assert "**left out** | not here |" in table
    assert table.count("| tokens | 1,234 tokens/s | a / b |") >= 2  # the late one may not come so far
    assert "| difference | – | nan; at most 0.1: **failed** |" in table
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [check["status"] for check in figures["checks"]] == ["failed", "timed out", "left out"]
    assert {"command", "date", "git", "devices"} <= figures.keys()


@pytest.mark.slow
def test_the_script_runs_at_its_tiny_shape(tmp_path):
    """Training and sampling, from an environment without a core of its own; what is compiled comes from the cache."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    names = ["decoding", "sft", "several-devices"]
    result = launched("--shape=tiny", f"--only={','.join(names)}", f"--out={tmp_path}", XLA_FLAGS=flags)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["devices"]["count"] == 2
    assert figures["devices"]["versions"]["jax"]
    assert [check["status"] for check in figures["checks"]] == ["done"] * 3
    rows = {row["what"]: row for check in figures["checks"] for row in check["rows"]}
    assert rows["tiny, 2 × (8 + 8) tokens"]["number"] > 0
    assert rows["tiny, 4 × 32 tokens, 2 devices"]["number"] > 0
    assert rows["loss of two steps: difference from one device"]["passed"]
    assert (tmp_path / "table.md").read_text() in result.stdout
