"""A run, from a checked run file to results: wires the parts in the order of the data.

run file -> base files, tasks -> tokens -> sharded base -> bank -> loop -> adapters, summary, report
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import checkpoint
from trainer.base.files import BaseFiles, open_base
from trainer.base.linear import multiply_in_int8, resolve_matmul
from trainer.base.loading import LoadStats, load_base
from trainer.base.model import PromptedBase
from trainer.base.skeleton import build_skeleton
from trainer.config import PROJECT_ROOT, Base, RunConfig, dump, resolve_path
from trainer.console import Console
from trainer.engine import Engine, base_bytes, compute_dtype, resolve_policy
from trainer.errors import BadInput
from trainer.evaluation import LOWER_IS_BETTER, Evaluator
from trainer.export import save_peft
from trainer.loop import Loop
from trainer.optimization import make_optimizer
from trainer.placement import Placement
from trainer.prompts.bank import Bank
from trainer.redact import redact
from trainer.report import write_report
from trainer.tasks.feed import Feed, TaskData, load_tasks
from trainer.tracking import MetricsLog, Sender, check_uri

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "datasets", "mlflow")
#: Settings that may change when a run goes on; every other one of these sections must not.
MAY_CHANGE = {"training.micro_batch_tokens", "training.max_skipped_updates"}
#: How long the end of a run waits for the tracker: a file on a busy machine is only slow, a server
#: may be down.
LOCAL_STORE_SECONDS, SERVER_SECONDS, FAILED_SECONDS = 90.0, 20.0, 3.0
#: Where files lie may change; what they hold may not, and is compared by its digest.
PATHS = {"model", "revision", "train", "validation", "shifted_validation"}
MUST_STAY = ("base", "tasks", "prompts", "training")


@dataclass(frozen=True)
class LoadedBase:
    """The base on this rank's device, sharded and attached."""

    model: PromptedBase
    stats: LoadStats
    dtype: torch.dtype
    placement: Placement
    matmul: str


def train(config: RunConfig, console: Console, *, fresh: bool, command: str) -> None:
    """Train all prompts of a run, or go on where its output folder says it stopped.

    Raises:
        BadInput: for what a person can mend, on all ranks together.
    """
    output = Path(config.output_dir)
    engine = Engine(config.engine.timeout_seconds)
    engine.together(lambda: check_uri(config.tracking.uri))
    files = engine.together(lambda: open_base(config.base))
    tasks = engine.together(
        lambda: load_tasks(config, files.tokenizer, files.context_length, files.config.vocab_size)
    )
    if fresh:
        engine.together(lambda: _put_aside(output, console) if engine.is_main else None)
    identity = _identity(config, files, tasks)
    saved = engine.broadcast(
        engine.together(lambda: _find_checkpoint(output, identity) if engine.is_main else None)
    )
    if engine.broadcast(_is_finished(output) if engine.is_main else None):
        console.say(f"{output} holds this run, finished; --fresh would train it anew")
        _show_results(json.loads((output / "summary.json").read_text()), config, console)
        engine.close()
        return

    loaded = load(engine, config.base, files, config, console)
    bank = Bank(
        config,
        _embedder(loaded.model, engine.device),
        files.tokenizer,
        files.config.vocab_size,
        loaded.model.hidden_size,
        engine.device,
        make_optimizer=make_optimizer,
    )
    evaluator = Evaluator(engine, loaded.model, files.tokenizer, config.training.micro_batch_tokens)
    feed = Feed(config, tasks)
    log = MetricsLog(output) if engine.is_main else None

    def save(loop: Loop) -> None:
        if engine.is_main:
            _save_checkpoint(output, loop, identity, console)

    loop = Loop(
        config,
        engine,
        evaluator,
        tasks,
        bank,
        feed,
        console,
        log=log.log if log else lambda *_: None,
        save=save,
    )
    if saved is not None:
        tensors, state = saved
        bank.load_state(tensors, state["bank"])
        loop.load_state(state["loop"])
        console.say(f"going on from step {loop.progress.step} of {config.training.steps}")
    if not engine.is_main:
        loop.run()
        _measure(engine, loop, loaded)
        engine.close()
        return

    assert log is not None
    log.rewind(loop.progress.step)
    _describe_run(output, config, engine, loaded, tasks, command)
    with _tracked(output, config.tracking.uri, console) as ended:
        loop.run()
        ended |= _finish(output, loop, loaded, files, _measure(engine, loop, loaded), console)
        _show_results(ended, config, console)
    engine.close()


