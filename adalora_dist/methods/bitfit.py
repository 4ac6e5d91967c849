"""BitFit (arXiv 2106.10199): the biases of a model are trained, in place, and nothing of its matrices."""

from __future__ import annotations

import torch
from torch import nn

from adalora_dist.backbones.parts import backbone_of
from adalora_dist.config.methods.bitfit import BitFitConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.protocol import Adapter, Method
from adalora_dist.methods.sites import matching_modules, train_in_place
from adalora_dist.methods.sizes import Sizes
from adalora_dist.sharding.tensors import full_numel, full_shape


class BitFit(Method):
    """No adapters. A head that ``train_modules`` names is trained in full; it is no part of the backbone."""

    config: BitFitConfig
    said = "Biases trained in place (BitFit, [arXiv 2106.10199](https://arxiv.org/abs/2106.10199))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Make the biases of the backbone trainable, and with ``train_norms`` the weights of its norms.

        Raises:
            UserError: there are none, or one of them is not float32.
        """
        train_in_place("bitfit", self._chosen(model))
        return []

    def sizes(self, model: nn.Module) -> Sizes:
        """There is one."""
        count = sum(full_numel(parameter) for _, parameter in self._chosen(model))
        return Sizes(lambda _: count, lambda _: {}, 1, "all that it is asked to train")

    def _chosen(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what is trained.

        Raises:
            UserError: there is nothing.
        """
        patterns = self.config.bias_modules
        named = None if "all" in patterns else matching_modules(model, patterns, "bias_modules")
        inside = {id(module) for module in backbone_of(model).modules()}
        leaves = ("bias", "weight") if self.config.train_norms else ("bias",)
        chosen = []
        for name, module in model.named_modules():
            if id(module) in inside and (named is None or any(_is_in(name, other) for other in named)):
                for leaf, parameter in module.named_parameters(recurse=False):
                    if leaf.endswith(leaves) and len(full_shape(parameter)) == 1:
                        chosen.append((f"{name}.{leaf}", parameter))
        if not chosen:
            where = "" if named is None else f" in {', '.join(patterns)}"
            also = "" if self.config.train_norms else ", set train_norms to train the weights of its norms,"
            raise UserError(f"method=bitfit: {type(model).__name__} has no biases{where}{also} or take another method")
        return chosen

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        """Vectors: a decay of them would be one of the pre-trained values, not of what was learnt."""
        return [p for p in model.parameters() if p.requires_grad and len(full_shape(p)) == 1]


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")
