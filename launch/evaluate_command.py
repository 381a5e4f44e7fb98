"""The command ``promptshard evaluate``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, messages, preflight
from launch.arguments import Processes, RunDir, as_path, option
from launch.start import start_ranks
from trainer.commands.evaluate.options import Options
from trainer.commands.evaluate.selection import check_data, selected_run
from trainer.evaluation.metric_sums import METRICS
from trainer.evaluation.pass_at_k import TOP_P, Samples
from trainer.runtime.errors import BadInput


class SelectOn(enum.StrEnum):
    """Rows on which the best prompt is chosen."""

    ALL = "all"
    HALF = "half"


class Retriever(enum.StrEnum):
    """What makes train rows similar to a row."""

    BM25 = "bm25"
    COSINE = "cosine"


def evaluate(
    run_dir: RunDir,
    task: Annotated[
        list[str] | None, option("NAME", "Only this task; repeatable. [default: all]")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        option(
            "NAME",
            "Only this trained prompt; repeatable. [default: all]",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        option("FILE", "Rows in place of the task's validation rows.", callback=as_path),
    ] = None,
    rows: Annotated[
        int | None,
        option("N", "At most N rows per task, selected by a hash of their content.", min=2),
    ] = None,
    metric: Annotated[
        str | None,
        option(
            "NAME",
            f"One of {', '.join(METRICS)}, or pass@k, such as pass@10: the probability that one of "
            "k sampled answers passes all tests (Chen et al. 2021). [default: the task's]",
        ),
    ] = None,
    n_samples: Annotated[
        int | None,
        option(
            "N",
            "With pass@k: answers sampled per row, at least k; more give narrower intervals. "
            f"[default: {Samples().count}]",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        option(
            "T",
            f"With pass@k: temperature of these answers, sampled with top_p {TOP_P}; 0.2 suits "
            f"pass@1, 0.8 larger k. [default: {Samples().temperature}]",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        option(
            "K",
            "Also K fixed train rows with answers in the context, the same ones for every row.",
            min=1,
        ),
    ] = None,
    retrieved: Annotated[
        int | None,
        option(
            "K",
            "Also the K train rows most similar to each row, without and with each trained prompt.",
            min=1,
        ),
    ] = None,
    retriever: Annotated[
        Retriever,
        typer.Option(
            help="What is similar: words (BM25), or the base's own mean hidden states (cosine), "
            "for which the base reads all train rows once."
        ),
    ] = Retriever.BM25,
    knn: Annotated[
        int | None,
        option(
            "K",
            "Also kNN prompting (Xu et al. 2023): the majority answer of the K train rows whose "
            "next-token distributions are most similar. With --shots, after the fixed examples.",
            min=1,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        option(
            "DIR",
            "Also a PEFT adapter in safetensors: LoRA, IA3, virtual tokens, prefix; repeatable.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Accept adapters that name another base. If it is not the same model at another "
            "place, their scores mean nothing.",
        ),
    ] = False,
    select_on: Annotated[
        SelectOn,
        typer.Option(
            help="Choose the best prompt and text on all rows, or on one half, and report all "
            "scores on the other half."
        ),
    ] = SelectOn.ALL,
    robustness: Annotated[
        bool,
        typer.Option(
            "--robustness",
            help="Also score shifted_validation, and rows in lower case, without punctuation, "
            "with typos, with the template's columns in the other order, and with the "
            "task's paraphrases.",
        ),
    ] = False,
    json_file: Annotated[
        str | None,
        option(
            "FILE",
            "Output file for all numbers; -: stdout. [default: RUN_DIR/evaluation.json]",
            "--json",
            callback=as_path,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Score all rows again, also those scored before.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Compare trained prompts with hand-written ones, examples in context and adapters.

    All are scored on the same validation rows: score with 95% interval, difference to the best
    trained prompt (paired by row: exact McNemar test for rates, permutation test for pass@k, else
    bootstrap), calibration, and cost per query. Predictions are written to
    `RUN_DIR/predictions/evaluation` while rows are scored; an interrupted evaluation continues
    there, and a finished one only prints its table.

    **Examples:**

    - `promptshard evaluate runs/quickstart`
    - `promptshard evaluate runs/quickstart --task triage --shots 3 --retrieved 3 --knn 5`
    - `promptshard evaluate runs/quickstart --task triage --data test.jsonl --select-on half`
    - `promptshard evaluate runs/quickstart --robustness`
    - `promptshard evaluate runs/codegen --metric pass@10 --n-samples 20 --temperature 0.8`
    - `promptshard evaluate runs/quickstart --adapter adapters/lora --json -`
    """
    if retriever is Retriever.COSINE and retrieved is None:
        raise BadInput("--retriever: is used with --retrieved K only; add it")
    preflight.check_result(run_dir)
    if json_file not in (None, "-"):
        json_file = str(preflight.check_new_file(Path(json_file or "")))
    options = Options(
        Path(run_dir),
        tuple(task or ()),
        tuple(prompt or ()),
        data,
        rows,
        metric,
        n_samples,
        temperature,
        tuple(adapter or ()),
        force=force,
        shots=shots,
        retrieved=retrieved,
        retriever=retriever.value,
        knn=knn,
        robustness=robustness,
        select_on=select_on.value,
        json=json_file,
        fresh=fresh,
    )
    run = selected_run(options)
    for note in check_data(run, options):
        messages.note(note)
    output = str(preflight.measurements_folder(run_dir))
    report = start_ranks("trainer.commands.evaluate", options.arguments(), output, processes, None)
    messages.show(report)
    raise typer.Exit(report.code)