def load(
    engine: Engine, settings: Base, files: BaseFiles, config: RunConfig, console: Console
) -> LoadedBase:
    """Read, quantise, shard and attach the base, with a progress bar."""
    dtype = compute_dtype(settings.dtype, engine.device)
    policy = engine.together(lambda: resolve_policy(config, dtype, files.config.hidden_size))
    setting = config.engine.gradient_checkpointing
    checkpointing = engine.device.type != "cpu" if setting == "auto" else setting
    # All that can be wrong without reading weights is found here, before minutes of reading.
    skeleton = engine.together(lambda: build_skeleton(files, settings, dtype, engine.device))
    matmul = engine.together(
        lambda: resolve_matmul(
            settings.matmul, settings.quantization, engine.device, files.config.hidden_size
        )
    )
    if matmul == "int8":
        multiply_in_int8(skeleton)
    offload = policy["zero_optimization"].get("offload_param", {}).get("device") == "cpu"
    placement = engine.place(skeleton, config, dtype, offload=offload)
    policy = resolve_policy(config, dtype, files.config.hidden_size, placement)
    share = files.num_bytes // placement.group_size
    with console.loading(f"loading {settings.model}", share) as bar:
        base, stats = load_base(
            skeleton,
            files,
            dtype=dtype,
            device=engine.device,
            shard=engine.sharder(policy, placement.group_size),
            checkpointing=checkpointing,
            progress=bar.advance,
        )
    engine.attach(base, policy, placement.kept_bytes)
    return LoadedBase(base, stats, dtype, placement, matmul)


def _embedder(base: nn.Module, device: torch.device) -> Any:
    """Word embeddings [n, H] of token ids; gathers the table, so every rank calls it alike."""

    def embed(token_ids: Any) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.as_tensor(token_ids, device=device)
            embedded: torch.Tensor = base(ids, []).float()
            return embedded

    return embed


def _put_aside(output: Path, console: Console) -> None:
    """Move an earlier run out of the way; nothing is deleted."""
    kept = [path for path in output.iterdir() if path.name != "logs"]
    if not kept:
        return
    if not (output / "run.yaml").exists():
        raise BadInput(f"--fresh: {output} holds other things than a run; give another output_dir")
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for path in kept:
        shutil.move(str(path), aside / path.name)
    console.say(f"an earlier run was put aside: {aside}")


def _identity(config: RunConfig, files: BaseFiles, tasks: Mapping[str, TaskData]) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, by the setting's name."""
    settings = config.model_dump(mode="json")
    identity: dict[str, Any] = {}
    for section in MUST_STAY:
        for key, value in _flatten(section, settings[section]):
            if key not in MAY_CHANGE and key.split(".")[-1] not in PATHS:
                identity[key] = value
    identity["base files"] = files.fingerprint
    for name, data in tasks.items():
        for source in data.sources:
            identity[f"data of {name}, {source['split']}"] = source["digest"]
    return identity


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}", inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from _flatten(f"{prefix}.{inner['name']}", inner)
    else:
        yield prefix, value


def _find_checkpoint(output: Path, identity: Mapping[str, Any]) -> tuple[Any, Any] | None:
    saved = checkpoint.newest(output / "checkpoints")
    if saved is None:
        return None
    before = saved.state["identity"]
    problems = [
        f"{key}: is {identity.get(key)!r}, but {output} was begun with {before.get(key)!r}"
        for key in sorted(identity.keys() | before.keys())
        if identity.get(key) != before.get(key)
    ]
    if problems:
        raise BadInput(
            [*problems, f"{output}: give another output_dir, or --fresh to put that run aside"]
        )
    return saved.tensors, saved.state


