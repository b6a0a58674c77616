"""What every command of jaxrm shares, shown on a toy command with a small config of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrm.config import command_line, files
from jaxrm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

TOY = '''"""Trains a toy."""

import sys
from dataclasses import dataclass, field

from absl import flags

from jaxrm.config import command_line
from jaxrm.config.fields import above, bounded, check


@dataclass(frozen=True)
class Optimizer:
    lr: float = bounded(1e-5, above(0))
    clip: float | None = None

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Judge:
    every: int = 10
    name: str = "exact"


@dataclass(frozen=True)
class Toy:
    num_steps: int = 5
    optimizer: Optimizer = field(default_factory=Optimizer)
    judge: Judge | None = None
    sizes: tuple[int, ...] = (1, 2)
    packing: bool = True
    run_dir: str | None = "runs/x"


def define_flags(values):
    flags.DEFINE_string("prompt", None, "the text to answer", flag_values=values)
    flags.DEFINE_integer("max_tokens", 16, "tokens at most", lower_bound=1, flag_values=values)


def main(config, flags):
    print(config, flags.prompt, flags.max_tokens)
    if flags.prompt == "interrupt":
        raise KeyboardInterrupt
    if flags.prompt == "bug":
        raise ZeroDivisionError("ours")
    return config.num_steps if flags.prompt == "status" else None


if __name__ == "__main__":
    from toy import Toy  # the class that the config file imports

    sys.exit(command_line.run(main, Toy, define_flags=define_flags))
'''

CONFIG = '''"""Twelve steps of the toy.

