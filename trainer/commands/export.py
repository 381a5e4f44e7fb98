"""``python -m trainer.commands.export RUN_DIR OUT``, with one of two sets of options.

``--encoder NAME --text TEXT`` encodes a new text into virtual tokens with a trained text encoder.
Nothing is trained, and only the embeddings of the text's tokens are read from the base model.
``--prompt NAME --to TARGET`` is in ``export_prompt``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.saved_state import problem_of_encoders
from trainer.commands.export_prompt import export_prompt
from trainer.config import Prompt, RunConfig, load_output
from trainer.model.checkpoint_files import BaseFiles, open_base, portable_name
from trainer.model.embedding_lookup import read_token_embeddings
from trainer.model.fingerprint import fingerprint_base
from trainer.model.per_layer_inputs import id_rules
from trainer.prompts.initializers import Vocabulary, embed_text
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.prompts.text_encoder import TextReader
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object
from trainer.training.prompt_optimizer import AVERAGE


def find_encoder(config: RunConfig, name: str) -> Prompt:
    """Return the prompt under whose name checkpoints store the encoder.

    Args:
        name: name of a shared encoder, whose first prompt is returned, or of a prompt with
            ``encoder: text``.

    Raises:
        BadInput: the run has no such encoder.
    """
    prompts = [prompt for prompt in config.prompts if prompt.encoder_name == "text"]
    named = next((prompt for prompt in prompts if name in (prompt.share, prompt.name)), None)
    if named is None:
        known = list(dict.fromkeys(prompt.share or prompt.name for prompt in prompts))
        hint = f"known: {', '.join(known)}" if known else "none of its prompts has encoder: text"
        raise BadInput(
            f"--encoder: {config.output_dir} has no text encoder {name!r}"
            f"{did_you_mean(name, known)}; {hint}"
        )
    if named.share is None:
        return named
    return next(prompt for prompt in prompts if prompt.share == named.share)


@torch.no_grad()
def encode(
    config: RunConfig, prompt: Prompt, text: str, files: BaseFiles
) -> tuple[VirtualTokens, str]:
    """Encode a text with the encoder of the best validation step, or of the newest checkpoint.

    Returns:
        Virtual tokens [P, H], and a description of the encoder's step.

    Raises:
        BadInput: the run has no checkpoint, the base model is not the run's, or the text is empty.
    """
    folder = Path(config.output_dir)
    saved = checkpoint.newest(folder / CHECKPOINTS, problem_of=problem_of_encoders)
    if saved is None:
        raise BadInput(f"{folder}: has no checkpoint yet; train the run first")
    parts = fingerprint_base(files)
    if any(saved.state["identity"].get(part) != digest for part, digest in parts.items()):
        raise BadInput(
            f"base.model: {config.base.model!r} is not the base model of the run in {folder}; "
            "restore that model"
        )
    weights, step = _reader(saved, prompt.name)
    path = folder / "environment.json"
    dtype = getattr(torch, str(read_json_object(path).get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"{path}: dtype is not a compute type; restore the file, or train again")
    vocabulary = Vocabulary(
        lambda ids: read_token_embeddings(files, config.base, dtype, ids),
        files.tokenizer,
        files.config.vocab_size,
    )
    return VirtualTokens(TextReader.of(weights)(embed_text(text, vocabulary))), step


def _reader(saved: SavedCheckpoint, name: str) -> tuple[dict[str, Tensor], str]:
    def under(prefix: str) -> dict[str, Tensor]:
        tensors = saved.tensors.items()
        return {k.removeprefix(prefix): v for k, v in tensors if k.startswith(prefix)}

    best = under(f"{name}/reader/shared.")
    if best:
        step = saved.state["bank"]["prompts"][name]["reader"]["step"]
        return best, f"step {step}, its best validation"
    weights = under(f"{name}/encoder/shared.")
    if not weights:
        raise BadInput(f"{saved.path}: has no encoder of {name!r}; train the run again")
    for key in weights:  # as in validation: the average of the weights, if there is one
        average = f"{name}/optimizer/shared.{key}/{AVERAGE}"
        weights[key] = saved.tensors.get(average, weights[key])
    return weights, f"step {saved.step}, the newest checkpoint: there was no validation yet"


def export_text(run_dir: Path, out: Path, encoder: str, text: str, console: Console) -> None:
    """Encode a text and write the virtual tokens to ``out`` in PEFT's format.

    Raises:
        BadInput: ``out`` exists, or as ``find_encoder`` and ``encode``.
    """
    if out.exists():
        raise BadInput(f"{out}: already exists; give a new folder")
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
        rules=id_rules(files.config),
        description=f"Encoded from the text {text!r}, without training, by the encoder of {step}.",
    )
    console.print(
        f"{out}: {virtual_tokens.num_virtual_tokens} virtual tokens for {text!r}, from the encoder "
        f"of {step}, in PEFT's format"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="promptshard export")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    for option in ("--encoder", "--text", "--prompt", "--to", "--peft-type"):
        parser.add_argument(option)
    given = parser.parse_args()
    console = Console(sys.stdout, sys.stderr)
    try:
        if given.prompt is not None:
            export_prompt(
                *(given.run_dir, given.out, given.prompt, given.to, given.peft_type), console
            )
        else:
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
