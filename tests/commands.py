"""The commands that documents show, and whether `simmim` understands them; shared by tests."""

import re
from collections.abc import Sequence

import simmim.cli
from data_prep.format.command_line import parse_arguments
from simmim.recipe import load
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.probe.recipe import ProbeRecipe


def bash_lines(markdown: str) -> list[str]:
    """Return the lines of a document's bash blocks, joined where they go on, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", markdown, re.DOTALL)
    lines = [line.split("   #")[0] for block in blocks for line in block.splitlines()]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line for line in joined.splitlines() if line.strip()]


def check_simmim(words: Sequence[str]) -> None:
    """Parse the arguments of `simmim`, and load the recipe they name."""
    command, given, _ = parse_arguments(simmim.cli.app, words)
    values = dict(given.arguments)
    options, overrides = values.get("options"), values.get("overrides", ())
    match command.__name__:
        case "pretrain" | "finetune" as name:
            load(simmim.cli.task_of(name, options.config).recipe, options.config, overrides)
        case "probe":
            load(ProbeRecipe, options.config, overrides)
        case "labels":
            init = ["--init", options.init, *overrides]
            load(ClassificationRecipe, options.config, init)
        case "doctor":
            load(PretrainRecipe, options.config, overrides)