Takes a second.
"""

from toy import Optimizer, Toy


def get_config(size="small"):
    return Toy(num_steps=12 if size == "small" else 99, optimizer=Optimizer(lr=0.5))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy command's module; the working directory holds its config, x.py."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "x.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    import toy

    yield toy
    sys.modules.pop("toy")


@pytest.fixture
def parse(toy):
    """Runs the toy command in process: the config that its main received, and its flags."""

    def run(*arguments, **options):
        received = []
        main = lambda config, flags: received.append((config, flags))  # noqa: E731  # one line beside its list
        options = {"config_class": toy.Toy, "define_flags": toy.define_flags} | options
        assert command_line.run(main, argv=["toy", *arguments], **options) == 0
        return received[0]

    return run


@pytest.fixture
def refuse(toy, capsys):
    """Runs a mistaken command line in process: the one line that it is answered with."""

    def run(*arguments, main=None, **options):
        def unreachable(config, flags):
            raise AssertionError("main must not run")

        before = sorted(Path().rglob("*"))
        options = {"config_class": toy.Toy, "define_flags": toy.define_flags} | options
        status = command_line.run(main or unreachable, argv=["toy", *arguments], **options)
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("jaxrm: error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert sorted(Path().rglob("*")) == before
        return err.removeprefix("jaxrm: error: ").strip()

    return run


def test_the_config_file_gives_the_config(parse, toy):
    assert parse("--config=x.py")[0] == toy.Toy(12, toy.Optimizer(0.5))
    assert parse("--config", "x.py")[0].num_steps == 12
    assert parse("-config=x.py")[0].num_steps == 12


def test_an_argument_after_a_colon_reaches_get_config(parse):
    assert parse("--config=x.py:large")[0].num_steps == 99


def test_fields_are_overridden_by_their_type(parse, toy):
    config, _ = parse(
        "--config=x.py",
        "--config.num_steps=3",
        "--config.optimizer.lr=2",
        "--config.optimizer.clip",
        "1",
        "--config.sizes=(4, 5, 6)",
        "--noconfig.packing",
        "--config.run_dir=None",
    )
    assert config == toy.Toy(3, toy.Optimizer(2.0, 1.0), None, (4, 5, 6), False, None)
    assert isinstance(config.optimizer.lr, float)
    assert parse("--config=x.py", "--config.packing=false")[0].packing is False
    assert parse("--config=x.py", "--noconfig.packing", "--config.packing")[0].packing is True


def test_overrides_may_precede_the_config_file_the_last_counts(parse):
    arguments = ("--config.num_steps=3", "--config=x.py", "--config.num_steps=4")
    assert parse(*arguments)[0].num_steps == 4


def test_naming_a_field_makes_the_section_that_was_none(parse, toy):
    assert parse("--config=x.py", "--config.judge.every=3")[0].judge == toy.Judge(3)
    assert parse("--config=x.py", "--config.judge.every=3", "--config.judge=None")[0].judge is None


def test_ints_of_a_config_file_become_floats_in_float_fields(parse):
    Path("y.py").write_text("from toy import *\ndef get_config():\n    return Toy(optimizer=Optimizer(lr=1))\n")
    assert isinstance(parse("--config=y.py", "--config.sizes=")[0].optimizer.lr, float)


def test_the_commands_own_flags_are_parsed_beside_the_config(parse):
    _, flags = parse("--prompt=hello world", "--config=x.py", "--max_tokens=3")
    assert (flags.prompt, flags.max_tokens) == ("hello world", 3)


def test_a_command_may_leave_the_config_optional_or_have_none(parse):
    assert parse("--prompt=x", config_required=False)[0] is None
    assert parse("--prompt=x", config_class=None)[0] is None


def test_two_command_lines_in_one_process_share_no_flags(parse):
    assert parse("--config=x.py", "--prompt=a")[1].prompt == "a"
    assert parse("--config=x.py")[1].prompt is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.nmu_steps=3"],
            "config.nmu_steps is no field of the config; did you mean --config.num_steps?",
        ),
        (["--config.lr=3"], "config.lr is no field of the config; did you mean --config.optimizer.lr?"),
        (
            ["--noconfig.optimizer.lr"],
            "--noconfig.optimizer.lr switches off a bool, and config.optimizer.lr is none; give a value, "
            "--config.optimizer.lr=…",
        ),
        (["--noconfig.pakcing"], "config.pakcing is no field of the config; did you mean --config.packing?"),
        (
            ["--config.judge.evry=3"],
            "config.judge.evry is no field of the config; did you mean --config.judge.every?",
        ),
        (["--config.zzz=3"], "config.zzz is no field of the config; --help lists the fields"),
        (
            ["--config.optimizer.lr=abc"],
            "config.optimizer.lr is 'abc'; required float; e.g. --config.optimizer.lr=0.5",
        ),
        (["--config.num_steps=2.5"], "config.num_steps is '2.5'; required int; e.g. --config.num_steps=12"),
        (
            ["--config.packing=maybe"],
            "config.packing is 'maybe'; required bool; e.g. --config.packing=true",
        ),
        (
            ["--config.sizes=1,b"],
            "config.sizes is '1,b'; required tuple of int; e.g. --config.sizes=1,2",
        ),
        (
            ["--config.optimizer=adam"],
            "config.optimizer is a section; set its fields, e.g. --config.optimizer.lr=…",
        ),
        (
            ["--config.optimizer.lr=-1"],
            "config.optimizer.lr is -1.0; it must be above 0, e.g. --config.opt",
        ),
        (["--config.num_steps"], "Missing value for flag --config.num_steps; flags are written --name=value"),
        (["--noconfig.packing=3"], "--noconfig.packing=3 does not take an argument"),
        (["--promt=a"], "--promt is no flag of this command; did you mean --prompt?"),
        (["--num_steps=3"], "--num_steps is no flag of this command; did you mean --config.num_steps?"),
        (["--zzz"], "--zzz is no flag of this command; --help lists the flags"),
        (["--max_tokens=a"], "--max_tokens is 'a'; required a positive integer; e.g. --max_tokens=16"),
        (["--max_tokens=0"], "--max_tokens is '0'; required a positive integer; e.g. --max_tokens=16"),
        (["train"], "'train' stands alone on the command line; flags are written --name=value"),
        (["--prompt", "hello", "world"], "'world' stands alone"),
        (["--", "--prompt=a"], "'--prompt=a' stands alone"),
        (["--flagfile=nowhere"], "nowhere"),
    ],
)
def test_a_mistaken_argument_gets_one_line(refuse, arguments, message):
    assert message in refuse("--config=x.py", *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "bad.py:1: SyntaxError: "),
        ("\n1 / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("import nowhere_at_all\n", "bad.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 3\n", "bad.py: there is no get_config; required a function get_config() that returns the config"),
        (
            "def get_config():\n    pass\n",
            "get_config() returns NoneType; required the config itself, return Toy(...)",
        ),
        ("def get_config(size):\n    pass\n", "use --config=bad.py:argument"),
        (
            "from toy import *\ndef get_config():\n    return Toy(\n        num_stepz=3)\n",
            "bad.py:3: TypeError: Toy.__init__() got an unexpected keyword argument 'num_stepz'",
        ),
        (
            "from toy import *\ndef get_config():\n    return Toy(optimizer=Optimizer(lr=0))\n",
            "bad.py:3: Optimizer.lr is 0; it must be above 0, e.g. lr=1e-05",
        ),
        (
            "def get_config():\n    return {'num_steps': 1}\n",
            "bad.py: get_config() returns dict; required the config",
        ),
        ("class Other: pass\ndef get_config():\n    return Other()\n", "bad.py: get_config() returns Other; required"),
        ("from jaxrm.config.dicts import to_config_dict\n", "; get_config() returns the config itself"),
        ("from toy import *\ndef get_config():\n    return Toy('a')\n", "config.num_steps is 'a'; required int"),
        (
            "from toy import *\ndef get_config():\n    return Toy(optimizer=Optimizer(clip='a'))\n",
            "config.optimizer.clip is 'a'; required float or None",
        ),
    ],
)
def test_a_broken_config_file_gets_one_line(refuse, text, message):
    Path("bad.py").write_text(text)
    assert message in refuse("--config=bad.py")


def test_a_missing_config_file_is_one_line_with_the_nearest_name(refuse):
    Path("configs").mkdir()
    Path("configs/quickstart.py").write_text(CONFIG)
    assert refuse("--config=configs/quick_start.py").endswith("did you mean --config=configs/quickstart.py?")
    assert "No such file" in refuse("--config=nowhere/zzz.py")
    assert "it is a folder" in refuse("--config=configs")
    assert "--config is ''" in refuse("--config=")
    assert "--config is missing; required a config file" in refuse()
    assert "--config.num_steps overrides nothing; give its file too" in refuse("--config.num_steps=3")
    assert "use --config=plain.py" in (
        Path("plain.py").write_text("def get_config():\n    pass\n") and refuse("--config=plain.py:large")
    )


def test_a_bare_name_is_a_config_that_comes_with_jaxrm(refuse):
    """A file of that name goes first; an unknown name gets the near ones."""
    assert files.find_config_file("quickstart") == str(ROOT / "configs" / "quickstart.py")
    Path("quickstart").write_text(CONFIG)
    assert files.find_config_file("quickstart") == "quickstart"
    message = refuse("--config=sft_tini")
    assert "--config is 'sft_tini', neither a file nor a config" in message
    assert "did you mean sft_tiny or " in message
    assert "required a Python file or compare_quickstart, " in refuse("--config=zzz")


def test_overrides_without_an_optional_config_file_are_refused(refuse):
    message = refuse("--config.num_steps=3", config_required=False)
    assert message.startswith("--config.num_steps overrides nothing; give its file too")


def test_a_required_flag_that_is_missing_gets_one_line(refuse):
    from absl import flags

    def define(values):
        flags.DEFINE_string("output", None, "the folder to write", required=True, flag_values=values)

    message = refuse("--config=x.py", define_flags=define)
    assert message == "--output is missing; required the folder to write"


def test_a_user_error_in_main_is_one_line_even_if_it_has_several(refuse):
    def main(config, flags):
        raise UserError("config.data.path is 'a';\nrequired a file")

    assert refuse("--config=x.py", main=main) == "config.data.path is 'a'; required a file"


def test_other_exceptions_keep_their_traceback(toy):
    with pytest.raises(ZeroDivisionError, match="ours"):
        command_line.run(toy.main, toy.Toy, define_flags=toy.define_flags, argv=["t", "--config=x.py", "--prompt=bug"])


def test_help_lists_flags_and_fields_with_the_values_of_the_file(toy, capsys):
    options = {"config_class": toy.Toy, "define_flags": toy.define_flags}
    assert command_line.run(toy.main, argv=["t", "--help"], **options) == 0
    out = capsys.readouterr().out
    for text in (
        "usage: python -m",
        "Trains a toy.",
        "--max_tokens=16  tokens at most",
        "--config=configs/….py --help lists the fields of the config too.",
    ):
        assert text in out
    assert command_line.run(toy.main, argv=["t", "--config=x.py", "--prompt=a", "-h"], **options) == 0
    out = capsys.readouterr().out
    for text in (
        "Twelve steps of the toy.",
        "Fields of the config, with the values of x.py",
        "--config.num_steps=12  (int)",
        "--config.judge=None  (section Judge or None)",
        "--config.judge.every=10  (int)",
        "--config.sizes=1,2  (tuple of int)",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "status", "err"),
    [
        (["--config=x.py"], 0, ""),
        (["--config=x.py", "--prompt=status"], 12, ""),
        (["--config=x.py", "--config.lr=3"], 2, "jaxrm: error: config.lr is no field of the config; did you mean "
         "--config.optimizer.lr?\n"),
        (["--config=x.py", "--prompt=interrupt"], 130, "jaxrm: interrupted\n"),
    ],
)  # fmt: skip
def test_a_process_ends_with_the_documented_status(toy, tmp_path, arguments, status, err):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "toy.py", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (status, err)


def test_a_mistake_is_answered_without_loading_jax(toy, tmp_path):
    code = "import sys, jaxrm.config.command_line; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
