"""The bank: replicas equal to the bit, prompts independent of each other, resumed exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.config import RunConfig
from trainer.config.encoders import PromptWidths
from trainer.config.prompt_defaults import DEFAULT_BETAS
from trainer.prompts.bank import Bank
from trainer.prompts.init_search import SearchResult, Words, search_starts
from trainer.prompts.initializers import Vocabulary
from trainer.prompts.peft_adapter import FixedText, load_peft, save_peft
from trainer.prompts.saved_prompts import find_source
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.errors import BadInput
from trainer.training.prompt_optimizer import make_optimizer

H, V, STEPS = 8, 40, 12
TABLE_VH = torch.randn(V, H, generator=torch.Generator().manual_seed(5)) * 0.1

PROMPTS: list[dict[str, Any]] = [
    {"name": "words", "num_virtual_tokens": 4, "init": {"text": "w3 w5"}},
    {"name": "drawn.v2", "num_virtual_tokens": 6, "seed": 3, "weight_decay": 0.1},
    {"name": "mlp", "num_virtual_tokens": 3, "method": "p_tuning", "learning_rate": 0.01},
    {"name": "noise", "num_virtual_tokens": 5, "init": "random", "max_grad_norm": None},
    {"name": "prefix", "num_virtual_tokens": 4, "method": "prefix_tuning"},
    {"name": "prefix-mlp", "num_virtual_tokens": 3, "method": "prefix_tuning", "encoder": "mlp"},
    {
        "name": "averaged",
        "num_virtual_tokens": 2,
        "method": "p_tuning",
        "preset": "lester",
        "ema": 0.9,
        "noise": 0.2,
        "dropout": 0.1,
    },
    {"name": "lstm", "num_virtual_tokens": 2, "method": "p_tuning", "encoder": "lstm"},
    {"name": "residual", "num_virtual_tokens": 4, "method": "p_tuning", "encoder": "residual"},
    {
        "name": "separate",
        "num_virtual_tokens": 3,
        "method": "p_tuning",
        "encoder": "residual",
        "residual_mlp": "separate",
    },
    {
        "name": "text",
        "num_virtual_tokens": 3,
        "method": "p_tuning",
        "encoder": "text",
        "init": {"text": "w9 w2 w3 w7 w8"},
    },
]
LOW_RANK = {"encoder": "low_rank", "share": "common", "num_virtual_tokens": 4, "rank": 2}
TEXT = {
    "method": "p_tuning",
    "encoder": "text",
    "share": "reader",
    "num_virtual_tokens": 3,
    "ema": 0.9,
}
#: Two shares of two prompts each, mixed up.
SHARES: list[dict[str, Any]] = [
    {"name": "low-1", **LOW_RANK},
    {"name": "text-1", **TEXT, "init": {"text": "w3 w4 w5"}},
    {"name": "low-2", **LOW_RANK},
    {"name": "text-2", **TEXT, "init": {"text": "w6 w7"}},
]
PREFIX = [i for i, p in enumerate(PROMPTS) if p.get("method") == "prefix_tuning"]
#: Layers, keys and values, heads, head size.
PAST_SHAPE = (2, 2, 1, 6)
PAST_VX = torch.randn(V, *PAST_SHAPE, generator=torch.Generator().manual_seed(6))


def make_config(
    prompts: list[dict[str, Any]] = PROMPTS,
    hand_written: Sequence[str] = (),
    init_share: float = 20.0,
) -> RunConfig:
    task: dict[str, Any] = {"name": "t", "train": "t.jsonl", "input": "{text}"}
    task |= {"target": "{label}", "hand_written": list(hand_written)}
    return RunConfig.model_validate(
        {
            "output_dir": "runs/test",
            "base": {"model": "tiny"},
            "tasks": [task],
            "prompts": [{"task": "t", **prompt} for prompt in prompts],
            "training": {"steps": STEPS, "seed": 11},
            "search": {"init_share": init_share},
        }
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0")


def make_bank(prompts: list[dict[str, Any]] = PROMPTS, **changes: Any) -> Bank:
    return Bank(
        make_config(prompts, changes.pop("hand_written", []), changes.pop("init_share", 20.0)),
        lambda ids: TABLE_VH[torch.tensor(ids)],
        make_tokenizer(),
        V,
        H,
        torch.device("cpu"),
        make_optimizer=make_optimizer,
        **({"past": lambda ids: PAST_VX[torch.tensor(ids)]} | changes),
    )


@pytest.mark.parametrize("prompts", [PROMPTS, SHARES])
def test_parameters_are_counted_without_building_encoders(prompts: list[dict[str, Any]]) -> None:
    """As ``promptshard plan`` counts them; of a share, those of its first prompt."""
    layers, _, heads, head_size = PAST_SHAPE
    widths = PromptWidths(H, heads * head_size, layers)
    by_name = {prompt.name: prompt for prompt in make_config(prompts).prompts}
    bank = make_bank(prompts)
    for group in bank._groups:
        prompt = by_name[bank.names[group.members[0]]]
        own = [tensor for name, tensor in group.parameters.items() if "/" not in name]
        counted = prompt.entry.num_parameters(prompt, widths)
        assert counted == sum(tensor.numel() for tensor in own), prompt.name


def values_of(prompts: Sequence[SoftPrompt]) -> list[Tensor]:
    return [prompt.tensor for prompt in prompts]


def loss_gradients(bank: Bank) -> list[Tensor | None]:
    """d loss / d virtual tokens, as the loop makes it, of a loss of each prompt alone."""
    leaves = [prompt.leaf().tensor for prompt in bank.virtual_tokens()]
    loss = sum(((leaf - 0.3) ** 2).sum() + leaf.sin().sum() for leaf in leaves)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [leaf.grad if on else None for leaf, on in zip(leaves, bank.active, strict=True)]


def train(bank: Bank, steps: int) -> list[list[float]]:
    return [bank.update(loss_gradients(bank)) for _ in range(steps)]


def assert_same(one: Bank, other: Bank) -> None:
    (tensors, meta), (tensors_2, meta_2) = map(
        split_tensors, (one.state_dict(), other.state_dict())
    )
    assert meta == meta_2
    assert tensors.keys() == tensors_2.keys()
    for name, value in tensors.items():
        assert torch.equal(value, tensors_2[name]), name
    assert one.digest() == other.digest()


def test_keys_and_values_of_the_text_before_a_prompt_stay_fixed(tmp_path: Path) -> None:
    settings = {"num_virtual_tokens": 3, "method": "prefix_tuning", "init": {"text": "w7 w8 w9"}}
    prompts = [{"name": "inside", **settings, "noise": 0.2}, {"name": "front", **settings}]
    read: list[list[int]] = []

    def past(ids: Sequence[int]) -> Tensor:
        read.append(list(ids))
        return PAST_VX[torch.tensor(ids)]

    bank = make_bank(prompts, before={"inside": [4, 5]}, past=past)
    assert [4, 5, 7, 8, 9] in read, "the prompt is read after the text"
    fixed = PAST_VX[torch.tensor([4, 5])]
    start, front = values_of(bank.judged())
    assert torch.equal(start, torch.cat([fixed, front]))
    train(bank, 2)
    trained = bank.snapshot(0).tensor
    assert torch.equal(trained[:2], fixed)
    assert not torch.equal(trained[2:], start[2:])
    assert torch.equal(values_of(bank.virtual_tokens())[0][:2], fixed), "also with noise"
    resumed = make_bank(prompts, before={"inside": [4, 5]})
    resumed.load_state_dict(bank.state_dict())
    assert_same(bank, resumed)
    assert torch.equal(resumed.snapshot(0).tensor, trained)

    text = FixedText((4, 5), 2, None, ("w4 w5", ""))
    folder = tmp_path / "inside"
    save_peft(folder, bank.snapshot(0), "-", num_layers=2, num_attention_heads=1, fixed_text=text)
    assert torch.equal(load_peft(folder).tensor, trained)
    assert find_source(str(folder)).num_virtual_tokens == 3
    again = make_bank([{**prompts[1], "init": {"from": str(folder)}}])
    assert torch.equal(again.snapshot(0).tensor, trained[2:]), "without the text"


def test_a_bank_holds_the_prompts_of_the_run_file() -> None:
    bank = make_bank()
    assert bank.names == [prompt["name"] for prompt in PROMPTS]
    assert bank.lengths == [4, 6, 3, 5, 4, 3, 2, 2, 4, 3, 3]
    assert bank.active == [True] * 11
    assert len(bank) == 11
    tokens = values_of(bank.virtual_tokens())
    for i, length in enumerate(bank.lengths):
        assert tokens[i].shape == (length, *(PAST_SHAPE if i in PREFIX else (H,)))
    assert all(t.dtype == torch.float32 and t.requires_grad for t in tokens)
    assert torch.equal(tokens[0], TABLE_VH[[3, 5, 3, 5]])


def test_ranks_stay_equal_to_the_bit() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = make_bank()
    train(one, 5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    other = make_bank()
    train(other, 5)
    assert_same(one, other)


def test_digest_sees_one_bit() -> None:
    one, other = make_bank(), make_bank()
    with torch.no_grad():
        weight = other._encoders[2].mlp_head[2].bias  # type: ignore[union-attr, index]
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert one.digest() != other.digest()


@pytest.mark.parametrize("first", [0, 1])
def test_share_in_a_bank_equals_the_same_alone(first: int) -> None:
    bank, alone = make_bank(PROMPTS[:2] + SHARES + PROMPTS[2:]), make_bank(SHARES[first::2])
    members = [2 + first, 4 + first]
    together = [[norms[i] for i in members] for norms in train(bank, STEPS)]
    assert together == train(alone, STEPS)
    for i, k in zip(members, range(2), strict=True):
        assert torch.equal(bank.snapshot(i).tensor, alone.snapshot(k).tensor)


def test_a_share_trains_one_encoder() -> None:
    bank = make_bank(SHARES)
    low_1, text_1, low_2, text_2 = bank._encoders
    assert low_1.shared is low_2.shared
    assert text_1.shared is text_2.shared
    start = values_of(bank.virtual_tokens())
    assert torch.equal(start[0], start[2]), "the tasks start at what they have in common"
    assert not torch.equal(start[1], start[3]), "each reads its own text"
    tensors, _ = split_tensors(bank.state_dict())
    assert [name for name in tensors if name.startswith("text-2/")] == []
    assert {name for name in tensors if "low-2" in name} == {
        "low-1/encoder/low-2/columns",
        "low-1/encoder/low-2/rows",
    }
    rates = bank.learning_rates
    gradients = [torch.ones_like(start[0]), None, torch.ones_like(start[0]), None]
    for _ in range(2):
        norms = bank.update(gradients)
    assert norms[0] == norms[2] > 0
    assert norms[1] == norms[3] == 0
    assert [a == b for a, b in zip(rates, bank.learning_rates, strict=True)] == [False, True] * 2


def test_a_share_is_updated_by_the_sum_of_its_losses() -> None:
    bank, reference = make_bank(SHARES), make_bank(SHARES)
    train(bank, 1)
    parameters = {k: v for unit in reference._groups for k, v in unit.parameters.items()}
    loss = sum(((out := e()) - 0.3).square().sum() + out.sin().sum() for e in reference._encoders)
    assert isinstance(loss, Tensor)
    loss.backward()
    for unit in reference._groups:
        torch.nn.utils.clip_grad_norm_(list(unit.parameters.values()), 1.0)
    tensors, _ = split_tensors(bank.state_dict())
    for name, parameter in parameters.items():
        first = "text-1" if name.split(".")[-1] in ("queries", "weight", "bias") else "low-1"
        assert parameter.grad is not None, name
        ours = tensors[f"{first}/optimizer/{name}/exp_avg"]
        torch.testing.assert_close(ours, (1 - DEFAULT_BETAS[0]) * parameter.grad, msg=name)


def test_a_shared_prompt_without_rows_keeps_its_own_parameters() -> None:
    bank = make_bank(SHARES)
    train(bank, 2)
    own = bank._encoders[2].columns.detach().clone()
    bank.update([torch.ones(4, H), None, None, None])
    assert torch.equal(bank._encoders[2].columns, own)
    assert torch.equal(bank._encoders[0].shared.embedding, bank._encoders[2].shared.embedding)


def test_a_stopped_prompt_keeps_its_values_while_its_shared_encoder_trains() -> None:
    bank = make_bank(SHARES)
    train(bank, 3)
    for i in (1, 2):
        bank.stop(i)
    still = [bank.snapshot(i).tensor for i in (1, 2)]
    moved = bank.snapshot(3).tensor
    train(bank, 2)
    resumed = make_bank(SHARES)
    resumed.load_state_dict(through_files(bank.state_dict()))
    train(bank, 2)
    train(resumed, 2)
    assert_same(bank, resumed)
    for current in (bank, resumed):
        for i, before in zip((1, 2), still, strict=True):
            assert torch.equal(current.snapshot(i).tensor, before)
            assert torch.equal(current.virtual_tokens()[i].tensor, before)
            assert torch.equal(current.best(i).tensor, before)
    assert not torch.equal(bank.snapshot(3).tensor, moved)


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_prompt_in_a_bank_equals_the_same_alone(i: int) -> None:
    bank, alone = make_bank(), make_bank([PROMPTS[i]])
    together = [norms[i] for norms in train(bank, STEPS)]
    assert together == [norms[0] for norms in train(alone, STEPS)]
    assert torch.equal(bank.snapshot(i).tensor, alone.snapshot(0).tensor)


def test_update_equals_plain_backpropagation() -> None:
    """Backward in two parts, through the virtual tokens, is the gradient of the whole."""
    bank, reference = make_bank([PROMPTS[2]]), make_bank([PROMPTS[2]])
    train(bank, 1)
    encoder = reference._encoders[0]
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=0.0, betas=DEFAULT_BETAS, weight_decay=0.0
    )
    out = encoder()
    (((out - 0.3) ** 2).sum() + out.sin().sum()).backward()
    torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    optimizer.step()
    tensors, _ = split_tensors(bank.state_dict())
    for name, parameter in encoder.named_parameters():
        ours = tensors[f"mlp/optimizer/{name}/exp_avg"]
        torch.testing.assert_close(ours, optimizer.state[parameter]["exp_avg"])


def test_training_lowers_the_loss() -> None:
    bank = make_bank()
    start = [bank.snapshot(i).tensor for i in range(len(bank))]
    train(bank, STEPS)
    for i in range(len(bank)):
        before, after = (
            ((t - 0.3) ** 2).sum() + t.sin().sum() for t in (start[i], bank.snapshot(i).tensor)
        )
        assert after < before, bank.names[i]


def test_encoder_runs_once_per_update() -> None:
    bank = make_bank()
    train(bank, 1)  # warm-up: the first update has learning rate 0
    runs: list[int] = []
    bank._encoders[2].register_forward_hook(lambda *_: runs.append(1))
    first = bank.virtual_tokens()
    assert all(a is b for a, b in zip(first, bank.virtual_tokens(), strict=True))
    with torch.no_grad():
        assert not any(t.tensor.requires_grad for t in bank.virtual_tokens()), (
            "evaluation needs no graph"
        )
    assert len(runs) == 2
    bank.update([torch.ones_like(t.tensor) for t in first])
    assert len(runs) == 2
    assert not torch.equal(bank.virtual_tokens()[2].tensor, first[2].tensor), (
        "still the outputs of old weights"
    )


def test_validation_and_export_use_the_average_of_the_weights() -> None:
    bank = make_bank([prompt for prompt in PROMPTS if prompt["name"] == "averaged"])
    train(bank, 6)
    (judged,) = values_of(bank.judged())  # where gradients are enabled, as the loop asks for it
    assert not judged.requires_grad
    assert not torch.equal(judged, bank.virtual_tokens()[0].tensor)
    bank.keep_best(0)
    assert torch.equal(judged, bank.snapshot(0).tensor)
    assert torch.equal(judged, bank.best(0).tensor)
    averaged = bank._optimizers[0].averaged
    assert averaged is not None
    with torch.no_grad():
        assert not torch.allclose(judged, bank._encoders[0]())
        for name, parameter in bank._encoders[0].named_parameters():
            parameter.copy_(averaged[name])
        assert torch.equal(judged, bank._encoders[0]())


def test_a_prompt_is_perturbed_in_training_alone() -> None:
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup_ratio": 0, "learning_rate": 1}
    prompt = {"name": "p", "num_virtual_tokens": 4, "init": {"text": "w3 w5"}, "dropout": 0.5}
    bank = make_bank([prompt | plain])
    read = bank.virtual_tokens()[0].tensor
    with torch.no_grad():
        judged = bank.virtual_tokens()[0].tensor
    assert torch.equal(judged, TABLE_VH[[3, 5, 3, 5]])
    torch.testing.assert_close(read, torch.where(read == 0, 0.0, 2 * judged))
    bank.update([torch.ones_like(read)])
    moved = bank.snapshot(0).tensor != judged
    assert torch.equal(moved, read != 0), "what was dropped had no part in the loss"
    assert 0 < int(moved.sum()) < moved.numel()


def test_returned_virtual_tokens_do_not_change_later() -> None:
    bank = make_bank()
    train(bank, 1)
    given = values_of(bank.virtual_tokens())
    copies = [t.detach().clone() for t in given]
    train(bank, 1)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_a_gradient_of_none_changes_neither_prompt_nor_schedule() -> None:
    bank, other = make_bank(), make_bank()
    train(bank, 2)
    train(other, 2)
    gradients = loss_gradients(other)
    norms = other.update([None, *gradients[1:]])
    assert norms[0] == 0
    assert all(norm > 0 for norm in norms[1:])
    assert torch.equal(other.snapshot(0).tensor, bank.snapshot(0).tensor)
    assert other.learning_rates[0] == bank.learning_rates[0]
    assert other.learning_rates[1] != bank.learning_rates[1]


def test_non_finite_gradient_reaches_no_weight() -> None:
    bank = make_bank()
    train(bank, 2)
    before = split_tensors(bank.state_dict())[0]
    gradients = loss_gradients(bank)
    assert gradients[3] is not None
    gradients[3][0, 0] = math.nan
    norms = bank.update(gradients)
    after = split_tensors(bank.state_dict())[0]
    assert [math.isfinite(norm) for norm in norms] == [i != 3 for i in range(len(bank))]
    for key, value in after.items():
        of_it = key.startswith(f"{bank.names[3]}/")
        assert torch.equal(before[key], value) or not of_it, key
    assert any(not torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.fault("gradient is infinite or spikes")
def test_overflow_inside_an_encoder_skips_that_prompt_alone() -> None:
    bank = make_bank()
    train(bank, 2)
    still, rates = bank.snapshot(2).tensor, bank.learning_rates
    gradients = loss_gradients(bank)
    assert gradients[2] is not None
    gradients[2].fill_(3e38)
    norms = bank.update(gradients)
    assert not math.isfinite(norms[2])
    assert math.isfinite(norms[1])
    assert torch.equal(bank.snapshot(2).tensor, still)
    assert bank.learning_rates[2] == rates[2]
    assert bank.learning_rates[1] != rates[1]


def test_stopped_prompt_stays() -> None:
    bank = make_bank()
    train(bank, 2)
    bank.virtual_tokens()
    bank.stop(1)
    assert bank.active == [i != 1 for i in range(len(PROMPTS))]
    still = bank.snapshot(1).tensor
    tokens = values_of(bank.virtual_tokens())
    assert not tokens[1].requires_grad
    assert torch.equal(tokens[1], still)
    with pytest.raises(AssertionError, match=r"drawn\.v2.*stopped"):
        bank.update([torch.ones_like(t) for t in tokens])
    train(bank, 3)
    assert torch.equal(bank.snapshot(1).tensor, still)


def test_best_and_last() -> None:
    bank = make_bank()
    assert torch.equal(bank.best(0).tensor, bank.snapshot(0).tensor), (
        "nothing kept yet: the current"
    )
    train(bank, 2)
    bank.keep_best(0)
    kept = bank.snapshot(0).tensor
    train(bank, 2)
    assert torch.equal(bank.best(0).tensor, kept)
    assert not torch.equal(bank.snapshot(0).tensor, kept)
    bank.best(0).tensor.zero_()
    assert torch.equal(bank.best(0).tensor, kept), "a copy, not the bank's own"


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    tensors, rest = split_tensors(state)
    return join_tensors(from_bytes(to_bytes(tensors)), json.loads(json.dumps(rest)))


@pytest.mark.parametrize("prompts", [PROMPTS, SHARES], ids=["own", "shared"])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_resumed_equals_never_stopped(done: int, prompts: list[dict[str, Any]]) -> None:
    straight = make_bank(prompts)
    train(straight, done)
    straight.keep_best(2)
    if done == 7:
        straight.stop(0)
    state = through_files(straight.state_dict())
    resumed = make_bank(prompts)
    train(resumed, 3)  # what it held before must not matter
    resumed.keep_best(1)
    resumed.virtual_tokens()
    resumed.load_state_dict(state)
    assert_same(straight, resumed)
    assert resumed.active == straight.active
    norms, norms_2 = train(straight, STEPS - done), train(resumed, STEPS - done)
    assert norms == norms_2
    assert_same(straight, resumed)
    assert torch.equal(straight.best(2).tensor, resumed.best(2).tensor)
    assert torch.equal(resumed.best(1).tensor, resumed.snapshot(1).tensor), (
        "a best that was not saved is left"
    )


def test_state_is_a_copy() -> None:
    bank = make_bank()
    train(bank, 1)
    tensors, _ = split_tensors(bank.state_dict())
    kept = {k: v.clone() for k, v in tensors.items()}
    train(bank, 2)
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)


def test_state_of_other_prompts_is_refused() -> None:
    bank = make_bank()
    train(bank, 1)
    state = bank.state_dict()
    longer: list[dict[str, Any]] = [dict(p) for p in PROMPTS]
    longer[0]["num_virtual_tokens"] = 5
    longer[1]["method"] = "p_tuning"
    longer[2]["encoder_hidden_size"] = 16
    other = make_bank(longer)
    before = other.digest()
    with pytest.raises(BadInput) as caught:
        other.load_state_dict(state)
    problems = caught.value.problems
    assert any(
        "prompts.words.num_virtual_tokens: 5, but the checkpoint has 4" in p for p in problems
    )
    assert any("prompts.drawn.v2.method: 'p_tuning'" in p for p in problems)
    assert any("encoder_hidden_size" in p for p in problems)
    assert other.digest() == before
    with pytest.raises(BadInput, match="the run file has words, the checkpoint words, drawn"):
        make_bank(PROMPTS[:1]).load_state_dict(state)


def test_another_first_prompt_of_a_share_is_refused() -> None:
    bank = make_bank(SHARES)
    with pytest.raises(BadInput) as caught:
        make_bank([SHARES[i] for i in (2, 1, 0, 3)]).load_state_dict(bank.state_dict())
    assert caught.value.problems == [
        "prompts.low-1: was the first prompt of share 'common' in the run that wrote the "
        "checkpoint; list the prompts of this share in the same order again"
    ]


class NearTo:
    """A scorer that prefers candidates near one word, and records its calls."""

    def __init__(self, word: int) -> None:
        self.word_H, self.rounds, self.reported = TABLE_VH[word], [], {}  # type: ignore[var-annotated]
        self.asked: dict[int, int] = {}

    def working(self, asked: Mapping[int, int]) -> nullcontext[None]:
        self.asked = dict(asked)
        return nullcontext()

    def losses(
        self, starts: Sequence[tuple[int, Words]], embed: Callable[[Sequence[int]], Tensor]
    ) -> list[float]:
        self.rounds.append([i for i, _ in starts])
        return [float((embed(words) - self.word_H).square().sum()) for _, words in starts]

    def say(self, i: int, result: SearchResult, text: str) -> None:
        self.reported[i] = result, text


def test_initial_tokens_are_searched_for_all_prompts_together() -> None:
    """All prompts side by side, each as alone; keys and values of the same words as embeddings."""
    open_ones = [
        {"name": "open", "num_virtual_tokens": 3, "init": "search"},
        {"name": "text", "num_virtual_tokens": 3, "init": {"text": "w9"}},
        {"name": "mlp", "num_virtual_tokens": 3, "init": "search", "method": "p_tuning"},
        {"name": "past", "num_virtual_tokens": 3, "init": "search", "method": "prefix_tuning"},
        {"name": "other", "num_virtual_tokens": 4, "init": "search", "seed": 5},
        {"name": "same", "num_virtual_tokens": 3, "init": "search", "learning_rate": 0.7},
        {
            "name": "lstm",
            "num_virtual_tokens": 3,
            "init": "auto",
            "method": "p_tuning",
            "encoder": "lstm",
        },
    ]
    written = {"hand_written": ["w1 w2\n", "w3"]}
    screen = NearTo(9)
    bank = make_bank(open_ones, screen=screen, **written)
    assert list(screen.reported) == [0, 2, 3, 5, 4]
    first, *later = screen.rounds
    assert first == [0] * 19 + [4] * 19, "what depends on the same is looked for once"
    assert later == [[0] * 8 + [4] * 8] * 6
    assert screen.asked == dict.fromkeys((0, 4), 19 + 6 * 8)
    words_of = {i: list(of.words) for i, (of, _) in screen.reported.items()}
    assert words_of[0] == words_of[2] == words_of[3] == words_of[5] != words_of[4][:3]
    assert all(of.loss < of.middle for of, _ in screen.reported.values())
    assert screen.reported[0][1] == " ".join(f"w{i}" for i in words_of[0])
    assert torch.equal(bank.snapshot(0).tensor, TABLE_VH[words_of[0]])
    assert torch.equal(bank.snapshot(1).tensor, TABLE_VH[[9, 9, 9]])
    torch.testing.assert_close(bank.snapshot(2).tensor, TABLE_VH[words_of[0]], rtol=1e-4, atol=1e-5)
    assert torch.equal(bank.snapshot(3).tensor, PAST_VX[words_of[0]])
    gradient_3H = torch.ones_like(bank.snapshot(0).tensor)
    bank.update([gradient_3H, *[None] * 6])
    assert torch.equal(bank.snapshot(5).tensor, TABLE_VH[words_of[0]]), (
        "equal starts are not one tensor"
    )
    bank = make_bank(open_ones, screen=screen, **written)
    for i in (0, 3, 4):
        alone = NearTo(9)
        assert torch.equal(
            make_bank([open_ones[i]], screen=alone, **written).snapshot(0).tensor,
            bank.snapshot(i).tensor,
        )
    assert make_bank(open_ones, **written).snapshot(0).tensor.shape == (3, H), (
        "to load a state over"
    )


@pytest.mark.parametrize(("texts", "asked"), [(["w1 w2\n"], 0), (["w3", "w9"], 3)])
def test_a_prompt_starts_from_the_best_hand_written_prompt(texts: list[str], asked: int) -> None:
    """A single one is not scored; several are scored, and joined."""
    prompt = {"name": "open", "num_virtual_tokens": 2}
    screen = NearTo(9)
    bank = make_bank([prompt], screen=screen, hand_written=texts)
    assert list(map(len, screen.rounds)) == [asked] * bool(asked)
    words = [9, 9] if asked else [1, 2]
    assert torch.equal(bank.snapshot(0).tensor, TABLE_VH[words])


def test_a_prompt_beside_an_instruction_starts_from_it() -> None:
    config = make_config([{"name": "open", "num_virtual_tokens": 2}])
    values = config.model_dump(exclude_unset=True)
    values["tasks"][0] |= {"chat": True, "system": "w3 w4"}
    table = Vocabulary(lambda ids: TABLE_VH[torch.tensor(ids)], make_tokenizer(), V)
    screen = NearTo(9)
    starts = search_starts(RunConfig.model_validate(values), table, screen)
    assert torch.equal(starts[0], TABLE_VH[[3, 4]])
    assert not screen.rounds


def test_prompts_at_different_places_are_searched_separately() -> None:
    """Their rows differ, so alone each would be searched with its own."""
    prompt = {"name": "open", "num_virtual_tokens": 2, "init": "search"}
    config = make_config([prompt | {"name": place} for place in ("front", "user", "system")])
    values = config.model_dump(exclude_unset=True)
    values["tasks"][0]["chat"] = True
    for place in values["prompts"]:
        place["position"] = place["name"]
    table = Vocabulary(lambda ids: TABLE_VH[torch.tensor(ids)], make_tokenizer(), V)
    screen = NearTo(9)
    search_starts(RunConfig.model_validate(values), table, screen)
    assert screen.asked.keys() == {0, 1, 2}


def test_a_search_costs_at_most_its_share_of_the_training() -> None:
    """``init_share`` of the FLOPs of an update per step, where a candidate costs half an update."""
    prompt = {"name": "open", "num_virtual_tokens": 3, "steps": 100, "init": "search"}
    for share, candidates in ((0.1, 20), (0.2, 35), (1.0, 67)):
        screen = NearTo(9)
        make_bank([prompt], screen=screen, hand_written=["w1 w2", "w3"], init_share=share)
        assert sum(map(len, screen.rounds)) == screen.asked[0] == candidates <= 200 * share
    screen = NearTo(9)
    bank = make_bank([prompt], screen=screen, hand_written=["w1 w2", "w3"], init_share=0.03)
    assert not screen.rounds, "6 candidates are too few for a search"
    start, text = screen.reported[0]
    assert (start.what, text) == ("the hand-written 'w1 w2'", "w1 w2 w1")
    assert start.why.endswith("search.init_share allows 6 of at least 8 candidates")
    assert torch.equal(bank.snapshot(0).tensor, TABLE_VH[[1, 2, 1]])
    both = [{**prompt, "name": "long", "steps": 1000}, prompt]
    screen = NearTo(9)
    bank = make_bank(both, screen=screen, init_share=0.03)
    assert set(screen.asked) == {0}, "a search is shared only by prompts of the same budget"
