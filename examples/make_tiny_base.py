"""Make the tiny base and the data of the example tasks: ``python -m examples.make_tiny_base``.

The same seed and thread count on the same machine give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import corpus, programs

HERE = Path(__file__).parent
ROWS = {"train": 1200, "valid": 201, "shifted": 201}
TASKS = ("triage", "animals", "codegen")
VOCABULARY = 1024
EOS, PAD = "<eos>", "<pad>"
#: Rows of ``chat.SPLIT.jsonl``: the first rows of triage, as dialogues.
CHAT_ROWS = {"train": 300, "valid": 100}
#: Writes a dialogue like a pretraining document: instruction, text, answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ ' ' + message.content + eos_token }}
{%- elif message.role == 'system' -%}
{{ message.content + '\\n' }}
{%- else -%}
{{ message.content + '\\nAnswer:' }}
{%- endif -%}
{%- endfor -%}
"""

# Text teaches the language, answers the capability. The tokens of a long answer weigh less, or the
# label words would be lost among many tokens that are easier.
TEXT_WEIGHT = 0.1


def write_data(folder: Path, seed: int) -> None:
    """Write ``TASK.SPLIT.jsonl`` for every task and split, and ``chat.SPLIT.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for split, count in ROWS.items():
            rows = corpus.task_rows(task, split, count, seed)
            _write_rows(folder / f"{task}.{split}.jsonl", rows)
            if task == "triage" and split in CHAT_ROWS:
                dialogues = [_dialogue(row) for row in rows[: CHAT_ROWS[split]]]
                _write_rows(folder / f"chat.{split}.jsonl", dialogues)


def _dialogue(row: dict[str, Any]) -> dict[str, Any]:
    user = {"role": "user", "content": row["text"]}
    return {"messages": [user, {"role": "assistant", "content": row["label"]}]}


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens; digits stand alone so that numbers can be copied."""
    stream = itertools.islice(corpus.documents(seed + 1), 20_000)
    texts = [document.input + " " + document.answer for document in stream]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        chat_template=CHAT_TEMPLATE,
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.95 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    # transformers gives every matrix the same spread, which leaves attention of a narrow model
    # uniform for long. Scaled by its fan-in instead, it learns to look things up at once.
    for name, parameter in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2:
            residual = "o_proj" in name or "down_proj" in name
            std = parameter.shape[1] ** -0.5 * (0.2 if residual else 1.0)
            torch.nn.init.normal_(parameter, std=std)
    return model


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, weight of each token as a target), rows of like length together."""
    rng = random.Random(seed)
    stream = corpus.documents(seed)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None
    while True:
        pool: list[tuple[list[int], int]] = []
        documents = [next(stream) for _ in range(rows * 32)]
        inputs = tokenizer([document.input for document in documents])["input_ids"]
        answers = tokenizer([" " + document.answer for document in documents])["input_ids"]
        for ids, answer in zip(inputs, answers, strict=True):
            pool.append((ids + answer + [tokenizer.eos_token_id], len(ids)))
        pool.sort(key=lambda item: len(item[0]))
        groups = [pool[start : start + rows] for start in range(0, len(pool), rows)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            tokens_BT = torch.full((rows, longest), tokenizer.pad_token_id)
            weights_BT = torch.zeros(rows, longest)
            for row, (ids, answer_start) in enumerate(group):
                tokens_BT[row, : len(ids)] = torch.tensor(ids)
                for position in rng.sample(range(answer_start), answer_start // 5):
                    weights_BT[row, position] = TEXT_WEIGHT
                weights_BT[row, answer_start : len(ids)] = (len(ids) - answer_start) ** -0.5
            yield tokens_BT, weights_BT


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    console: Console,
    rows: int = 64,
    learning_rate: float = 3e-3,
) -> float:
    """Train all weights in fp32; return the mean weighted loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=min(0.1, 100 / steps)
    )
    losses: list[float] = []
    model.train()
    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=console) as progress:
        bar = progress.add_task("", total=steps, loss="-")
        for tokens_BT, weights_BT in itertools.islice(batches(tokenizer, seed, rows), steps):
            hidden_BTH = model.model(tokens_BT[:, :-1], use_cache=False).last_hidden_state
            is_target_BT = weights_BT[:, 1:] > 0  # the head is a third of the work: not everywhere
            logits_NV = model.lm_head(hidden_BTH[is_target_BT])
            loss_N = F.cross_entropy(logits_NV, tokens_BT[:, 1:][is_target_BT], reduction="none")
            weights_N = weights_BT[:, 1:][is_target_BT]
            loss = (loss_N * weights_N).sum() / weights_N.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            recent = losses[-50:]
            progress.update(bar, advance=1, loss=f"{sum(recent) / len(recent):.3f}")
            if not console.is_terminal and len(losses) % 100 == 0:
                console.print(f"step {len(losses)}/{steps}: loss {sum(recent) / len(recent):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def answer_log_likelihood(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    inputs: list[str],
    answers: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-likelihood of each answer, and whether greedy decoding would write exactly it."""
    scores, exact = [], []
    for start in range(0, len(inputs), 64):
        rows = []
        part = slice(start, start + 64)
        for text, answer in zip(inputs[part], answers[part], strict=True):
            ids = tokenizer(text)["input_ids"]
            target = tokenizer(" " + answer)["input_ids"] + [tokenizer.eos_token_id]
            rows.append((ids, target))
        longest = max(len(ids) + len(target) for ids, target in rows)
        tokens_BT = torch.full((len(rows), longest), tokenizer.pad_token_id or 0)
        for row, (ids, target) in enumerate(rows):
            tokens_BT[row, : len(ids) + len(target)] = torch.tensor(ids + target)
        log_probs_BTV = model(tokens_BT, use_cache=False).logits.log_softmax(-1)
        for row, (ids, target) in enumerate(rows):
            span_SV = log_probs_BTV[row, len(ids) - 1 : len(ids) + len(target) - 1]
            target_S = torch.tensor(target)
            scores.append(span_SV.gather(1, target_S[:, None]).sum())
            exact.append((span_SV.argmax(-1) == target_S).all())
    return torch.stack(scores), torch.stack(exact)


def task_score(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    split: str,
    instructions: list[str],
    seed: int,
) -> float:
    """Share of rows answered rightly, row i under ``instructions[i % len]`` ("" for none)."""
    rows = corpus.task_rows(task, split, ROWS[split], seed)
    inputs = []
    for index, row in enumerate(rows):
        instruction = instructions[index % len(instructions)]
        inputs.append((instruction + "\n" if instruction else "") + row["text"] + corpus.CUE)
    if task == "codegen":
        _, exact = answer_log_likelihood(model, tokenizer, inputs, [row["code"] for row in rows])
        return exact.float().mean().item()
    choices = corpus.SCENES[task].labels
    by_choice = [
        answer_log_likelihood(model, tokenizer, inputs, [choice] * len(rows))[0]
        for choice in choices
    ]
    picked = torch.stack(by_choice).argmax(0)
    right = [choices[pick] == row["label"] for pick, row in zip(picked, rows, strict=True)]
    return sum(right) / len(right)


def known_instructions(task: str, seed: int) -> list[str]:
    """Forty instructions that pretraining used for the question of the example task."""
    if task == "codegen":
        known = list(programs.FORMS["def"].instructions)
    else:
        scene = corpus.SCENES[task]
        phrases = scene.aspects[scene.wanted].phrases
        known = [ask.format(np=phrase) for ask in scene.ask_label for phrase in phrases]
    return random.Random(seed).sample(known, 40)


def checks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> Table:
    """What the base does with no instruction and with those it knows, on rows it never saw."""
    table = Table("task", "rows", "no instruction", "known instructions")
    model.eval()
    for task in TASKS:
        for split in ("valid", "shifted"):
            known = known_instructions(task, seed)
            scores = [
                task_score(model, tokenizer, task, split, instructions, seed)
                for instructions in ([""], known)
            ]
            table.add_row(task, split, *(f"{score:.1%}" for score in scores))
    return table


def main() -> None:
    """Parse the command line, write the data, then pretrain, save and check the base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=HERE, help="gets data/ and tiny_base/")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="write the data and stop")
    args = parser.parse_args()

    console = Console()
    write_data(args.out / "data", args.seed)
    console.print(f"data: {args.out / 'data'}")
    if args.data_only:
        return

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    console.print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters")
    loss = pretrain(model, tokenizer, args.steps, args.seed, console)
    folder = args.out / "tiny_base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print(f"final loss {loss:.4f}; saved to {folder}")
    console.print(checks(model, tokenizer, args.seed))


if __name__ == "__main__":
    main()
