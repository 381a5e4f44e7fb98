"""The inspection of a run's prompts on all ranks: rows, prompts, base, measurements, results."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.commands.answer_files import write_numbers
from trainer.commands.evaluate.selection import SelectedRun
from trainer.commands.inspect_prompts.measurements import measure
from trainer.commands.inspect_prompts.options import Options
from trainer.commands.inspect_prompts.pruning import Pruned, prune
from trainer.commands.inspect_prompts.results import inspect_prompt, similarity
from trainer.commands.inspect_prompts.subjects import Subject, make_subject, values_at
from trainer.commands.inspect_prompts.table import show
from trainer.config import RunConfig, load_output
from trainer.data.prompt_positions import texts_before
from trainer.data.task_data import TaskData
from trainer.data.tokenization.chat_template import read_chat_date
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import load_base, open_base_on_all
from trainer.evaluation.evaluator import Evaluator
from trainer.inference.opened_base import as_trained
from trainer.inference.trained_prompts import load_prompts
from trainer.model.checkpoint_files import BaseFiles, portable_name
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.per_layer_inputs import id_rules
from trainer.prompts.initial_prompts import load_initial
from trainer.prompts.peft_adapter import read_fixed_text, save_peft
from trainer.prompts.saved_prompts import WEIGHTS, trained_rows, without_sources
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.reporting.inspection import INSPECTION_FILE, Inspection, PrunedPrompt
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import measurements_folder
from trainer.training.initial_bank import embedding_function, make_bank
from trainer.training.task_loading import load_tasks_per_node

#: Folder of shorter adapters in the output folder.
PRUNED = "pruned"


@dataclass(frozen=True)
class Known:
    """Prompts of a run in memory, by name: as trained, and before training."""

    config: RunConfig
    trained: Mapping[str, SoftPrompt]
    initial: Mapping[str, SoftPrompt]


def inspect(options: Options, run: SelectedRun, console: Console) -> None:
    """Inspect the selected prompts; a collective.

    Raises:
        BadInput: on all ranks, before the base is loaded.
    """
    config = run.config
    engine = Engine(config.engine.timeout_seconds)
    output = measurements_folder(options.run_dir)
    engine.start_watchdog(output / "logs", config.engine.silence_seconds)
    files = open_base_on_all(engine, config.base, console)
    known = engine.run_on_all(lambda: _load(options.run_dir, files, engine))
    date = engine.run_on_main(lambda: read_chat_date(options.run_dir))
    with console.phase("reading rows"):
        tasks = load_tasks_per_node(engine, files, config, console, date, ("validation",))
    for data in tasks.values():
        for warning in data.warnings:
            console.warn(warning)
    base = load_base(engine, files, as_trained(engine, config, options.run_dir), console)
    if base.matmul == "int8":  # gradients of what is scored, not of activations of 8 bits
        use_matmul(base.model, "int8x2", config.base.outlier_threshold)
    evaluator = Evaluator(engine, base.model, files.tokenizer, base.budget)
    subjects = [
        make_subject(
            prompt,
            tasks[prompt.task],
            known.trained,
            known.initial,
            known.config,
            options.rows,
            files.context_length,
            _num_fixed(options.run_dir / "prompts" / prompt.name, known.trained[prompt.name]),
        )
        for prompt in run.prompts
    ]
    _add_checkpoints(options.run_dir, evaluator, files, known.config, subjects, console, date)
    embed = embedding_function(base.model, engine.device)
    measured = measure(
        evaluator, subjects, embed, options.demonstrations, files.context_length, console
    )
    pruned: list[Pruned | None] = [None] * len(subjects)
    if options.prune:
        pruned = prune(evaluator, subjects, measured, console)
    if engine.is_main:
        prompts = {}
        for subject, results, shorter in zip(subjects, measured, pruned, strict=True):
            written = None
            if shorter is not None:
                folder = output / PRUNED / subject.prompt.name
                written = _write_pruned(
                    folder, options.run_dir, files, config, subject, shorter, tasks
                )
            name = subject.prompt.name
            prompts[name] = inspect_prompt(subject, results, written, files.tokenizer)
        inspection = Inspection(prompts=prompts, similarity=similarity(known.trained))
        _report(options, output, inspection, console)
    engine.close()


def _load(run_dir: Path, files: BaseFiles, engine: Engine) -> Known:
    """Read all finished prompts of the run, which serve as controls of each other."""
    config = load_output(run_dir)
    folders = {p.name: run_dir / "prompts" / p.name for p in config.prompts}
    finished = [name for name, folder in folders.items() if (folder / WEIGHTS).is_file()]
    trained = load_prompts([folders[name] for name in finished], files, engine.device)
    return Known(config, dict(zip(finished, trained, strict=True)), load_initial(run_dir, config))


def _num_fixed(folder: Path, prompt: SoftPrompt) -> int:
    """Return the number of keys and values of fixed text in an adapter."""
    fixed = not prompt.in_packed_batch
    return trained_rows(folder, prompt.num_virtual_tokens).start if fixed else 0


def _add_checkpoints(
    run_dir: Path,
    evaluator: Evaluator,
    files: BaseFiles,
    config: RunConfig,
    subjects: Sequence[Subject],
    console: Console,
    date: datetime.date | None,
) -> None:
    """Add the values of every subject at every checkpoint; a collective."""
    engine = evaluator.engine
    saved = engine.run_on_main(lambda: checkpoint.intact(run_dir / CHECKPOINTS, console.warn))
    if not saved:
        return
    with console.phase("reading checkpoints"):
        before = texts_before(config, files.tokenizer, date)
        sources = without_sources(config)
        bank = make_bank(sources, engine, evaluator.base, files, None, lambda text: None, before)
        try:
            for step, values in values_at(bank, saved):
                for subject in subjects:
                    subject.checkpoints.append((step, values[subject.prompt.name]))
        except BadInput as error:
            console.warn(f"checkpoints are left out: {error.problems[0]}")
            for subject in subjects:
                subject.checkpoints.clear()


def _write_pruned(
    folder: Path,
    run_dir: Path,
    files: BaseFiles,
    config: RunConfig,
    subject: Subject,
    pruned: Pruned,
    tasks: Mapping[str, TaskData],
) -> PrunedPrompt:
    """Write the adapter of a shorter prompt; return the result with its path."""
    if pruned.values is None:
        return pruned.result
    name = subject.prompt.name
    fixed_text = read_fixed_text(run_dir / "prompts" / name, files.tokenizer)
    table = tasks[subject.prompt.task].evaluation_at(subject.prompt.placement)["validation"]
    dropped = ", ".join(map(str, pruned.result.dropped))
    save_peft(
        folder,
        pruned.values,
        portable_name(config.base),
        config.base.revision,
        title=f"{name} (pruned)",
        description=f"Task {subject.prompt.task}. {name} without its virtual tokens {dropped}.",
        num_layers=files.config.num_hidden_layers,
        num_attention_heads=files.config.num_attention_heads,
        fixed_text=fixed_text,
        inside=not subject.is_prefix and table.candidates.table.leading is None,
        rules=id_rules(files.config),
    )
    return pruned.result.model_copy(update={"adapter": str(folder)})


def _report(options: Options, output: Path, inspection: Inspection, console: Console) -> None:
    """Print the tables; write ``inspection.json`` and the report."""
    show(inspection, console)
    write_numbers(inspection, output, INSPECTION_FILE, options.json, console)
