"""`simmim pretrain` with an injected fault: `train_faulty.py FAULT pretrain --config …`.

FAULT is `loss=NAME,NAME…` (the loss of these samples is non-finite, its gradient finite),
`gradient=NAME,…` (the opposite), `hang=RANK@STEP` or `fail=RANK@STEP` (the rank sleeps, or raises,
instead of computing its loss of this step).
"""

import os
import sys
import time

import torch
from torch import Tensor

import simmim.cli
import simmim.tasks.pretrain.stage
from simmim.data.datasets.mixture import Shards
from simmim.data.loader.batch import Batch
from simmim.tasks.pretrain.model import EncoderBuilder, build_swinv2
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainModule, PretrainStage


class FaultyModule(PretrainModule):
    """A module that corrupts its loss, hangs or raises."""

    shards: Shards
    fault: str
    steps = 0

    def forward(self, batch: Batch) -> Tensor:
        kind, _, where = self.fault.partition("=")
        places = where.split(",")
        self.steps += self.training
        here = f"{os.environ.get('RANK', '0')}@{self.steps}"
        if kind == "hang" and self.training and here in places:
            time.sleep(600)
        if kind == "fail" and self.training and here in places:
            raise ValueError("the fault that was asked for")
        loss = super().forward(batch)
        names = {self.shards.name(shard, sample) for _, shard, sample in batch.addresses.tolist()}
        if not names & set(places):
            return loss
        if kind == "loss":
            return loss + torch.inf
        return loss + (0 * loss).sqrt()  # the slope of the root at 0 is infinite


def faulty(fault: str) -> type[PretrainStage]:
    """Return a stage with this fault."""

    class FaultyStage(PretrainStage):
        def __init__(self, recipe: PretrainRecipe, encoder: EncoderBuilder = build_swinv2) -> None:
            super().__init__(recipe, encoder)
            self.module = FaultyModule(self.model, self.recipe.data, seed=self.recipe.training.seed)
            self.module.fault, self.module.shards = fault, self.training_shards

    return FaultyStage


if __name__ == "__main__":
    simmim.tasks.pretrain.stage.PretrainStage = faulty(sys.argv.pop(1))  # type: ignore[attr-defined, misc]
    simmim.cli.run()
