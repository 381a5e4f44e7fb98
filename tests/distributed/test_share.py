"""Prompts that share an encoder, on one rank and two, and the export of a new text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.test_run import one_process, promptshard, two_processes, write_run_file

TEXT = "What is wrong with this patient?"
READER = {"method": "p_tuning", "encoder": "text", "share": "reader", "num_virtual_tokens": 4}
LOW_RANK = {"encoder": "low_rank", "share": "low", "num_virtual_tokens": 4}
PROMPTS: list[dict[str, Any]] = [
    {"name": "text-1", **READER, "init": {"text": TEXT}},
    {"name": "text-2", **READER, "init": {"text": "What does this animal eat?"}},
    {"name": "low-1", **LOW_RANK},
    {"name": "low-2", **LOW_RANK},
    {"name": "lstm", "method": "p_tuning", "encoder": "lstm", "num_virtual_tokens": 4},
    {"name": "residual", "method": "p_tuning", "encoder": "residual", "init": "labels"},
]


def adapter(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_shared_encoders_agree_on_one_and_two_ranks_and_export_new_texts(tmp_path: Path) -> None:
    path = write_run_file(tmp_path)
    run = yaml.safe_load(path.read_text())
    run["prompts"] = [{"task": run["tasks"][0]["name"], **prompt} for prompt in PROMPTS]
    run["tasks"][0] |= {"max_rows": 40, "max_validation_rows": 8, "hand_written": []}
    run["training"] = {"steps": 2, "tokens_per_step": 128}
    path.write_text(yaml.safe_dump(run))
    done = one_process("trainer", str(path), f"output_dir={tmp_path / '1'}")
    assert done.returncode == 0, done.stdout + done.stderr
    done = two_processes(tmp_path, "trainer", str(path), f"output_dir={tmp_path / '2'}")
    assert done.returncode == 0, done.stdout
    for prompt in PROMPTS:
        one, two = (adapter(tmp_path / n / "prompts" / prompt["name"] / "last") for n in "12")
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=prompt["name"])

    text = ["--encoder", "reader", "--text", TEXT]
    done = promptshard("export", str(tmp_path / "2"), str(tmp_path / "out"), *text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from the encoder of step 2, its best validation" in " ".join(done.stdout.split())
    # Another number of threads, another order of sums.
    trained = adapter(tmp_path / "2/prompts/text-1/last")
    torch.testing.assert_close(adapter(tmp_path / "out"), trained, rtol=0, atol=1e-6)
