"""A new text's virtual tokens: those that the encoder would make in the run, bit by bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.unsharded_base import load_shard
from tests.family_bases import save_family
from tests.unit.run_folder import save_checkpoint
from trainer import config
from trainer.checkpointing import checkpoint
from trainer.checkpointing.state_tensors import split_tensors
from trainer.commands.export import export_text
from trainer.commands.prepare import prepare
from trainer.config import Base, RunConfig
from trainer.config.ranking import score_key
from trainer.model.checkpoint_files import open_base
from trainer.model.embedding_lookup import read_token_embeddings
from trainer.model.fingerprint import fingerprint_base
from trainer.prompts.bank import Bank
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.training.prompt_optimizer import make_optimizer

TINY = config.resolve_path("examples/tiny_base")
#: After each step: (index of the prompt: validation loss); the best of both prompts of the share
#: together is the own best of neither.
BEST = 2
LOSSES: list[dict[int, float | None]] = [
    {1: 0.5, 2: 3.0, 3: 2.0},
    {1: 1.0, 2: 1.5, 3: 1.0},
    {1: float("nan"), 2: 0.1, 3: float("inf")},
]
TEXT, OTHER = "Is the patient in danger?", "What does the lion eat?"


@pytest.mark.parametrize("case", ["llama", "gemma", "gpt2", "opt-projected"])
@pytest.mark.parametrize("stored", ["keep", "int8"])
def test_embeddings_are_those_of_the_loaded_base(tmp_path: Path, case: str, stored: str) -> None:
    folder, settings = save_family(tmp_path, case), {"embeddings": stored, "head": stored}
    base, *_ = load_shard(folder, **settings)
    check_words(folder, base(torch.tensor([7, 3, 7, 20]), []).embeddings_TH, **settings)


def test_embeddings_of_a_prepared_int8_base(tmp_path: Path) -> None:
    settings = Base.model_validate({"model": str(TINY), "embeddings": "int8", "head": "int8"})
    prepare(settings, tmp_path / "int8", Console(io.StringIO(), io.StringIO()))
    base, *_ = load_shard(tmp_path / "int8")
    check_words(tmp_path / "int8", base(torch.tensor([7, 3, 7, 20]), []).embeddings_TH)


def check_words(folder: Path, expected_nH: torch.Tensor, **settings: str) -> None:
    base = Base.model_validate({"model": str(folder), **settings})
    found_nH = read_token_embeddings(open_base(base), base, torch.float32, [7, 3, 7, 20])
    assert torch.equal(found_nH, expected_nH)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bank]:
    """The output folder of a run of two shared encoders and one of its own, and its bank."""
    folder = tmp_path_factory.mktemp("run")
    reader = {"method": "p_tuning", "encoder": "text", "num_virtual_tokens": 4, "task": "t"}
    prompts: list[dict[str, Any]] = [
        {"name": "plain", "task": "t"},
        {"name": "one", **reader, "share": "reader", "init": {"text": TEXT}},
        {"name": "two", **reader, "share": "reader", "init": {"text": OTHER}},
        {"name": "own", **reader, "encoder_hidden_size": 8, "ema": 0.5, "init": {"text": TEXT}},
    ]
    settings = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "base": {"model": str(TINY)},
            "tasks": [{"name": "t", "train": "t.jsonl", "input": "{text}", "target": "{label}"}],
            "prompts": prompts,
            "training": {"steps": 4},
        }
    )
    files = open_base(settings.base)
    base, *_ = load_shard(TINY)
    bank = Bank(
        settings,
        lambda ids: base(torch.tensor(ids), []).embeddings_TH,
        files.tokenizer,
        files.config.vocab_size,
        base.hidden_size,
        torch.device("cpu"),
        make_optimizer=make_optimizer,
    )
    for step, losses in enumerate(LOSSES, 1):
        keys = {k: score_key({"validation_loss": loss}, "loss") for k, loss in losses.items()}
        bank.update([made.tensor.detach().cos() for made in bank.virtual_tokens()])
        bank.keep_best_encoders(step, keys)
        if step == BEST:
            for i in (1, 2, 3):
                bank.keep_best(i)
    bank.load_state_dict(bank.state_dict())  # the best is part of what a resumed run goes on with
    # A prompt that has stopped counts with its last loss, 1.5.
    bank.keep_best_encoders(5, {1: (1.1, 1.1)})
    tensors, prompts = split_tensors(bank.state_dict())
    state = {"identity": fingerprint_base(files), "bank": {"prompts": prompts}}
    save_checkpoint(folder / "checkpoints", 3, tensors, state, 1)
    atomic_io.write(folder / "run.yaml", config.dump(settings))
    atomic_io.write_json(folder / "environment.json", {"dtype": "float32"})
    return folder, bank


def export(run_dir: Path, out: Path, encoder: str, text: str, output: str = "") -> torch.Tensor:
    console = Console(shown := io.StringIO(), io.StringIO())
    export_text(run_dir, out, encoder, text, console)
    assert output in " ".join(shown.getvalue().split())
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize(
    ("encoder", "text", "prompt"),
    [("reader", TEXT, 1), ("reader", OTHER, 2), ("two", TEXT, 1), ("own", TEXT, 3)],
)
def test_exporting_a_text_of_the_run_gives_its_best_prompt(
    run: tuple[Path, Bank], tmp_path: Path, encoder: str, text: str, prompt: int
) -> None:
    folder, bank = run
    made_PH = export(folder, tmp_path / "out", encoder, text, "the encoder of step 2, its best")
    assert torch.equal(made_PH, bank.best(prompt).tensor)
    assert not torch.equal(made_PH, bank.snapshot(prompt).tensor), "the newest is another"


def test_before_a_validation_the_newest_prompt_is_exported(
    run: tuple[Path, Bank], tmp_path: Path
) -> None:
    folder, bank = run
    saved = checkpoint.newest(folder / "checkpoints")
    assert saved is not None
    tensors = {k: v for k, v in saved.tensors.items() if "/reader/" not in k}
    save_checkpoint(tmp_path / "checkpoints", 4, tensors, saved.state, 1)
    for name in ("run.yaml", "environment.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for encoder, prompt in (("reader", 1), ("own", 3)):
        made_PH = export(tmp_path, tmp_path / encoder, encoder, TEXT, "step 4, the newest")
        assert torch.equal(made_PH, bank.snapshot(prompt).tensor)


def test_peft_reads_a_new_text(run: tuple[Path, Bank], tmp_path: Path) -> None:
    folder, bank = run
    made_PH = export(folder, tmp_path / "out", "reader", "-- What now?")
    assert not any(torch.equal(made_PH, bank.snapshot(i).tensor) for i in (1, 2))
    base = AutoModelForCausalLM.from_pretrained(TINY)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        joined = torch.cat([made_PH[None], base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=joined).logits
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_mistakes_are_reported_with_their_remedy(run: tuple[Path, Bank], tmp_path: Path) -> None:
    folder, _ = run
    with pytest.raises(BadInput, match=r"no text encoder 'plain'; known: reader, own"):
        export(folder, tmp_path / "out", "plain", TEXT)
    with pytest.raises(BadInput, match="'' has no tokens; give a text"):
        export(folder, tmp_path / "out", "own", "")
    with pytest.raises(BadInput, match="already exists; give a new folder"):
        export(folder, tmp_path, "own", TEXT)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(run: tuple[Path, Bank], tmp_path: Path) -> None:
    folder, _ = run
    other = save_family(tmp_path / "other", "llama")
    settings = config.load(folder / "run.yaml", [f"base.model={other}", "output_dir=x"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(config.dump(settings))
    (tmp_path / "run" / "checkpoints").symlink_to(folder / "checkpoints")
    with pytest.raises(BadInput, match=r"is not the base model of the run in"):
        export(tmp_path / "run", tmp_path / "out", "own", TEXT)
    (tmp_path / "run" / "checkpoints").unlink()
    with pytest.raises(BadInput, match="has no checkpoint yet; train the run first"):
        export(tmp_path / "run", tmp_path / "out", "own", TEXT)
