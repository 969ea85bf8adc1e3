"""The `data-prep` command line: what each command takes; `data_prep.commands` runs them."""

# ruff: noqa: E402 (the system comes first: Windows lacks what the others import)
# ruff: noqa: PLC0415 (commands import NumPy and Pillow; help and mistakes need neither)
from data_prep.format.systems import require_posix

require_posix("data-prep")
import errno
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from data_prep.bounds import Count, Probability, check_bounds
from data_prep.executors.processes import (
    InterruptedBySignal,
    Interruption,
    LostWorkerError,
    WorkerError,
    available_cores,
    raise_on_signals,
)
from data_prep.format.command_line import (
    BAD_ARGUMENTS,
    FLAT,
    MANY,
    ONE_OF,
    PASSED,
    add_completion,
    describe_mistake,
    make_app,
    parse_arguments,
    shown_as,
)
from data_prep.format.terminal import CANNOT_WRITE, ExitCode, flush_output, protect_output
from data_prep.format.text import printable_lines
from data_prep.write.options import RunOptions, ShardOptions

_MAX_REJECTED = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)
_RESUMES = ("shard", "reshard")
"""Commands that a second call resumes."""

app = make_app("data-prep", "Write, check and summarize WebDataset shards of images for training.")
add_completion(app)


def run() -> None:
    """Run the command and leave the process with its exit code."""
    protect_output(optional=False)
    try:
        code: ExitCode = main()
    except SystemExit as ending:
        code = ending.code
    except OSError:  # of a message that could not be written either
        code = CANNOT_WRITE
    sys.exit(flush_output(code))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0 on success and for help, 2 on bad input, 76 if a worker was lost (the same command
        resumes), 1 if one failed otherwise, 128 + signal number if interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with raise_on_signals() as interruption:
            command, given, passed = parse_arguments(app, argv)
            ours = {name: interruption for name, hint in passed.items() if hint is Interruption}
            return command(*given.args, **given.kwargs, **ours) or 0
    except CycloptsError as error:
        print(printable_lines(describe_mistake(error, "data-prep")), file=sys.stderr)
        return BAD_ARGUMENTS
    except InterruptedBySignal as interrupt:
        remedy = "; run the same command again to resume" if argv[0] in _RESUMES else ""
        print(f"data-prep: stopped{remedy}.", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, OSError) as error:
        print(f"data-prep: {printable_lines(_describe(error))}", file=sys.stderr)
        return BAD_ARGUMENTS
    except MemoryError:
        advice = "lower --workers or --max-pixels, or give the job more memory"
        print(f"data-prep: memory ran out: {advice}.", file=sys.stderr)
        return 76
    except WorkerError as error:
        print(f"data-prep: {printable_lines(error)}", file=sys.stderr)
        return 76 if isinstance(error, LostWorkerError) else 1


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename in ("<stdout>", "<stderr>"):
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"the disk is full: {error.strerror}, at {error.filename or 'an unnamed file'}. Make "
            "room there (temporary files are in TMPDIR), or give a folder on another disk, and run "
            "the same command again; finished shards are kept."
        )
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return f"cannot continue{place}: {error.strerror}."
    return str(error)


@dataclass(frozen=True, kw_only=True)
class _Run(RunOptions):
    """How a command writes shards: with all cores, and few images rejected."""

    workers: Count = field(default_factory=available_cores)
    """Number of processes; the bytes written do not depend on it."""
    max_rejected: Probability = _MAX_REJECTED
    """Fail if a larger fraction of images is rejected (duplicates not counted)."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Where and over what shards are written."""

    channels_first: Annotated[
        bool | None, ONE_OF, Parameter(negative="--channels-last", show_default=False)
    ] = None
    """Axis of channels in arrays (.npy). Default: few channels before rows and columns, like
    5x224x224, are recognised."""
    staging: Path | None = None
    """Local folder of shards before their upload. Default: the user's cache."""
    overwrite: bool = False
    """Replace shards written with other options or from other input."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How existing shards are read."""

    allow_pipe: bool = False
    """Run the commands whose output shards are, as in 'pipe:COMMAND'."""
    workers: Count = field(default_factory=available_cores)
    """Number of processes."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Tars that end early."""

    allow_missing_end: bool = False
    """Only warn of tars without an end mark, which may have been cut."""


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """Options of the commands that write shards."""

    options: Annotated[ShardOptions, FLAT] = ShardOptions()
    run: Annotated[_Run, FLAT] = _Run()
    output: Annotated[_Output, FLAT] = _Output()

    def write(
        self, source: str, folder: str, interruption: Interruption, *, from_shards: bool
    ) -> int:
        """Write the images of a source, or the samples of shards, as shards."""
        from data_prep.commands import write_shards

        options, first = self.options, self.output.channels_first
        if first is not None:
            options = replace(options, channel_axis="first" if first else "last")
        return write_shards(
            source,
            folder,
            options,
            self.run,
            from_shards=from_shards,
            staging=self.output.staging,
            overwrite=self.output.overwrite,
            interruption=interruption,
        )