def _is_finished(output: Path) -> bool:
    try:
        summary = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(summary.get("status") == "finished")


def _save_checkpoint(
    output: Path, loop: Loop, identity: Mapping[str, Any], console: Console
) -> None:
    tensors, bank = loop.bank.state()
    state = {"identity": identity, "bank": bank, "loop": loop.state()}
    try:
        checkpoint.save(
            output / "checkpoints", loop.progress.step, tensors, state, loop.config.checkpoint.keep
        )
    except OSError as error:
        console.warn(f"step {loop.progress.step}: no checkpoint written: {error}; training goes on")


def _describe_run(
    output: Path,
    config: RunConfig,
    engine: Engine,
    loaded: LoadedBase,
    tasks: Mapping[str, TaskData],
    command: str,
) -> None:
    (output / "run.yaml").write_text(redact(dump(_anywhere(config))), encoding="utf-8")
    environment = {
        "versions": versions(),
        "python": platform.python_version(),
        "world_size": engine.world_size,
        "device": device_name(engine.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "matmul": loaded.matmul,
        "host": platform.node(),
        "git_revision": git_revision(),
        "command": redact(command),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    _write_json(output / "environment.json", environment)
    _write_json(output / "datasets.json", [s for data in tasks.values() for s in data.sources])


def _anywhere(config: RunConfig) -> RunConfig:
    """The run file with the base's folder in full, so that it is found from any working folder."""
    folder = resolve_path(config.base.model)
    if not folder.is_dir():
        return config
    base = config.base.model_copy(update={"model": str(folder.resolve())})
    return config.model_copy(update={"base": base})


@contextmanager
def _tracked(output: Path, uri: str | None, console: Console) -> Iterator[dict[str, Any]]:
    """The tracker's process around the run; the summary says how the run ended."""
    (output / "summary.json").unlink(missing_ok=True)
    sender = Sender(output, uri)
    sender.start()
    ended: dict[str, Any] = {}
    try:
        yield ended
    except BaseException as error:
        summary = {"status": "failed", "error": redact(str(error))}
        _write_json(output / "summary.json", summary)
        # The launcher ends this rank a second after another has failed: say why before the tracker
        # is waited for.
        if isinstance(error, Exception):
            console.failure(error)
        sender.finish(FAILED_SECONDS)
        raise
    else:
        local = uri is None and "MLFLOW_TRACKING_URI" not in os.environ
        finished = sender.finish(LOCAL_STORE_SECONDS if local else SERVER_SECONDS)
        if finished.complete:
            console.say(f"curves:  {finished.message}")
        else:
            console.warn(finished.message)


def _measure(engine: Engine, loop: Loop, loaded: LoadedBase) -> dict[str, Any]:
    """Memory, traffic and load of all ranks; a collective."""
    on_gpu = engine.device.type == "cuda"
    mine = [
        base_bytes(loaded.model),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        torch.cuda.max_memory_allocated() if on_gpu else 0,
        loaded.stats.seconds,
        loaded.stats.bytes_read,
        loop.train_gathered_bytes,
    ]
    base, rss, gpu, seconds, read, gathered = zip(*engine.all_gather(mine), strict=True)
    steps = max(1, loop.steps_here)
    progress = loop.progress
    return {
        "throughput": {
            "useful_tokens_per_second": progress.useful_tokens / max(progress.train_seconds, 1e-9),
            "useful_tokens": progress.useful_tokens,
            "train_seconds": progress.train_seconds,
        },
        "memory": {
            "base_bytes_per_rank": max(base),
            "kept_bytes_per_rank": engine.kept_bytes,
            "ranks_per_copy": loaded.placement.group_size,
            "peak_rss_bytes": max(rss),
            "peak_gpu_bytes": max(gpu) if on_gpu else None,
        },
        "communication": {"gathered_bytes_per_step": max(gathered) / steps},
        "load": {"seconds": max(seconds), "bytes_read_per_rank": max(read)},
        "versions": versions(),
        "world_size": engine.world_size,
    }


def _finish(
    output: Path,
    loop: Loop,
    loaded: LoadedBase,
    files: BaseFiles,
    measured: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Write adapters, summary and report."""
    config, bank = loop.config, loop.bank
    shape = {
        "num_layers": files.config.num_hidden_layers,
        "num_attention_heads": files.config.num_attention_heads,
    }
    prompts: dict[str, Any] = {}
    for k, prompt in enumerate(config.prompts):
        scores = loop.progress.scores.get(prompt.name, {})
        folder = output / "prompts" / prompt.name
        said = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        for where, title, virtual_tokens in (
            (folder, prompt.name, bank.best(k)),
            (folder / "last", f"{prompt.name} (last step)", bank.snapshot(k)),
        ):
            if not virtual_tokens.isfinite().all():
                console.warn(f"prompt {title!r}: its virtual tokens are not finite; not saved")
                continue
            save_peft(
                where,
                virtual_tokens,
                config.base.model,
                config.base.revision,
                title=title,
                description=f"Task {prompt.task}. {said}".strip(),
                **shape,
            )
        prompts[prompt.name] = {
            "task": prompt.task,
            "method": prompt.method,
            "num_virtual_tokens": prompt.num_virtual_tokens,
            "best_step": loop.stopping[prompt.name].best_step or loop.progress.step,
            "skipped_updates": loop.progress.skipped.get(prompt.name, 0),
            **scores,
        }
    summary = {
        "status": "finished",
        "steps": loop.progress.step,
        "prompts": prompts,
        "tasks": loop.progress.baselines,
        "data": {name: data.counts for name, data in loop.tasks.items()},
        **measured,
    }
    _write_json(output / "summary.json", summary)
    try:
        write_report(output)
    except Exception as error:  # the results are there; a picture of them must not lose them
        console.warn(f"no report written: {type(error).__name__}: {error}")
    return summary


def _show_results(summary: Mapping[str, Any], config: RunConfig, console: Console) -> None:
    output = config.output_dir
    for task in config.tasks:
        baseline = summary["tasks"].get(task.name, {})
        metric = task.metric
        better = min if metric in LOWER_IS_BETTER else max
        columns = [f"validation_{metric}", f"shifted_validation_{metric}"]
        if metric not in LOWER_IS_BETTER:
            columns.append("validation_loss")
        rows = [("no prompt", baseline.get("no_prompt", {}))]
        if baseline.get("hand_written"):
            best = better(baseline["hand_written"], key=lambda scores: scores.get(columns[0], 0.0))
            rows.append((f"hand-written: {best['text'].strip()}", best))
        rows += [
            (f"trained: {name} ({scores['num_virtual_tokens']} virtual tokens)", scores)
            for name, scores in summary["prompts"].items()
            if scores["task"] == task.name
        ]
        shown = [column for column in columns if any(column in scores for _, scores in rows)]
        console.table(
            task.name,
            ["", *(column.replace("_", " ") for column in shown)],
            [[name, *(_number(scores.get(column)) for column in shown)] for name, scores in rows],
        )
    speed = summary["throughput"]["useful_tokens_per_second"]
    console.say(
        f"{summary['steps']} steps, {speed:,.0f} useful tokens/s, adapters in {output}/prompts"
    )
    console.say(f"report:  {output}/report.html")
    name = next(iter(summary["prompts"]))
    console.say(f'try it:  promptshard generate {output} --prompt {name} --input "..."')


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_revision() -> str | None:
    """Commit of the running code, with ``+changed`` if files differ; None outside a clone."""
    try:
        revision, changes = (
            subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *what],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changed" if changes else "")


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
