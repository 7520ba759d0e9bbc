from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from megatron_vcr1.cli import main as cli


def test_bad_input_is_explained_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("[model]\npath = 'x'\n[parallel]\ntensor = 0\n")
    assert cli.main(["config", "--check", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = f"vcr1: error: {path}: parallel.tensor: input should be greater than or equal to 1, not 0\n"
    assert printed.err == expected


@pytest.mark.parametrize("argv", [["nonsense"], ["config", "--check"]])
def test_bad_usage_prints_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: vcr1" in capsys.readouterr().err


def test_help_is_printed_without_a_command(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "per-token log-probs" in printed.err


def test_version_is_the_installed_version():
    command = [sys.executable, "-m", "megatron_vcr1", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"vcr1 {version('megatron_vcr1')}\n"


def test_overrides_are_refused_by_commands_without_settings(monkeypatch, capsys):
    class Plain:
        @staticmethod
        def add_parser(subparsers):
            subparsers.add_parser("plain").set_defaults(run=lambda args: 0)

    monkeypatch.setattr(cli, "COMMANDS", (Plain,))
    assert cli.main(["plain"]) == 0
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plain", "--parallel.tensor", "2"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --parallel.tensor 2" in capsys.readouterr().err


def commands(parser, name="vcr1"):
    """Yield every command with its parser."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, subparser in action.choices.items():
                yield from commands(subparser, f"{name} {word}")


def test_every_command_and_option_has_a_help_text():
    unexplained = []
    for name, parser in commands(cli.build_parser()):
        options = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
        unexplained += [f"{name} {action.dest}" for action in options if not action.help]
        unexplained += [] if parser.description else [name]
    assert not unexplained


def test_help_imports_no_heavy_package():
    code = (
        "import sys; from megatron_vcr1.cli import main; main.build_parser().format_help(); "
        "print([name for name in ('torch', 'transformers', 'pydantic', 'numpy', 'av', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_os_error_is_a_message_and_exit_code_1(monkeypatch, capsys):
    class Failing:
        @staticmethod
        def add_parser(subparsers):
            subparsers.add_parser("fail").set_defaults(run=fail)

    def fail(args):
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr(cli, "COMMANDS", (Failing,))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "vcr1: failed: [Errno 28] No space left on device: 'out.jsonl'\n"


def test_the_shell_completes_commands_and_options(tmp_path):
    """As bash calls it: the command line in COMP_LINE, the completions on file descriptor 8."""
    pytest.importorskip("argcomplete")

    def completions(line):
        file = tmp_path / "completions"
        environment = {
            **os.environ,
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(file),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        subprocess.run([sys.executable, "-m", "megatron_vcr1"], env=environment, check=True)
        return {word.strip() for word in file.read_text().splitlines()}

    assert completions("vcr1 re") == {"report"}
    assert {"train", "status", "plan"} <= completions("vcr1 ")
    assert {"--gpu", "--gpus-per-node"} == completions("vcr1 plan --gp")
    assert "h200" in completions("vcr1 plan --gpu ")
