"""Feature-wise linear modulation of the speech embedding by the speaker embedding.

Source:
    Perez et al. (2018), "FiLM: Visual Reasoning with a General Conditioning Layer"; gamma here is bounded, 1 + tanh,
    and the last layer starts at zero, so that training starts from the identity.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Film(nn.Module):
    """gamma * h + beta with (gamma, beta) = MLP(s): two layers, ReLU, gamma = 1 + tanh.

    Args:
        speaker_dim: Width of the speaker embedding s.
        speech_dim: Width of the speech embedding h.
        hidden: Width in between.
    """

    def __init__(self, speaker_dim: int, speech_dim: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(speaker_dim, hidden)
        self.last = nn.Linear(hidden, 2 * speech_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, speech: Tensor, speaker: Tensor) -> Tensor:
        """The modulated speech embedding, (..., D) as `speech`."""
        gamma, beta = self.last(F.relu(self.hidden(speaker))).chunk(2, dim=-1)
        return (1 + gamma.tanh()) * speech + beta
