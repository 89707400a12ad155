"""RealNVP (Dinh et al., arXiv 1605.08803): RLE's learned density G of the normalised residual; and the scale σ̂.

Sizes, masks and initialisation follow the code of RLE (Li et al., arXiv 2107.11291), which has D = 2 and 3; other D are
ours. Used for training and log-likelihoods, not for prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SCALE_FLOOR = 1e-3  # lower bound on σ̂, units of the diffusion: bounds the weight of a residual


class RealNVP(nn.Module):
    """Invertible map between x and a standard normal latent, so that the density of x is known.

    Each coupling keeps the coordinates whose mask is 1 and applies x = z exp(s) + t to the others; s, within ±1, and t
    are functions of the kept ones. The first mask keeps the last ⌊D/2⌋ coordinates, the second the others, alternating:
    [0, 1], [1, 0] for D = 2 and [0, 0, 1], [1, 1, 0] for D = 3, as in RLE's code. For D = 1 the map is affine, and G a
    normal density of learned mean and width.

    Runs in the precision of the weights even under autocast.
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
        """Latent to x: maps a standard normal sample to a sample of G."""
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
        """x to latent."""
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
        """Change of variables: the latent's log-density plus log |det ∂latent/∂x|."""
        latent, log_determinant = self.inverse(x)
        return log_determinant - 0.5 * latent.square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)

    def _coupling(self, index: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # each (..., D)
        mask = self.masks[index]
        kept = values * mask
        return kept, self.scale_nets[index](kept) * (1 - mask), self.shift_nets[index](kept) * (1 - mask)


def scale_of(
    raw: Tensor,  # (...) a linear layer's output
) -> Tensor:  # (...) σ̂, SCALE_FLOOR..1, float32
    """RLE's sigmoid with a lower bound (ours). A clamp would have no gradient below the bound."""
    raw = raw if raw.dtype == torch.float64 else raw.float()
    return SCALE_FLOOR + (1 - SCALE_FLOOR) * raw.sigmoid()


def _network(dim: int, hidden: int, *last: nn.Module) -> nn.Sequential:
    """Initialised near zero, so that G starts close to a standard normal."""
    linear = [nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight, gain=0.01)
    first, second, third = linear
    return nn.Sequential(first, nn.LeakyReLU(inplace=True), second, nn.LeakyReLU(inplace=True), third, *last)
