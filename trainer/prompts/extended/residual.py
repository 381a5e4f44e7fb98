"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.prompts.encoders import EncoderInputs, PromptEncoder, uniform


def build(inputs: EncoderInputs) -> ResidualEncoder:
    """Build the encoder; the bottleneck is a quarter of the hidden size by default."""
    size = inputs.prompt.encoder_hidden_size or max(1, inputs.hidden_size // 4)
    separate = inputs.prompt.residual_mlp == "separate"
    return ResidualEncoder(inputs.init(), size, inputs.generator, separate=separate)


class ResidualEncoder(PromptEncoder):
    """Virtual tokens plus the output of a bottleneck MLP on each of them.

    ``embedding + norm(up(relu(down(embedding))))`` with a layer norm (section 3 of the paper). The
    gain of the norm is initially 0 instead of 1, so that the initial prompt is ``init``: the output
    of a norm with gain 1 is often far larger than token embeddings.

    Shape letters: M MLPs of the encoder, N virtual tokens of each, E bottleneck size.

    Args:
        init_PH: initial virtual tokens, fp32.
        bottleneck_size: E.
        separate: an MLP and a norm for each virtual token (M = P) instead of one for all (M = 1).
    """

    def __init__(
        self,
        init_PH: Tensor,
        bottleneck_size: int,
        generator: torch.Generator,
        *,
        separate: bool = False,
    ) -> None:
        super().__init__(init_PH)
        num_virtual_tokens, hidden_size = init_PH.shape
        mlps = num_virtual_tokens if separate else 1
        self.embedding = nn.Parameter(init_PH.clone())

        def linear(ins: int, outs: int) -> tuple[nn.Parameter, nn.Parameter]:
            weight, bias = (uniform((mlps, n, outs), ins, generator) for n in (ins, 1))
            return nn.Parameter(weight), nn.Parameter(bias)

        self.down, self.down_bias = linear(hidden_size, bottleneck_size)
        self.up, self.up_bias = linear(bottleneck_size, hidden_size)
        self.norm_gain = nn.Parameter(torch.zeros(mlps, 1, hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(mlps, 1, hidden_size))

    def forward(self) -> Tensor:
        input_MNH = self.embedding.view(len(self.down), -1, self.embedding.shape[1])
        hidden_MNE = torch.baddbmm(self.down_bias, input_MNH, self.down).relu()
        output_MNH = torch.baddbmm(self.up_bias, hidden_MNE, self.up)
        normed_MNH = nn.functional.layer_norm(output_MNH, output_MNH.shape[2:])
        residual_MNH = normed_MNH * self.norm_gain + self.norm_bias
        return self.embedding + residual_MNH.view(self.shape)
