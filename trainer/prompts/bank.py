"""The bank: all prompts of a run, trained together with the same results as when trained alone.

The prompts of one ``share`` have a common encoder and optimizer.

Ranks exchange only the sum of d loss / d virtual tokens. Each rank then backpropagates through its
own replica of every encoder and makes the same update. For ranks to stay bit-equal, every prompt
has its own generator and the global one is never used.

Shape letters: P virtual tokens, H hidden size, K prompts. For prefix tuning, [P, H] stands for keys
and values [P, layers, 2, key heads, head size].
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.config import Prompt, RunConfig
from trainer.config.ranking import ScoreKey
from trainer.prompts.init_search import InitScorer, search_starts
from trainer.prompts.initializers import Vocabulary
from trainer.prompts.parameter_groups import ParameterGroup, build_encoder, group_parameters
from trainer.prompts.regularization import perturbed
from trainer.prompts.resume_check import checkpoint_problems, resume_settings
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens, kind_of
from trainer.prompts.text_encoder import BestEncoder
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Optimizer(Protocol):
    """Interface of an optimizer, as implemented in ``trainer.training.prompt_optimizer``."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def updates(self) -> int: ...

    @property
    def averaged(self) -> Mapping[str, Tensor] | None: ...

    def step(self) -> float: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


#: (prompt, parameters by name, number of updates, ``PromptEncoder.scale()``) -> optimizer.
OptimizerFactory = Callable[[Prompt, Mapping[str, nn.Parameter], int, float | Tensor], Optimizer]