@app.command(sort_key=0)
def shard(
    source: str,
    folder: str,
    /,
    *,
    writing: Annotated[_Writing, FLAT] = _Writing(),
    interruption: Annotated[Interruption, PASSED],
) -> int:
    """Write images as shards, with classes from folder names or from a list.

    A list (txt, tsv, csv, jsonl, parquet) has one image per row: a path and maybe a label.
    Rejected images are listed in rejected.jsonl. data_prep/FORMATS.md has all rules.

    Args:
        source: Folder, zip, tar (also compressed) or list of images; path or URL.
        folder: Folder of the shards to write; path or URL (s3, gs, http).
    """
    return writing.write(source, folder, interruption, from_shards=False)


@app.command(sort_key=1)
def reshard(
    source: str,
    folder: str,
    /,
    *,
    writing: Annotated[_Writing, FLAT] = _Writing(),
    interruption: Annotated[Interruption, PASSED],
) -> int:
    """Write the samples of existing shards as new shards.

    Args:
        source: Folder of tars, or a pattern: 'DIR/train-*.tar', 'DIR/train-{000..099}.tar'; path
            or URL.
        folder: Folder of the shards to write; path or URL (s3, gs, http).
    """
    return writing.write(source, folder, interruption, from_shards=True)


@app.command(sort_key=2)
def merge(folder: str, /, *, max_rejected: Probability = _MAX_REJECTED) -> int:
    """Merge the parts written with --part into one set.

    Args:
        folder: Folder of the parts.
        max_rejected: Fail if a larger fraction of images is rejected (duplicates not counted).
    """
    from data_prep.commands import merge_set

    run = RunOptions(max_rejected=max_rejected)
    return merge_set(folder, max_rejected=run.max_rejected)


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """What the channels of images are."""

    channels: Annotated[str | None, shown_as("NAME,...")] = None
    """Names of the channels in stored order, as in B2,B3,B4,B8,B12 (Sentinel-2's) or red,nir.
    Default: those given in the files."""
    no_data: float | None = None
    """No-data value of arrays, excluded from statistics. Default: GDAL's tag."""


@app.command(sort_key=3)
def index(
    folder: str,
    /,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    image_key: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    named: Annotated[_Channels, FLAT] = _Channels(),
    ends: Annotated[_Ends, FLAT] = _Ends(),
    reading: Annotated[_Reading, FLAT] = _Reading(),
    interruption: Annotated[Interruption, PASSED],
) -> int:
    """Write manifest and indexes for existing WebDataset tars.

    Args:
        folder: Folder of tars, or a pattern: 'DIR/train-*.tar', 'DIR/train-{000..099}.tar'; path
            or URL, or 'pipe:COMMAND' with --allow-pipe.
        include: Use only tars whose names match, as in 'train-*.tar' or 'train-{000..099}.tar';
            may be repeated.
        exclude: Leave out tars whose names match; may be repeated.
        image_key: What follows the key in the names of images, if more than an extension:
            image.png for KEY.image.png. Other members are ignored.
        output: Folder for manifest and indexes if the folder of the tars is not writable.
        overwrite: Replace an existing manifest.
    """
    from data_prep.commands import index_tars

    return index_tars(
        folder,
        include=include,
        exclude=exclude,
        image_key=image_key,
        channels=named.channels,
        no_data=named.no_data,
        output=output,
        overwrite=overwrite,
        allow_missing_end=ends.allow_missing_end,
        allow_pipe=reading.allow_pipe,
        workers=reading.workers,
        interruption=interruption,
    )


@app.command(sort_key=4)
def verify(
    folder: str,
    /,
    *,
    deep: Annotated[bool, ONE_OF, Parameter(negative="--fast", show_default=False)] = False,
    ends: Annotated[_Ends, FLAT] = _Ends(),
    reading: Annotated[_Reading, FLAT] = _Reading(),
    interruption: Annotated[Interruption, PASSED],
) -> int:
    """Read shards back and compare them with the manifest.

    Args:
        folder: Folder of shards; path or URL (s3, gs, http).
        deep: Decode every image too, for example after `index`. Default: --fast compares lengths,
            checksums and indexes, since `shard` decodes every image before writing it.
    """
    from data_prep.commands import verify_set

    return verify_set(
        folder,
        deep=deep,
        allow_missing_end=ends.allow_missing_end,
        allow_pipe=reading.allow_pipe,
        workers=reading.workers,
        interruption=interruption,
    )


@app.command(sort_key=5)
def info(
    folder: str,
    /,
    *,
    statistics: bool = False,
    contact_sheet: Path | None = None,
    bands: Annotated[tuple[str, ...] | None, MANY] = None,
    reading: Annotated[_Reading, FLAT] = _Reading(),
    interruption: Annotated[Interruption, PASSED],
) -> int:
    """Summarize a folder of shards.

    Args:
        folder: Folder of shards; path or URL (s3, gs, http).
        statistics: Measure mean and standard deviation per channel, and write statistics.json.
        contact_sheet: Draw samples of the set as a picture, in this PNG.
        bands: Bands of the contact sheet, by name or counted from 0: three as red, green and blue,
            or one in grey. Default: red, green and blue if they have these names, else the first
            three, or the first of fewer.
    """
    from data_prep.commands import describe_set

    return describe_set(
        folder,
        statistics=statistics,
        contact_sheet=contact_sheet,
        bands=bands,
        allow_pipe=reading.allow_pipe,
        workers=reading.workers,
        interruption=interruption,
    )
