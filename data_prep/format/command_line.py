"""Command lines from declarations: a command is a function, and its signature is its arguments.

cyclopts reads the signatures, option dataclasses and docstrings. This module holds what all
commands share: how help is laid out, and how mistakes are reported.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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

from data_prep.bounds import bounds_in

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


_LABELS = 28
"""Columns of the names of options, with their indentation."""
_COLUMNS = 100
"""Columns of help, on a narrower terminal as many as that has."""


def make_app(name: str, summary: str) -> App:
    """Make the command line of a program; groups of its commands are plain `cyclopts.App`s."""
    app = App(
        name=name,
        help=summary,
        version=_version,
        help_format="plaintext",
        # As of other programs, the last of several values counts. Lists have no --empty-NAME.
        group_parameters="Options",
        default_parameter=Parameter(negative_iterable=(), allow_repeating=True),
    )
    app.help_formatter = HelpText(app)
    return app


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
            if not meant or not get_close_matches(given, [name.strip('"?').lstrip("-")]):
                text = f"{what}{_suggest_general(given)}"
        case UnknownCommandError(unused_tokens=[option, *_]) if option.startswith("-"):
            text = f"Unknown option: {option}.{_suggest_general(option.lstrip('-'))}"
        case UnknownCommandError():
            text = text.replace('"', "")
    return text


def _suggest_general(name: str) -> str:
    """Return a suggestion of an option of every program for an unknown one, or nothing."""
    close = get_close_matches(name, ("help", "version"), n=1)
    return f" Did you mean --{close[0]}?" if close else ""


class HelpText:
    """Help as plain text in two columns, as wide as the terminal: options, and what they do."""

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, console: Console, options: object, panel: "HelpPanel") -> None:
        """Print a group of options or commands."""
        del options
        bounds = self._bounds()
        rows = [
            (_label(entry), _about(entry, bounds.get(entry.names[:1], ""), console))
            for entry in panel.entries
        ]
        if rows:
            lines = [f"{_plain(panel.title, console)}:", *_two_columns(rows, _width(console))]
            _print(console, "\n".join(lines) + "\n")

    def _bounds(self) -> dict[tuple[str, ...], str]:
        """Return in words the bounds of the options of the command, by name."""
        command = self._app.app_stack.current_frame[-1]
        options = command.assemble_argument_collection() if command.default_command else ()
        found = {one.names[:1]: bounds_in(one.field_info.annotation) for one in options}
        return {name: str(bounds) for name, bounds in found.items() if bounds}

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


def _about(entry: "HelpEntry", bounds: str, console: Console) -> str:
    notes = [*([", ".join(entry.choices)] if entry.choices else []), *([bounds] if bounds else [])]
    if entry.required and _label(entry).startswith("-"):  # the usage names the others
        notes.append("required")
    if entry.default not in (None, "False", "True", "()", "None"):
        default = entry.default
        if default[0] == "(":  # of several values, as they are typed
            default = re.sub("[(),']", "", default)
        notes.append(f"default: {default}")
    return f"{_plain(entry.description, console)} ({'; '.join(notes)})".removesuffix(" ()")


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
