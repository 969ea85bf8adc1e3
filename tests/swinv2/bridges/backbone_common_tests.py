"""The backbone under the common tests of transformers; run by test_transformers_common.py.

It stands in a package with their test_modeling_common.py and test_backbone_common.py.
"""

import unittest
from typing import Any

from torch import nn

from swinv2.bridges.transformers_backbone import (
    SwinV2Backbone,
    SwinV2BackboneConfig,
    register_backbone,
)

from .test_backbone_common import BackboneTesterMixin
from .test_modeling_common import ModelTesterMixin, floats_tensor

register_backbone()


class BackboneWithLoss(SwinV2Backbone):
    """Their training tests take a loss; they skip backbones of transformers by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = sum(one.square().mean() for one in output.feature_maps)
        return output


class BackboneTester:
    """Sizes, and inputs of these."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2
    seq_length = hidden_size = 16  # rows and columns of the first hidden state, channels first

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = SwinV2BackboneConfig(
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=4,
            out_features=["stage1", "stage2"],
        )
        return config, {"pixel_values": floats_tensor([self.batch_size, 3, 32, 32])}


class SwinV2BackboneTest(ModelTesterMixin, BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (SwinV2Backbone,)
    config_class = SwinV2BackboneConfig
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = BackboneTester()

    def test_training(self) -> None:
        self.all_model_classes = (BackboneWithLoss,)
        super().test_training()

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.all_model_classes = (BackboneWithLoss,)
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_enable_input_require_grads_with_gradient_checkpointing(self) -> None:
        self.all_model_classes = (BackboneWithLoss,)
        super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """Theirs takes the first output for a tensor; that of a backbone is its maps."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.output_hidden_states = True
        output = SwinV2Backbone(config)(**inputs)
        output.hidden_states[0].retain_grad()
        output.feature_maps[-1].flatten()[0].backward()
        assert output.hidden_states[0].grad is not None

    def test_model_get_set_embeddings(self) -> None:
        """As their tests of image models: the embedding is of patches, not of a vocabulary."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = SwinV2Backbone(config)
        assert isinstance(model.get_input_embeddings(), nn.Module)
        other = SwinV2Backbone(config).get_input_embeddings()
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other
        assert model.get_output_embeddings() is None
