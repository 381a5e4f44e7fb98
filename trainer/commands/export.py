"""Makes virtual tokens of a new text with a trained encoder: ``promptshard export RUN_DIR OUT
--encoder NAME --text TEXT`` runs ``python -m trainer.commands.export``.

Nothing is trained, and of the base only the embeddings of the text's tokens are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.saved_state import problem_of_encoders
from trainer.config import Prompt, RunConfig, load_output
from trainer.model.checkpoint_files import BaseFiles, open_base, portable_name
from trainer.model.embedding_lookup import read_token_embeddings
from trainer.model.fingerprint import fingerprint_base
from trainer.prompts.initializers import Vocabulary, words
from trainer.prompts.multitask import TextReader
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object
from trainer.training.prompt_optimizer import AVERAGE


def find_encoder(config: RunConfig, name: str) -> Prompt:
    """The prompt under which the state of an encoder stands: the first of a share, or itself.

    Args:
        name: of a share, or of a prompt with ``encoder: text``.

    Raises:
        BadInput: if the run has no such encoder.
    """
    readers = [prompt for prompt in config.prompts if prompt.encoder_name == "text"]
    found = next((prompt for prompt in readers if name in (prompt.share, prompt.name)), None)
    if found is None:
        known = list(dict.fromkeys(prompt.share or prompt.name for prompt in readers))
        what = f"known: {', '.join(known)}" if known else "none of its prompts has encoder: text"
        raise BadInput(
            f"--encoder: {config.output_dir} has no text encoder {name!r}"
            f"{did_you_mean(name, known)}; {what}"
        )
    if found.share is None:
        return found
    return next(prompt for prompt in readers if prompt.share == found.share)


@torch.no_grad()
def encode(
    config: RunConfig, prompt: Prompt, text: str, files: BaseFiles
) -> tuple[VirtualTokens, str]:
    """Virtual tokens [P, H] that a run's encoder makes of a text, and of which step it is.

    It is that of the best validation so far, or the newest where none was yet.

    Args:
        prompt: from ``find_encoder``.

    Raises:
        BadInput: if the run has no checkpoint, the base is not the run's, or the text is empty.
    """
    folder = Path(config.output_dir)
    saved = checkpoint.newest(folder / CHECKPOINTS, problem_of=problem_of_encoders)
    if saved is None:
        raise BadInput(f"{folder}: has no checkpoint yet; train the run first")
    parts = fingerprint_base(files)
    if any(saved.state["identity"].get(part) != digest for part, digest in parts.items()):
        raise BadInput(
            f"base.model: {config.base.model!r} is not the base that {folder} was trained over; "
            "give the run its own base"
        )
    weights, step = _reader(saved, prompt.name)
    reader = TextReader.of(weights)
    dtype = _dtype(folder / "environment.json")
    vocabulary = Vocabulary(
        lambda ids: read_token_embeddings(files, config.base, dtype, ids),
        files.tokenizer,
        files.config.vocab_size,
    )
    return VirtualTokens(reader(words(text, vocabulary))), step


def _dtype(path: Path) -> torch.dtype:
    """The compute type that a run wrote into its ``environment.json``."""
    dtype = getattr(torch, str(read_json_object(path).get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"{path}: dtype: names no compute type; restore it, or train the run again")
    return dtype


def _reader(saved: SavedCheckpoint, name: str) -> tuple[dict[str, Tensor], str]:
    """The weights to read with, by their own names, and of which step they are."""
    best = _under(f"{name}/reader/shared.", saved.tensors)
    if best:
        step = saved.state["bank"]["prompts"][name]["reader"]["step"]
        return best, f"step {step}, its best validation"
    weights = _under(f"{name}/encoder/shared.", saved.tensors)
    if not weights:
        raise BadInput(f"{saved.path}: has no encoder of {name!r}; train the run again")
    for key in weights:  # what is judged, where an average is kept
        average = f"{name}/optimizer/shared.{key}/{AVERAGE}"
        weights[key] = saved.tensors.get(average, weights[key])
    return weights, f"step {saved.step}, the newest checkpoint: there was no validation yet"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def export_text(run_dir: Path, out: Path, encoder: str, text: str, console: Console) -> None:
    """Write the PEFT adapter of a new text into ``out``, which must be new.

    Raises:
        BadInput: as ``find_encoder`` and ``encode``, or if ``out`` exists.
    """
    if out.exists():
        raise BadInput(f"{out}: is there already; give a new folder")
    config = load_output(run_dir)
    prompt = find_encoder(config, encoder)
    with console.downloading(config.base.model) as progress:
        files = open_base(config.base, progress=progress)
    virtual_tokens, step = encode(config, prompt, text, files)
    save_peft(
        out,
        virtual_tokens,
        portable_name(config.base),
        config.base.revision,
        num_layers=files.config.num_hidden_layers,
        num_attention_heads=files.config.num_attention_heads,
        description=f"Made without training, of the text {text!r}, by the encoder of {step}.",
    )
    console.print(
        f"{out}: {virtual_tokens.num_virtual_tokens} virtual tokens of {text!r}, by the encoder of "
        f"{step}; PEFT loads it"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="promptshard export")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--text", required=True)
    given = parser.parse_args()
    console = Console(sys.stdout, sys.stderr)
    try:
        export_text(given.run_dir, given.out, given.encoder, given.text, console)
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
        return EXIT_BAD_INPUT
    except OSError as error:
        console.error(f"{error.filename}: {error.strerror}")
        return EXIT_BAD_INPUT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
