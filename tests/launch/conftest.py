"""A machine for the scripts of launch/: a copy of them, and stand-ins for the tools that they call."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Nothing but these and the stand-ins is on PATH, so that no tool of this machine answers.
SYSTEM = (
    *("bash", "env", "sh", "cat", "cut", "date", "dirname", "git", "grep", "gzip", "head", "ln", "ls", "mkdir", "mv"),
    *("rm", "sed", "setsid", "sleep", "sort", "tail", "tar", "touch", "tr", "id"),
)
# A call is noted in bash, since Python's start would take most of the tests' time: the tool, the folder, how many
# arguments, these, and variables as NAME=value, each followed by a zero byte.
NOTE = r"""
note=("${0##*/}" "$PWD" "$#" "$@")
for variable in "${!JAX_@}" "${!SRUN_@}"; do note+=("$variable=${!variable}"); done
printf '%s\0' "${note[@]}" "" >>"$RECORD"
"""
# What a Python does that is not asked to run jaxrm or an installer; -S and -E for a quick start.
PYTHON = f'case ${{1:-}} in -c | *.py) exec {sys._base_executable} -S -E "$@" ;; esac\n'


class Machine:
    """A folder with scripts, stand-ins and a record of their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.root = folder, folder / "bin", folder / "a repository"
        self.record = folder / "record"
        self.bin.mkdir()
        self.root.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for name in SYSTEM:
            if (path := shutil.which(name)) is not None:
                (self.bin / name).symlink_to(path)
        self.stand_in("python3.12", before=PYTHON)
        self.stand_in("uv")
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "RECORD": str(self.record),
            "JAXRM_VENV": str(self.virtual_environment(folder / "venv")),
        }

    def stand_in(self, name: str, answer: str = "", before: str = "", folder: Path | None = None) -> Path:
        """A command that notes how it was called and goes on with the lines of bash in `answer`."""
        path = (folder or self.bin) / name
        path.write_text(f"#!{self.bin}/bash\n{before}{NOTE}{answer}\n")
        path.chmod(0o755)
        return path

    def virtual_environment(self, folder: Path, training: str = "") -> Path:
        """An environment whose Python notes what it should run; `training` is what jaxrm.train does, in bash."""
        (folder / "bin").mkdir(parents=True)
        (folder / "pyvenv.cfg").touch()
        answer = f'if [ "$2" = jaxrm.train ]; then\n:\n{training}\nfi'
        self.stand_in("python", answer, before=PYTHON, folder=folder / "bin")
        return folder

    def run(self, script: str, *arguments: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run launch/`script`; checks its exit status."""
        result = subprocess.run(
            [self.root / "launch" / script, *arguments],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == status, result.stdout + result.stderr
        return result

    def notes(self, tool: str) -> list[dict[str, Any]]:
        """How `tool` was called so far: arguments, folder, variables."""
        words = iter(self.record.read_bytes().decode().split("\0")[:-1] if self.record.exists() else [])
        notes = []
        for name in words:
            folder, count = next(words), int(next(words))
            arguments = [next(words) for _ in range(count)]
            variables = dict(word.split("=", 1) for word in iter(lambda: next(words), ""))
            notes.append({"tool": name, "folder": folder, "arguments": arguments, "variables": variables})
        return [note for note in notes if note["tool"] == tool]

    def calls(self, tool: str) -> list[list[str]]:
        """The arguments of every call of `tool`."""
        return [note["arguments"] for note in self.notes(tool)]

    def words(self, line: str) -> list[str]:
        """What bash makes of a line that a dry run printed."""
        command = [self.bin / "bash", "-c", f"for word in {line}; do printf '%s\\0' \"$word\"; done"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]

    def commit(self) -> None:
        """Put the copy under git, which tpu_pod.sh packs."""
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
        for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message=all")):
            subprocess.run(["git", *identity, *words], cwd=self.root, env=self.environment, check=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with Python and uv and nothing else."""
    return Machine(tmp_path)


# gcloud with a folder of files for a cloud: NAME/0 and so on are the homes of the workers, and commands sent to them
# run there. states-1 has the states, one a line, that the first queued resource goes through; states-2 the second.
GCLOUD = r"""
cloud=$HOME/cloud
number=$(cat "$cloud/number" 2>/dev/null) || number=0
option() { local word; for word in "${@:2}"; do case $word in "--$1="*) echo "${word#*=}" ;; esac; done; }
homes() { if [ "$(option worker "$@")" = all ]; then echo 0 1; else option worker "$@"; fi; }
case "$3 $4" in
  "queued-resources create")
    echo $((number + 1)) >"$cloud/number"
    if [ -n "$(option node-id "$@")" ]; then nodes=$(option node-id "$@"); else nodes="$5-0 $5-1"; fi
    for node in $nodes; do
      for worker in 0 1; do
        mkdir -p "$cloud/$node/$worker"
        cp -r "$HOME/venv" "$cloud/$node/$worker/.venv-jaxrm"
      done
    done
    ;;
  "queued-resources delete")
    for pid in "$cloud"/*/*/jaxrm-run/pid; do
      [ ! -e "$pid" ] || kill -KILL "$(cat "$pid")" 2>/dev/null
    done
    rm -rf "$cloud"/*/
    ;;
  "queued-resources describe")
    ls -d "$cloud"/*/ >/dev/null 2>&1 || { echo "ERROR: NOT_FOUND: no such queued resource" >&2; exit 1; }
    states=$cloud/states-$number
    head -n 1 "$states"
    [ "$(grep -c . "$states")" = 1 ] || sed -i 1d "$states"
    ;;
  "tpu-vm scp")
    node=${6%%:*}
    for worker in $(homes "$@"); do cp "$5" "$cloud/$node/$worker/${6#*:}" || exit 1; done
    ;;
  "tpu-vm ssh")
    echo "SSH: Attempting to connect to worker..."
    for worker in $(homes "$@"); do
      cd "$cloud/$5/$worker" || exit 1
      HOME=$PWD NODE=$5 WORKER=$worker CREATED=$number bash -c "$(option command "$@")" &
      workers+=("$!")
    done
    for worker in "${workers[@]}"; do wait "$worker" || failed=1; done
    exit "${failed:-0}"
    ;;
esac
"""
# The metadata server of a TPU VM: two workers, in one slice or in two.
CURL = r"""
for last; do :; done
case $last in
  */attributes/agent-worker-number) echo "$WORKER" ;;
  */attributes/worker-network-endpoints) echo "unknown:unknown:10.0.${NODE##*-}.1,unknown:unknown:10.0.${NODE##*-}.2" ;;
  */attributes/tpu-env)
    echo "ACCELERATOR_TYPE: 'v6e-8'"
    case $NODE in
      *-[0-9])
        echo "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8081'"
        echo "MEGASCALE_NUM_SLICES: '2'"
        echo "MEGASCALE_SLICE_ID: '${NODE##*-}'"
        ;;
    esac
    ;;
esac
"""


class Cloud(Machine):
    """A machine with gcloud, and the TPU VMs behind it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cloud = folder / "cloud"
        self.cloud.mkdir()
        self.commit()
        for name in ("cp", "mountpoint"):
            (self.bin / name).symlink_to(shutil.which(name) or "/bin/false")
        self.stand_in("gcloud", GCLOUD)
        self.stand_in("curl", CURL)

    def trains(self, training: str) -> None:
        """What jaxrm.train does on every worker, in bash; $CREATED is how often the TPUs were created."""
        shutil.rmtree(self.folder / "venv")
        self.virtual_environment(self.folder / "venv", training)

    def states(self, *lives: str) -> None:
        """The states of the first queued resource, of the second, ..."""
        for number, states in enumerate(lives, start=1):
            (self.cloud / f"states-{number}").write_text("\n".join(states.split()) + "\n")

    def tpu_calls(self, part: str) -> list[list[str]]:
        """The calls of gcloud that have `part` among their words."""
        return [call for call in self.calls("gcloud") if part in call]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A machine with gcloud; what still runs on the workers is killed at the end."""
    cloud = Cloud(tmp_path)
    yield cloud
    for file in cloud.cloud.glob("*/*/jaxrm-run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
