"""``python -m trainer.commands.inspect``: the program of ``promptshard inspect``.

For a run, the program is started on every rank: each rank measures some of the weights, then all
ranks score validation rows on the sharded base model. For a model alone, it is one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config as run_file
from trainer.config import Base, RunConfig
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, BadInput
from trainer.runtime.json_file import to_json
from trainer.runtime.process import fast_imports, flush_and_exit
from trainer.runtime.rank_program import run_rank

#: With ``--json -`` the JSON goes to stdout, and all other output to stderr.
STDOUT = Path("-")

if TYPE_CHECKING:
    from trainer.commands.inspect.weights import WeightError


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.model:
        return _base_alone(args)
    saved = Path(args.target) if Path(args.target).is_dir() else None

    def read() -> RunConfig:
        if saved:
            return run_file.load_output(saved, args.overrides)
        return run_file.load(args.target, args.overrides)

    def program(config: RunConfig, console: Console) -> None:
        _inspect_run(config, saved, args.rows, args.json, console)

    return run_rank(read, program, answers=args.json == STDOUT)


def _base_alone(args: argparse.Namespace) -> int:
    from trainer.commands.inspect.weights import int8_weights, measure_weights, stored_bytes
    from trainer.model.checkpoint_files import open_base

    out = sys.stderr if args.json == STDOUT else sys.stdout
    console = Console(out, sys.stderr, answer=sys.stdout)
    try:
        settings = _in_int8(run_file.load_shards(args.target, args.overrides))
        with console.downloading(settings.model) as progress:
            files = open_base(settings, progress=progress)
        for warning in files.parameters.warnings:
            console.warn(warning)
        weights = int8_weights(files, settings)
        with console.loading(f"reading {settings.model}", stored_bytes(files, weights)) as bar:
            errors = measure_weights(files, weights, bar.advance)
        _finish(settings, errors, None, {}, args.json, console)
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        console.error("stopped")
        return EXIT_FAILURE
    return EXIT_DONE


def _inspect_run(
    config: RunConfig, saved: Path | None, num_rows: int, out: Path | None, console: Console
) -> None:
    """Measure weights and losses of a run's base model; ``saved`` is the run's output folder."""
    phase = console.phase("importing torch, transformers and deepspeed", announce=True)
    with phase, fast_imports():
        from trainer.commands.inspect.losses import all_arms, measure_losses, trained_prompts
        from trainer.commands.inspect.weights import int8_weights, measure_weights, stored_bytes
        from trainer.data.tokenization.chat_template import read_chat_date
        from trainer.distributed.deepspeed_engine import Engine, device_name
        from trainer.distributed.model_loading import open_base_on_all
        from trainer.reporting.run_description import versions
        from trainer.training.task_loading import load_tasks_per_node

    engine = Engine(config.engine.timeout_seconds)
    files = open_base_on_all(engine, config.base, console)
    date = read_chat_date(saved) if saved else None
    tasks = load_tasks_per_node(engine, files, config, console, date, splits=("validation",))
    if config.base.quantization == "none":
        console.print("this run has base.quantization: none; these are the errors of int8")
    settings = _in_int8(config.base)
    config = config.model_copy(update={"base": settings})
    weights = engine.run_on_all(lambda: int8_weights(files, settings))
    by_size = sorted(weights, key=lambda weight: weight.location.shape.numel())
    mine = by_size[engine.rank :: engine.world_size]
    with console.loading(f"reading {settings.model}", stored_bytes(files, mine)) as bar:
        measured = engine.run_on_all(lambda: measure_weights(files, mine, bar.advance))
    by_name = {error.name: error for of_rank in engine.all_gather(measured) for error in of_rank}
    errors = [by_name[weight.name] for weight in weights]
    trained = trained_prompts(saved, config) if saved else {}
    arms = all_arms(config, tasks, list(trained), num_rows)
    losses = None
    if arms:
        losses = measure_losses(engine, files, config, arms, list(trained.values()), console)
    else:
        console.print("no task has validation rows, so there are no losses to compare")
    if engine.is_main:
        run = {
            "world_size": engine.world_size,
            "device": device_name(engine.device),
            "versions": versions(),
        }
        _finish(settings, errors, losses, run, out, console)
    engine.close()


def _in_int8(base: Base) -> Base:
    return base.model_copy(update={"quantization": "int8"})


def _finish(
    settings: Base,
    errors: Sequence[WeightError],
    losses: dict[str, Any] | None,
    run: dict[str, Any],
    out: Path | None,
    console: Console,
) -> None:
    """Print the tables; write JSON, with the entries of ``run``, if a file is given.

    Raises:
        BadInput: the file cannot be written.
    """
    from trainer.commands.inspect.findings import collect_findings, show

    findings = collect_findings(settings, errors, losses) | run
    show(findings, console)
    if out == STDOUT:
        console.answer(to_json(findings, indent=2))
    elif out is not None:
        try:
            atomic_io.write_json(out, findings)
        except OSError as error:
            raise BadInput(f"--json: cannot write {out}: {error.strerror}") from None
        console.print(f"all numbers: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module trainer.commands.inspect",
        description="Measure the errors of int8. `promptshard inspect --base` starts this program.",
    )
    parser.add_argument("target", metavar="RUN.yaml|RUN_DIR|MODEL")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--model", action="store_true", help="the target is a model")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows of each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all numbers; -: stdout")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    return parser


if __name__ == "__main__":
    flush_and_exit(main())
