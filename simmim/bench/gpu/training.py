"""Trainings by the real command, in processes of their own: killed, resumed, and on two devices.

They need all of the pipeline; on a machine that lacks a package of it they are skipped.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from simmim.bench.gpu.cells import CheckFailed, Skipped, Values
from simmim.bench.gpu.scale import Scale
from simmim.environment import process_environment

PIPELINE = (
    "PIL",
    "accelerate",
    "annotated_types",
    "braceexpand",
    "cyclopts",
    "fsspec",
    "psutil",
    "pydantic",
    "simplejpeg",
    "tqdm",
    "webdataset",
    "yaml",
)
"""What training imports, or declares, besides what the encoder does."""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` with jobs/accelerate/fsdp2.yaml asks ranks for."""
LOST = 76
"""Exit code of a training that lost a rank."""
SECONDS_AFTER_A_LOSS = 60.0
PATIENCE = 140.0
"""Seconds that a training may take."""
LOSS_TOLERANCE = 1e-3
"""Largest relative difference of the losses of one training on one device and on several."""


def missing_packages() -> list[str]:
    """Return the packages of the pipeline that this machine lacks."""
    return [name for name in PIPELINE if not is_installed(name)]


def is_installed(name: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def require_pipeline() -> None:
    """Check that this machine has all of the pipeline.

    Raises:
        Skipped: it lacks packages; names them.
    """
    missing = missing_packages()
    if missing:
        raise Skipped(f"training needs packages that are missing here: {', '.join(missing)}")


def check_resuming(scale: Scale) -> Values:
    """Kill a training after its first checkpoint, resume it, and look at its losses."""
    require_pipeline()
    with tempfile.TemporaryDirectory() as place:
        command = training_command(Path(place), scale, scale.training_steps)
        run = Path(place) / "run"
        with started(command, scale) as training:
            wait_for_checkpoint(training, run)
        killed_after = len(losses_of(run))
        with started([*command, "--resume", "auto"], scale) as training:
            training.finish()
        losses = losses_of(run)
    steps = scale.training_steps
    found = {"steps": steps, "killed after": killed_after, "first loss": losses.get(1)}
    found |= {"last loss": losses.get(steps)}
    if sorted(losses) != list(range(1, steps + 1)):
        raise CheckFailed(f"{len(losses)} of {steps} steps are logged", found)
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise CheckFailed("a loss is not finite", found)
    part = steps // 4
    if mean_loss(losses, steps - part, steps) >= mean_loss(losses, 0, part):
        raise CheckFailed("the loss does not fall", found)
    return found


def mean_loss(losses: Mapping[int, float], after: int, last: int) -> float:
    """Return the mean loss of the steps after one, to the last of them."""
    return sum(losses[step] for step in range(after + 1, last + 1)) / (last - after)


def check_ranks(scale: Scale) -> Values:
    """Train on one device, under DDP and under FSDP2: the losses have to be the same."""
    require_devices(scale)
    steps, found, losses = 8, {}, {}
    ways: dict[str, tuple[int, dict[str, str]]] = {
        "one device": (1, {}),
        "DDP": (scale.ranks, {}),
        "FSDP2": (scale.ranks, FSDP2),
    }
    for name, (ranks, environment) in ways.items():
        with tempfile.TemporaryDirectory() as place:
            command = training_command(Path(place), scale, steps, ranks=ranks, precision="fp32")
            with started(command, scale, **environment) as training:
                training.finish()
            losses[name] = losses_of(Path(place) / "run")
    alone = losses["one device"]
    for name in ("DDP", "FSDP2"):
        apart = max(
            abs(losses[name].get(step, math.nan) / alone[step] - 1) for step in range(1, steps + 1)
        )
        found[name] = apart
        if not apart <= LOSS_TOLERANCE:
            raise CheckFailed(f"losses under {name} differ by {apart:.2g} of one device's", found)
    return found


def check_lost_rank(scale: Scale) -> Values:
    """Kill a rank of a training: the other has to end within a minute."""
    require_devices(scale)
    import psutil  # noqa: PLC0415 (of the pipeline, which is there)

    with tempfile.TemporaryDirectory() as place:
        command = training_command(Path(place), scale, 10**6, ranks=scale.ranks)
        with started(command, scale) as training:
            wait_for_checkpoint(training, Path(place) / "run")
            last = str(scale.ranks - 1)
            for child in psutil.Process(training.process.pid).children(recursive=True):
                if child.environ().get("RANK") == last:
                    child.kill()
                    break
            began = time.monotonic()
            try:
                code = training.process.wait(SECONDS_AFTER_A_LOSS)
            except subprocess.TimeoutExpired:
                raise CheckFailed("a training that lost a rank went on for a minute") from None
    found = {"seconds": round(time.monotonic() - began, 1), "exit code": code}
    if code != LOST:
        raise CheckFailed(f"the exit code is {code}, not {LOST}", found)
    return found


def require_devices(scale: Scale) -> None:
    """Check that there are devices for all ranks.

    Raises:
        Skipped: there are too few, or packages are missing.
    """
    devices = torch.cuda.device_count()
    if scale.device == "cuda" and devices < scale.ranks:
        raise Skipped(f"needs {scale.ranks} devices, and there is {devices}")
    if scale.ranks < 2:
        raise Skipped("needs 2 devices")
    require_pipeline()


def training_command(
    place: Path, scale: Scale, steps: int, *, ranks: int = 1, precision: str | None = None
) -> list[str]:
    """Write images and a recipe into a folder, and return the command that trains with them."""
    draw_images(place / "images", 64, side=24)
    recipe = {
        "task": "pretrain",
        "encoder": {
            "variant": "tiny",
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
        },
        "data": {"shards": str(place / "images"), "image_size": 16, "workers": 0},
        "mask": {"cell": 4},
        "training": {
            "batch_size": 8,
            "steps": steps,
            "log_every": 1,
            "checkpoint_every": 10,
            "look_every": 10**9,
            "seed": scale.seed,
            "precision": precision or ("bf16" if scale.device == "cuda" else "fp32"),
            "optimizer": {"lr": 3e-3},
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML, too
    launcher = ["-m", "simmim"]
    if ranks > 1:
        launcher = ["-m", "simmim.launch", "torchrun", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks), "-m", "simmim"]
    options = ["--config", str(place / "recipe.yaml"), "--folder", str(place / "run")]
    return [sys.executable, *launcher, "pretrain", *options]


def draw_images(folder: Path, number: int, *, side: int, ending: str = "png") -> None:
    """Write images with something to learn: smooth colours."""
    from PIL import Image  # noqa: PLC0415 (of the pipeline)

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for place in range(number):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        image = coarse.resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{place:05d}.{ending}")


@dataclass(frozen=True)
class Training:
    """A training in a process of its own."""

    process: "subprocess.Popen[bytes]"
    errors: IO[str]
    """What it writes to standard error: a file, since nobody reads a pipe meanwhile."""

    def finish(self) -> str:
        """Wait for its end, and return what it wrote to standard error.

        Raises:
            CheckFailed: it failed; the message has its last lines.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"a training took more than {PATIENCE:.0f} s") from None
        self.errors.seek(0)
        errors = self.errors.read()
        if code:
            last = "\n".join(errors.strip().splitlines()[-8:])
            raise CheckFailed(f"a training ended with exit code {code}: {last}")
        return errors


@contextmanager
def started(command: list[str], scale: Scale, **environment: str) -> Iterator[Training]:
    """Start a training in its own session, and kill what is left of it at the end."""
    hidden = {} if scale.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            env=dict(process_environment().variables) | hidden | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            yield Training(process, errors)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_checkpoint(training: Training, run: Path) -> None:
    """Wait until a training has written a checkpoint.

    Raises:
        CheckFailed: it ended before, or took too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not list(run.glob("checkpoints/step-*")):
        if training.process.poll() is not None:
            training.finish()
            raise CheckFailed("a training ended before it could be killed")
        if time.monotonic() > deadline:
            raise CheckFailed(f"a training wrote no checkpoint in {PATIENCE:.0f} s")
        time.sleep(0.005)


def losses_of(run: Path) -> dict[int, float]:
    """Return the logged losses of a run by their steps."""
    lines = [json.loads(line) for line in metric_lines(run)]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def metric_lines(run: Path) -> list[str]:
    """Return the complete lines of a run's metrics."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def measure_loader(scale: Scale) -> dict[str, Any]:
    """Measure the images per second of training on images of its own, and its wait for data.

    Raises:
        Skipped: packages are missing, or this is a dry run.
    """
    require_pipeline()
    if not scale.loader_steps:
        raise Skipped("a dry run trains only once")
    size, steps, batch = scale.steps[0], scale.loader_steps, scale.loader_batch
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = training_command(place, scale, steps)
        recipe = json.loads((place / "recipe.yaml").read_text())
        draw_images(place / "jpeg", 8 * batch, side=400, ending="jpg")
        recipe["encoder"] = {"variant": size.variant, "window_size": size.window_size}
        recipe["encoder"] |= {name: to_list(value) for name, value in scale.overrides.items()}
        recipe["mask"] = {"cell": 32}
        workers = min(16, os.cpu_count() or 1) if scale.device == "cuda" else 0
        recipe["data"] = {
            "shards": str(place / "jpeg"),
            "image_size": size.image_size,
            "workers": workers,
        }
        recipe["training"] |= {"batch_size": batch, "log_every": max(1, steps // 4)}
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        with started(command, scale) as training:
            training.finish()
        lines = [json.loads(line) for line in metric_lines(place / "run")]
    last = [line for line in lines if "images_per_second" in line][-1]
    return {
        "step": str(size),
        "batch": batch,
        "workers": workers,
        "images per second": last["images_per_second"],
        "share of the time waiting for data": last["data_wait"],
    }


def to_list(value: Any) -> Any:
    """Return a tuple as a list, which recipes take."""
    return list(value) if isinstance(value, tuple) else value
