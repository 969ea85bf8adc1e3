"""Command lines from declarations: a command is a function, and its signature is its arguments.

cyclopts reads the signatures, option dataclasses and docstrings. This module holds what all
commands share: how help is laid out, and what is said of a mistake.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from inspect import BoundArguments
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import App, CycloptsError, Parameter
from cyclopts.completion.detect import ShellDetectionError
from cyclopts.exceptions import (
    ConsumeMultipleError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from data_prep.bounds import Count, bounds_in

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel

Console: TypeAlias = Any
"""A console of rich, which cyclopts brings."""

DISTRIBUTION = "simmim"
"""The distribution that brings all commands; its version is theirs."""
BAD_ARGUMENTS = 2
"""Exit code of a mistake in the arguments."""

FLAT = Parameter(name="*")
"""The fields of an option dataclass are options of the command."""
ONE_OF = Parameter(allow_repeating=False)
"""A flag and its opposite, of which at most one may be given."""
MANY = Parameter(consume_multiple=True)
"""An option that takes all values that follow it."""
PASSED = Parameter(parse=False)
"""Not an argument: the program passes it."""


def shown_as(text: str, **options: Any) -> Parameter:
    """Return the parameter of an option whose value help shows as `text`."""
    if not hasattr(Parameter(), "metavar"):  # releases for Python 3.10 show no values
        return Parameter(**options)
    return Parameter(metavar=text, **options)


def _check_count(type_: object, value: int) -> None:
    del type_
    if value < 1:
        raise ValueError(f"it must be 1 or more, got {value}.")


CountOption = Annotated[Count, Parameter(validator=_check_count)]
"""An integer of at least 1, of a command whose options no dataclass checks."""

_LABELS = 28
"""Columns of the names of options, with their indentation."""
_COLUMNS = 100
"""Columns of help, on a narrower terminal as many as that has."""


def make_app(name: str, summary: str, **options: Any) -> App:
    """Make the command line of a program or of a group of commands; see `cyclopts.App`."""
    return App(
        name=name,
        help=summary,
        version=_version,
        help_format="plaintext",
        help_formatter=HelpText(),
        # As of other programs, the last of several values counts. Lists have no --empty-NAME.
        group_parameters="Options",
        default_parameter=Parameter(negative_iterable=(), allow_repeating=True),
        **options,
    )


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "not installed"


Shell = Literal["bash", "zsh", "fish"]


def add_completion(app: App) -> None:
    """Add `--install-completion` to a program."""
    program = app.name[0]

    def install(shell: Shell | None = None, /) -> int:
        try:
            path = app.install_completion(shell=shell)
        except ShellDetectionError:
            raise ValueError(
                "the shell is unknown: add bash, zsh or fish to --install-completion."
            ) from None
        sys.stdout.write(f"wrote {path}; new shells complete {program}\n")
        return 0

    app.command(install, name="--install-completion", help=f"Complete {program} in your shell.")


def parse_arguments(
    app: App, arguments: Sequence[str]
) -> tuple[Callable[..., Any], BoundArguments, dict[str, Any]]:
    """Return the command that is asked for, its arguments, and those that the program passes.

    Raises:
        CycloptsError: a mistake in the arguments; see `describe_mistake`.
    """
    return app.parse_args(list(arguments), exit_on_error=False, print_error=False)


def describe_mistake(error: CycloptsError, program: str) -> str:
    """Return what is wrong with the arguments and where to look, as one line."""
    # The chain of a command that is unknown, or of the program itself, is empty.
    command = " ".join([program, *(error.command_chain or ())])
    return f"{command}: {_describe(error)} See {command} --help."


def _describe(error: CycloptsError) -> str:
    error.verbose = False
    text = str(error)
    match error:
        case ConsumeMultipleError(max_allowed=1, actual_count=count, argument=argument):
            name = "it" if argument is None else argument.name
            text = f"{name} takes one value, not {count}: remove the others."
        case MissingArgumentError(argument=argument) if argument is not None:
            alone = error.keyword or argument.tokens
            name = error.keyword or argument.name
            text = f"{name} has no value: add one." if alone else f"{name} is missing: add it."
        case RepeatArgumentError(token=token):
            text = f"{token.keyword} repeats an option, or is its opposite: give one of them."
        case UnusedCliTokensError(unused_tokens=[first, *_]):
            text = f"{first!r} is one argument too many: remove it."
        case ValidationError(exception_message=message, argument=argument) if argument is not None:
            text = f"{argument.name}: {message}"
            if bounds := bounds_in(argument.field_info.annotation):
                value = argument.tokens[-1].value
                text = f"{argument.name} is {value}; it must be {bounds}."
        case UnknownOptionError(token=token):
            # cyclopts counts the dashes, which all options share: --foo would be --root
            what, meant, name = text.partition(" Did you mean ")
            given = (token.keyword or token.value).lstrip("-")
            if meant and not get_close_matches(given, [name.strip('"?').lstrip("-")]):
                text = what
        case UnknownCommandError():
            text = text.replace('"', "")
    return text


class HelpText:
    """Help as plain text in two columns, as wide as the terminal: options, and what they do."""

    def __call__(self, console: Console, options: object, panel: "HelpPanel") -> None:
        """Print a group of options or commands."""
        del options
        rows = [(_label(entry), _about(entry, console)) for entry in panel.entries]
        if rows:
            lines = [f"{_plain(panel.title, console)}:", *_two_columns(rows, _width(console))]
            _print(console, "\n".join(lines) + "\n")

    def render_usage(self, console: Console, options: object, usage: object) -> None:
        """Print how the command is called."""
        del options
        text = _plain(usage, console).removeprefix("Usage: ")
        _print(console, f"Usage: {text}\n")

    def render_description(self, console: Console, options: object, description: object) -> None:
        """Print what the command does; paragraphs are filled, indented text stays as it is."""
        del options
        text = _plain(description, console, wrap=False).strip("\n")
        paragraphs = re.split(r"\n{2,}", text)
        filled = [
            part if re.search(r"^ ", part, re.MULTILINE) else _fill(part, _width(console))
            for part in paragraphs
        ]
        if text:
            _print(console, "\n\n".join(filled) + "\n")


def _label(entry: "HelpEntry") -> str:
    # Releases for Python 3.10 know neither labels of arguments nor of values.
    names = getattr(entry, "display_labels_with_metavar", entry.all_options)
    if entry.default == "False":  # what is off by default needs no option that turns it off
        names = tuple(name for name in names if name not in entry.negative_names)
    return ", ".join(names)


def _about(entry: "HelpEntry", console: Console) -> str:
    parts = [_plain(entry.description, console)]
    if entry.choices:
        parts.append(f"({', '.join(entry.choices)})")
    if entry.required and _label(entry).startswith("-"):  # the usage names the others
        parts.append("(required)")
    if entry.default not in (None, "False", "True", "()", "None"):
        default = entry.default
        if default[0] == "(":  # of several values, as they are typed
            default = re.sub("[(),']", "", default)
        parts.append(f"(default: {default})")
    return " ".join(part for part in parts if part)


def _two_columns(rows: Iterable[tuple[str, str]], width: int) -> Iterable[str]:
    for label, about in rows:
        lines = textwrap.wrap(about, width - _LABELS, break_on_hyphens=False) or [""]
        if len(label) + 4 > _LABELS:
            yield f"  {label}"
        else:
            yield f"  {label:<{_LABELS - 2}}{lines.pop(0)}".rstrip()
        yield from (f"{'':{_LABELS}}{line}" for line in lines)


def _fill(text: str, width: int) -> str:
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)


def _plain(value: object, console: Console, *, wrap: bool = True) -> str:
    """Return something that cyclopts would print as text, in one line if `wrap`."""
    if value is None:
        return ""
    with console.capture() as capture:
        console.print(value, highlight=False, markup=False, soft_wrap=True, no_wrap=True)
    text = capture.get()
    return " ".join(text.split()) if wrap else text


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _width(console: Console) -> int:
    return min(console.width, _COLUMNS) if console.is_terminal else _COLUMNS
