"""RealNVP: the learned density G of a normalised residual, by which RLE multiplies Laplace's; and the scale σ̂.

RealNVP: Dinh et al., arXiv 1605.08803. Sizes, masks and first weights are those of the authors' code of RLE (Li et al.,
arXiv 2107.11291), which has D = 2 and 3; every other D is ours. Training and log-likelihoods only: no mesh needs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SCALE_FLOOR = 1e-3  # of the unit of the points: no residual counts a million times, whatever a head says


class RealNVP(nn.Module):
    """An invertible map between x and a standard normal latent, so that the density of x is known.

    In each coupling the coordinates where its mask is 1 stay, and say by how much the others are stretched and moved:
    x = z exp(s) + t. The first mask keeps the last ⌊D/2⌋ coordinates, the second all but these, and so on in turn:
    [0, 1], [1, 0] for D = 2 and [0, 0, 1], [1, 1, 0] for D = 3, as in the authors' code. A stretch is within exp(±1).
    For D = 1 nothing can say anything of anything: the map is affine, and G a normal density of learned mean and width.

    Sharp residuals must not be rounded: inside autocast everything here still runs in the precision of the weights.
    """

    masks: Tensor

    def __init__(self, dim: int, couplings: int = 6, hidden: int = 64) -> None:
        super().__init__()
        if dim < 1 or couplings < 1:
            raise ValueError(f"a flow of {couplings} couplings in {dim} dimensions: at least 1 of each is needed")
        self.dim = dim
        last = torch.arange(dim) >= dim - dim // 2
        masks = [last if index % 2 == 0 else ~last for index in range(couplings)]
        self.register_buffer("masks", torch.stack(masks).float(), persistent=False)
        self.scale_nets = nn.ModuleList(_network(dim, hidden, nn.Tanh()) for _ in range(couplings))
        self.shift_nets = nn.ModuleList(_network(dim, hidden) for _ in range(couplings))

    def forward(
        self,
        latent: Tensor,  # (..., D)
    ) -> Tensor:  # (..., D) x
        """From the latent to x: of a standard normal latent it makes a sample of G."""
        with torch.autocast(latent.device.type, enabled=False):
            x = latent.to(self.masks.dtype)
            for index in range(len(self.masks)):
                kept, stretch, shift = self._coupling(index, x)
                x = kept + (1 - self.masks[index]) * (x * stretch.exp() + shift)
            return x

    def inverse(
        self,
        x: Tensor,  # (..., D)
    ) -> tuple[Tensor, Tensor]:  # latent (..., D); log |det ∂latent/∂x| (...)
        """From x back to the latent."""
        with torch.autocast(x.device.type, enabled=False):
            latent = x.to(self.masks.dtype)
            log_determinant = latent.new_zeros(latent.shape[:-1])
            for index in reversed(range(len(self.masks))):
                kept, stretch, shift = self._coupling(index, latent)
                latent = kept + (1 - self.masks[index]) * (latent - shift) * (-stretch).exp()
                log_determinant = log_determinant - stretch.sum(-1)
            return latent, log_determinant

    def log_prob(
        self,
        x: Tensor,  # (..., D)
    ) -> Tensor:  # (...) log G(x), nats
        """The latent's standard normal log-density, plus the logarithm of how volumes change on the way to it."""
        latent, log_determinant = self.inverse(x)
        return log_determinant - 0.5 * latent.square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)

    def _coupling(self, index: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # each (..., D)
        mask = self.masks[index]
        kept = values * mask
        return kept, self.scale_nets[index](kept) * (1 - mask), self.shift_nets[index](kept) * (1 - mask)


def scale_of(
    raw: Tensor,  # (...) a linear layer's output
) -> Tensor:  # (...) σ̂, SCALE_FLOOR..1, float32
    """The authors' sigmoid, kept off zero (ours). A clamp would have no gradient where σ̂ must grow again."""
    raw = raw if raw.dtype == torch.float64 else raw.float()
    return SCALE_FLOOR + (1 - SCALE_FLOOR) * raw.sigmoid()


def _network(dim: int, hidden: int, *last: nn.Module) -> nn.Sequential:
    """Almost zero at the start, so that G begins close to a standard normal."""
    linear = [nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight, gain=0.01)
    first, second, third = linear
    return nn.Sequential(first, nn.LeakyReLU(inplace=True), second, nn.LeakyReLU(inplace=True), third, *last)
