"""The machine and the versions that a run is trained with, for whoever reads its figures later."""

import json
import platform
import sys
from typing import Any

import accelerate
import psutil
import torch
from accelerate import Accelerator

from data_prep.format.atomic import atomic_write_text
from simmim.engine.monitor.utilisation import Peak
from simmim.engine.run import RunFolder


def environment(accelerator: Accelerator, peak: Peak) -> dict[str, Any]:
    """Describe this machine, its devices and what is installed, without names or paths."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device.type} {name}".strip(),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "peak_tflops": round(peak.flops / 1e12, 2),
        "peak_from": peak.source,
        "command": " ".join(["simmim", *sys.argv[1:]]),
    }


def write_environment(run: RunFolder, accelerator: Accelerator, peak: Peak) -> None:
    """Write `environment.json` into a run; a resumed one describes where it goes on."""
    text = json.dumps(environment(accelerator, peak), indent=1) + "\n"
    atomic_write_text(run.environment, text)
