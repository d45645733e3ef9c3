"""LoRA in which every chain of a batch has weights of its own."""

from __future__ import annotations

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear


class PerChainLinear(nn.Linear):
    """A linear layer without bias; its weight is [out, in], or [B, out, in] for inputs [B * m, ..., in].

    A chain's m rows stand together, as wherever a model folds frames or pixels into its batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return linear(input, self.weight)
        chains, rows = len(self.weight), len(input)
        assert rows % chains == 0, f"{rows} rows do not belong to {chains} chains"
        own = input.reshape(chains, -1, input.shape[-1]) @ self.weight.mT
        return own.view(*input.shape[:-1], -1)


def take_per_chain_weights(module: nn.Module) -> bool:
    """Let the LoRA layers inside take weights of each chain's own; False if some trained number is not of such layers.

    Those are LoRA on linear layers. What else PEFT has (convolutions, DoRA, biases, other adapters) has weights that
    only `torch.func.vmap` can run in one batch, at a higher price.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLinear) and not layer.lora_variant]
    pairs = [part for layer in layers for parts in (layer.lora_A, layer.lora_B) for part in parts.values()]
    taking = [part for part in pairs if type(part) is nn.Linear and part.bias is None]
    if {id(part.weight) for part in taking} != {id(one) for one in module.parameters() if one.requires_grad}:
        return False
    for part in taking:
        part.__class__ = PerChainLinear  # its weight stays where it is, under its name
    return True
