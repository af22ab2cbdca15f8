"""The command line, called from a test."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from vapt_fast.cli import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    """What a command that must not fail printed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def error_of(*arguments: object, code: int = 2) -> str:
    """The one line of an error that a user sees."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return line
