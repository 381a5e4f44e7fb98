"""One target of ``promptshard export``: what it can express, and the function that writes files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.prompts.formats.exported_prompt import ExportedPrompt


@dataclass(frozen=True)
class Target:
    """A program that reads prompts.

    Attributes:
        title: name of the program.
        write: writes the files into an existing empty folder.
        takes_prefixes: reads keys and values per layer.
        reads_table: its script reads rows of the base's embedding table.
        takes_token_ids_only: makes the embeddings of the text itself.
        families: families that scale the embeddings of token ids, with whether the program
            multiplies all input embeddings by the factor, those of virtual tokens included. None:
            the values are not changed, so that any family is possible.
    """

    name: str
    title: str
    write: Callable[[ExportedPrompt, Path], None]
    takes_prefixes: bool = False
    reads_table: bool = False
    families: Mapping[str, bool] | None = field(default_factory=dict)

    def server_scales(self, prompt: ExportedPrompt) -> bool:
        """Whether the program multiplies all input embeddings by the factor of the base."""
        return bool((self.families or {}).get(prompt.model_type, False))

    def problems(self, prompt: ExportedPrompt) -> Iterator[str]:
        """Yield why the target cannot express a prompt, each with the remedy."""
        if prompt.is_prefix and not self.takes_prefixes:
            yield (
                f"{self.title} takes input embeddings, and {prompt.name!r} has keys and values for "
                "every layer (prefix_tuning); use --to peft, or train with method: prompt_tuning"
            )
            return
        if self.families is None:
            return
        if prompt.has_per_layer_inputs:
            yield (
                f"the layers of {prompt.model_type} also read token ids, which {self.title} does "
                "not take together with embeddings; use --to peft"
            )
        elif prompt.scale != 1.0 and prompt.model_type not in self.families:
            yield (
                f"{prompt.model_type} multiplies embeddings by {prompt.scale:g}; whether "
                f"{self.title} does so with embeddings that it gets is not known; use --to peft"
            )
        if self.reads_table and prompt.embedding_tensor is None:
            yield prompt.embedding_problem
