"""Measure the throughput of `data-prep shard` against `tar` and against decoding alone.

    python tests/benchmarks/sharding.py FOLDER_OF_ZIPS --workers 1 2
    python tests/benchmarks/sharding.py --first-shard FOLDER

FOLDER_OF_ZIPS contains cifar10.zip and photos.zip; the photographs are copied under new names until
there are 10,000. Every figure is the median of `--repeats` runs, alternating ours and `tar`. With
`--first-shard` the time to the first shard of a folder is measured instead; if the folder does not
exist, 200,000 tiny images are drawn into it.
"""

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image

_PHOTOS = 10_000
_DECODED = 500
_TINY, _TINY_A_FOLDER = 200_000, 2_000
_ORDERS = (
    ("global shuffle", ()),
    ("--shuffle-window 10000", ("--shuffle-window", "10000")),
    ("--no-shuffle", ("--no-shuffle",)),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a command."""

    seconds: float
    """Wall time."""
    peak: float
    """Peak memory of the process and its children together, in MiB, sampled."""


def main() -> None:
    """Measure and print the tables of RESULTS.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder with cifar10.zip and photos.zip")
    parser.add_argument("--first-shard", type=Path, metavar="FOLDER", help="folder of tiny images")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--photos", type=int, default=_PHOTOS)
    parser.add_argument("--work", type=Path, default=None, help="folder for temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder_name:
        work = Path(folder_name)
        if arguments.first_shard is not None:
            _print_first_shard(arguments.first_shard, work, arguments.repeats)
            return
        if arguments.data is None:
            parser.error("give the folder of zips, or --first-shard FOLDER")
        cifar = _unpack(arguments.data / "cifar10.zip", work / "cifar10")
        photos = _repeat(arguments.data / "photos.zip", work / "photos", arguments.photos)
        few = _repeat(arguments.data / "photos.zip", work / "few", arguments.photos // 10)
        print(
            "| set | images | workers | tar | unchecked | to tar | decode | checked | to decode |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for name, source, folder in (
            ("cifar10.zip", arguments.data / "cifar10.zip", cifar),
            ("photographs", photos, photos),
        ):
            for workers in arguments.workers:
                _print_rates(name, source, folder, work, workers, arguments.repeats)
        for label, folder in (("1x", few), ("10x", photos)):
            run = _shard(folder, work / "peak", 1, check=True)
            print(f"peak memory with one worker, {label} the photographs: {run.peak:.0f} MiB")


def _print_rates(
    name: str, source: Path, folder: Path, work: Path, workers: int, repeats: int
) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    tars, unchecked, checked = [], [], []
    for _ in range(repeats):
        tars.append(_tar(folder, work / "floor.tar").seconds)
        unchecked.append(_shard(source, work / "out", workers, check=False).seconds)
        checked.append(_shard(source, work / "out", workers, check=True).seconds)
    tar, plain, full = (len(files) / statistics.median(all_) for all_ in (tars, unchecked, checked))
    decode = statistics.median(_decode_rate(files[:_DECODED]) for _ in range(repeats)) * workers
    print(
        f"| {name} | {len(files):,} | {workers} | {tar:,.0f} | {plain:,.0f} | {plain / tar:.2f} | "
        f"{decode:,.0f} | {full:,.0f} | {full / decode:.2f} |"
    )


def _shard(source: Path, folder: Path, workers: int, *, check: bool) -> Run:
    command = [sys.executable, "-m", "data_prep", "shard", str(source), str(folder)]
    command += ["--workers", str(workers), *([] if check else ["--no-check"])]
    return _measure(command, lambda: _remove(folder))


def _print_first_shard(source: Path, work: Path, repeats: int) -> None:
    if not source.exists():
        _draw_tiny(source)
    reports = work / "out" / ".partial"
    print("| order | first shard, s | peak memory until then, MiB |")
    print("|---|---|---|")
    for name, options in _ORDERS:
        command = [sys.executable, "-m", "data_prep", "shard", str(source), str(work / "out")]
        command += ["--workers", "1", "--no-check", "--samples-per-shard", "1000", *options]

        runs = [
            _measure(
                command,
                lambda: shutil.rmtree(work / "out"),
                lambda: any(reports.glob("shard-*.report.json")),
            )
            for _ in range(repeats)
        ]
        first = statistics.median(run.seconds for run in runs)
        print(f"| {name} | {first:.1f} | {max(run.peak for run in runs):.0f} |")


def _draw_tiny(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for number in range(_TINY):
        path = folder / f"{number // _TINY_A_FOLDER:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def _tar(folder: Path, path: Path) -> Run:
    # To a file: tar does not read its input when it writes to /dev/null.
    return _measure(["tar", "cf", str(path), str(folder)], path.unlink)


def _measure(
    command: list[str], clean: Callable[[], None], enough: Callable[[], bool] = lambda: False
) -> Run:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        peak = 0.0
        watched = psutil.Process(process.pid)
        stopped = False
        while process.poll() is None and not stopped:
            peak = max(peak, _memory(watched))
            stopped = enough()
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if stopped:
            process.kill()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    if process.returncode and not stopped:
        raise RuntimeError(f"{command} failed: {errors}")
    clean()
    return Run(seconds=seconds, peak=peak)


def _memory(process: psutil.Process) -> float:
    try:
        family = [process, *process.children(recursive=True)]
        return float(sum(each.memory_info().rss for each in family)) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def _decode_rate(paths: list[Path]) -> float:
    data = [path.read_bytes() for path in paths]
    started = time.perf_counter()
    for each in data:
        Image.open(io.BytesIO(each)).load()
    return len(data) / (time.perf_counter() - started)


def _unpack(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def _repeat(path: Path, folder: Path, count: int) -> Path:
    """Write the images of a zip repeatedly, under new names, until there are `count`."""
    with zipfile.ZipFile(path) as archive:
        images = [archive.read(name) for name in archive.namelist() if not name.endswith("/")]
    for number in range(count):
        target = folder / f"{number // 1000}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(images[number % len(images)])
    return folder


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
