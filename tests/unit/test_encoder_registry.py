"""A toy encoder registered from outside: run file, training and export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.unit.test_bank import H, loss_gradients, make_bank, make_config
from trainer.config import encoders
from trainer.config.encoders import EncoderEntry, register_encoder
from trainer.prompts.encoders import EncoderInputs, PromptEncoder
from trainer.prompts.peft_adapter import load_peft, save_peft
from trainer.prompts.soft_prompt import VirtualTokens


class ToyEncoder(PromptEncoder):
    """Initial values plus one trained vector."""

    def __init__(self, inputs: EncoderInputs) -> None:
        super().__init__(init := inputs.init())
        self.register_buffer("start", init)
        self.shift = nn.Parameter(torch.zeros(init.shape[1]))

    def forward(self) -> Tensor:
        return self.get_buffer("start") + self.shift


def test_toy_encoder_trains_and_exports(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encoders, "_ENTRIES", dict(encoders._ENTRIES))
    register_encoder(EncoderEntry(method="p_tuning", name="toy", build=ToyEncoder))
    toy = {"name": "toy", "method": "p_tuning", "encoder": "toy", "num_virtual_tokens": 3}
    assert make_config([toy]).prompts[0].encoder_name == "toy"
    bank = make_bank([toy])
    before = bank.snapshot(0).tensor
    bank.update(loss_gradients(bank))
    assert not torch.equal(bank.snapshot(0).tensor, before)
    save_peft(tmp_path, bank.snapshot(0), "base", num_layers=2, num_attention_heads=2)
    assert isinstance(exported := load_peft(tmp_path), VirtualTokens)
    assert exported.tensor.shape == (3, H)
