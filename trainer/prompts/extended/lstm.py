"""P-tuning with an LSTM, as PEFT's ``EncoderReparameterizationType.LSTM``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.prompts.encoders import EncoderInputs, HeadEncoder, uniform, uniform_linear


def build(inputs: EncoderInputs) -> LSTMEncoder:
    """Build the encoder. The output is fitted to ``init`` only if that is a trained prompt.

    The states of an untrained LSTM are all similar. The weights that map them to ``init`` are so
    large that the first updates undo them.
    """
    init = inputs.init()
    encoder = LSTMEncoder(init, inputs.encoder_hidden_size, inputs.generator)
    if inputs.prompt.init.from_ is not None:
        encoder.start_at(init)
    return encoder


class LSTMEncoder(HeadEncoder):
    """A bidirectional LSTM of two layers, E per direction, followed by an MLP."""

    def __init__(
        self, init_PH: Tensor, encoder_hidden_size: int, generator: torch.Generator
    ) -> None:
        super().__init__(init_PH)
        hidden_size = init_PH.shape[1]
        self.lstm_head = nn.LSTM(
            hidden_size,
            encoder_hidden_size,
            num_layers=2,
            bidirectional=True,
            batch_first=True,
            device="meta",
        ).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.lstm_head.parameters():
                parameter.copy_(uniform(parameter.shape, encoder_hidden_size, generator))
        self.mlp_head = nn.Sequential(
            uniform_linear(encoder_hidden_size * 2, encoder_hidden_size * 2, generator),
            nn.ReLU(),
            uniform_linear(encoder_hidden_size * 2, hidden_size, generator),
        )

    def head_input(self) -> Tensor:
        # cuDNN's LSTM uses TF32 and may sum in a different order on each rank.
        with torch.backends.cudnn.flags(enabled=False):
            states_PE: Tensor = self.lstm_head(self.embedding.weight)[0]
        return states_PE