class Bank:
    """K prompts over one frozen base.

    Args:
        embed: token ids -> token embeddings [n, H]; may be a collective.
        device: of encoders and optimizers. Encoders are initialized on the CPU.
        make_optimizer: ``trainer.training.prompt_optimizer.make_optimizer``.
        past: token ids of a text -> its keys and values [n, layers, 2, key heads, head size]; may
            be a collective. Used by prefix tuning only.
        before: prompt of keys and values -> tokens of the text before it, whose keys and values
            are a fixed part of it.
        screen: scores candidates of ``init: auto``. None: draw tokens without a search.
        warn: called with warnings about initial values.

    Attributes:
        names: names of the prompts, in the order of the run file.
        lengths: P of each.
        active: False once a prompt has stopped.
    """

    def __init__(
        self,
        config: RunConfig,
        embed: Callable[[Sequence[int]], Tensor],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        hidden_size: int,
        device: torch.device,
        *,
        make_optimizer: OptimizerFactory,
        past: Callable[[Sequence[int]], Tensor] | None = None,
        before: Mapping[str, Sequence[int]] | None = None,
        screen: InitScorer | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        vocabulary = Vocabulary(embed, tokenizer, vocab_size, past, warn)
        self.names = [prompt.name for prompt in config.prompts]
        self.lengths = [prompt.num_virtual_tokens for prompt in config.prompts]
        self.active = [True] * len(self.names)
        self._prompts = config.prompts
        self._seeds = [config.prompt_seed(prompt) for prompt in config.prompts]
        self._device = device
        shared_modules: dict[str, nn.Module] = {}
        before = before or {}
        searched = {} if screen is None else search_starts(config, vocabulary, screen, before)
        self._encoders = [
            build_encoder(
                *(config, prompt, vocabulary, hidden_size, shared_modules, searched.get(i)),
                after=before.get(prompt.name, ()),
            ).to(device)
            for i, prompt in enumerate(config.prompts)
        ]
        #: Keys and values of the text before each prompt, which are not trained.
        self._fixed = [
            vocabulary.read(before[name]).to(device) if before.get(name) else None
            for name in self.names
        ]
        self._groups = group_parameters(config.prompts, self._encoders)
        by_prompt: dict[int, Optimizer] = {}
        for group in self._groups:
            prompt = config.prompts[group.members[0]]
            steps, scale = config.prompt_steps(prompt), self._encoders[group.members[0]].scale()
            optimizer = make_optimizer(prompt, group.parameters, steps, scale)
            by_prompt |= dict.fromkeys(group.members, optimizer)
        self._optimizers = [by_prompt[i] for i in range(len(self.names))]
        #: First member of a group with text encoders -> the group's best weights.
        self._best_encoders = {
            i: BestEncoder(partial(self._judged_parameters, i))
            for i in (group.members[0] for group in self._groups)
            if self._encoders[i].keeps_best_weights
        }
        #: Frozen values of stopped prompts of a share, whose encoder other prompts still train.
        self._stopped: list[Tensor | None] = [None] * len(self.names)
        self._best: list[Tensor | None] = [None] * len(self.names)
        self._outputs: list[SoftPrompt | None] = [None] * len(self.names)
        self._kinds = [kind_of(prompt.entry) for prompt in config.prompts]
        for kind, encoder in zip(self._kinds, self._encoders, strict=True):
            assert kind is not VirtualTokens or encoder.shape[1] == hidden_size, encoder.shape

    def __len__(self) -> int:
        return len(self.names)

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each prompt's next update."""
        return [optimizer.learning_rate for optimizer in self._optimizers]

    def virtual_tokens(self) -> list[SoftPrompt]:
        """Return the fp32 values of every prompt, on the device.

        With gradients enabled, active prompts have their noise and dropout for the next training
        step, and a graph for ``update``. Encoders run once per update: until then, further calls
        return the same tensors. Do not run ``loss.backward()`` through them: detach them, or use
        ``torch.autograd.grad`` with respect to them.

        Otherwise, and for stopped prompts, as ``judged``.
        """
        return [self._output(i) for i in range(len(self))]

    def judged(self) -> list[SoftPrompt]:
        """Return every prompt as validated and exported: averaged with ``ema``, no noise."""
        with torch.no_grad():
            return self.virtual_tokens()

    def _output(self, i: int) -> SoftPrompt:
        output = self._outputs[i]
        if not self.active[i]:  # its encoder runs once more, and the output is kept
            if output is None:
                output = self._outputs[i] = self._kinds[i](self._folded(i))
            return output
        if not torch.is_grad_enabled():
            return self._kinds[i](self._folded(i))
        if output is None:
            prompt, update = self._prompts[i], self._optimizers[i].updates
            trained = perturbed(
                self._kinds[i](self._encoders[i]()),
                self._seeds[i],
                update,
                noise=prompt.noise,
                dropout=prompt.dropout,
            )
            output = self._outputs[i] = self._kinds[i](self._with_fixed(i, trained.tensor))
        return output

    def _with_fixed(self, i: int, trained_PH: Tensor) -> Tensor:
        """Add the keys and values of the text before the prompt."""
        fixed_nH = self._fixed[i]
        return trained_PH if fixed_nH is None else torch.cat([fixed_nH, trained_PH])

    @torch.no_grad()
    def _folded(self, i: int) -> Tensor:
        """Run the encoder with its parameters or, with ``ema``, their average."""
        stopped_PH = self._stopped[i]
        if stopped_PH is not None:
            return stopped_PH.clone()
        folded_PH: Tensor
        if self._optimizers[i].averaged is None:
            folded_PH = self._encoders[i]()
        else:
            folded_PH = functional_call(self._encoders[i], self._judged_parameters(i), ())
        return self._with_fixed(i, folded_PH)

    def _judged_parameters(self, i: int) -> dict[str, Tensor]:
        """Return the encoder's parameters by name or, with ``ema``, their average."""
        averaged = self._optimizers[i].averaged
        if averaged is None:
            return dict(self._encoders[i].named_parameters())
        group = next(group for group in self._groups if i in group.members)
        return group.of_encoder(self._encoders[i], averaged)

    def update(self, gradients: Sequence[Tensor | None]) -> list[float]:
        """Make one optimizer step per prompt, or per share.

        Args:
            gradients: d loss / d virtual tokens, [P, H] each, summed over ranks and normalized.
                None: the prompt and its schedule do not change.

        Returns:
            Norm of the gradient of each prompt's parameters (or those of its share) before
            clipping; 0 without a gradient. If it is not finite, for example after an overflow in
            the encoder, the step was skipped on all ranks.
        """
        assert len(gradients) == len(self), (len(gradients), len(self))
        # Check all prompts before the first step, so that no update is made partially.
        for name, active, gradient_PH in zip(self.names, self.active, gradients, strict=True):
            if gradient_PH is not None:
                assert active, f"prompt {name!r} has stopped, but rows were read for it"
        norms = [0.0] * len(self)
        for group in self._groups:
            read = {i: g for i in group.members if (g := gradients[i]) is not None}
            if read:
                norm = self._update(group, read)
                for i in read:
                    norms[i] = norm
        self._outputs = [
            None if active else output
            for active, output in zip(self.active, self._outputs, strict=True)
        ]
        return norms

    def _update(self, group: ParameterGroup, gradients: Mapping[int, Tensor]) -> float:
        parameters = list(group.parameters.values())
        with torch.enable_grad():
            outputs = [self._output(i).tensor for i in gradients]
        given = [g.to(output) for g, output in zip(gradients.values(), outputs, strict=True)]
        # Unused: parameters of prompts of the share that have no rows in this update.
        parameter_gradients = torch.autograd.grad(outputs, parameters, given, allow_unused=True)
        for parameter, gradient in zip(parameters, parameter_gradients, strict=True):
            parameter.grad = gradient
        return self._optimizers[group.members[0]].step()

    def stop(self, i: int) -> None:
        """Freeze a prompt: its values never change again."""
        if self._prompts[i].share is not None:
            self._stopped[i] = self._folded(i)
        self.active[i] = False
        self._outputs[i] = None

    def snapshot(self, i: int) -> SoftPrompt:
        """Return a copy of the current values as ``judged``, fp32 on the CPU."""
        return self._kinds[i](self._folded(i).to("cpu", copy=True))

    def keep_best(self, i: int) -> None:
        """Keep a copy of the current values as the best so far, for export."""
        self._best[i] = self.snapshot(i).tensor

    def keep_best_encoders(self, step: int, keys: Mapping[int, ScoreKey | None]) -> None:
        """Keep the weights of text encoders that are better than before.

        Args:
            keys: ``ranking.score_key`` of the prompts that were validated after this step; None:
                the prompt's task has no validation.
        """
        for group in self._groups:
            read = {self.names[i]: keys[i] for i in group.members if i in keys}
            if read and group.members[0] in self._best_encoders:
                self._best_encoders[group.members[0]].update(step, read)

    def best(self, i: int) -> SoftPrompt:
        """Return the values of ``keep_best`` or, without any, the current ones: fp32 on the CPU."""
        best_PH = self._best[i]
        return self.snapshot(i) if best_PH is None else self._kinds[i](best_PH.clone())

    def digest(self) -> str:
        """Return the SHA-256 of all parameters; it differs between ranks if replicas differ."""
        digest = hashlib.sha256()
        for encoder in self._encoders:
            for name, parameter in encoder.named_parameters():
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming, by prompt name, copied to the CPU.

        Returns:
            For each prompt: its identity, ``active``, state of ``optimizer``, tensors
            ``encoder/PARAMETER``, ``best`` and ``stopped``, and for a text encoder the state of
            ``reader``. In a share, only the first prompt has tensors of encoder and optimizer.
        """
        state: dict[str, Any] = {}
        for group in self._groups:
            optimizer = self._optimizers[group.members[0]].state_dict()
            counters = {k: v for k, v in optimizer.items() if not isinstance(v, Tensor)}
            for i in group.members:
                first = i == group.members[0]
                state[self.names[i]] = {
                    **resume_settings(self._prompts[i]),
                    "active": self.active[i],
                    "optimizer": optimizer if first else counters,
                }
                tensors = {"best": self._best[i], "stopped": self._stopped[i]}
                if first:
                    tensors |= {f"encoder/{key}": value for key, value in group.parameters.items()}
                state[self.names[i]] |= {
                    key: value.detach().to("cpu", copy=True)
                    for key, value in tensors.items()
                    if value is not None
                }
        for i, best in self._best_encoders.items():
            state[self.names[i]]["reader"] = best.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``, or raise ``BadInput`` with every difference and load nothing."""
        parameters = {self.names[group.members[0]]: group.parameters for group in self._groups}
        problems = checkpoint_problems(self._prompts, parameters, state)
        if problems:
            raise BadInput(problems)
        for group in self._groups:
            saved = state[self.names[group.members[0]]]
            with torch.no_grad():
                for key, parameter in group.parameters.items():
                    parameter.copy_(saved[f"encoder/{key}"])
            self._optimizers[group.members[0]].load_state_dict(saved["optimizer"])
        for i, name in enumerate(self.names):
            best_PH, stopped_PH = state[name].get("best"), state[name].get("stopped")
            self._best[i] = None if best_PH is None else best_PH.clone()
            self._stopped[i] = (
                None if stopped_PH is None else stopped_PH.to(self._device, copy=True)
            )
            self.active[i] = bool(state[name]["active"])
            if i in self._best_encoders and "reader" in state[name]:
                self._best_encoders[i].load_state_dict(state[name]["reader"])
        self._outputs = [None] * len(self)
