"""The program of every rank: load the base, then decode; rank 0 also runs the HTTP server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from trainer.api import base_digests
from trainer.commands.serve.access import Access
from trainer.commands.serve.app import make_app
from trainer.commands.serve.metrics import Metrics
from trainer.commands.serve.options import Options
from trainer.commands.serve.service import BASE_NAMES, ServedModel, Service
from trainer.inference.engine import open_engine
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.opened_base import open_inference_base, settings_of
from trainer.inference.saved_run import SavedRun, TrainedPrompt
from trainer.inference.stream import Limits, StreamingDecoder
from trainer.model.attention.batch_cache import SPARE
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime import stop_signals
from trainer.runtime.console import Console
from trainer.runtime.log_folder import inference_logs

#: Seconds in which clients receive the rest of their answers when the server stops.
STOP_SECONDS = 10


def serve(
    options: Options,
    run: SavedRun,
    chosen: Sequence[TrainedPrompt],
    token: str | None,
    console: Console,
) -> None:
    """Serve prompts of a run until a stop signal; on all ranks.

    Raises:
        BadInput: on all ranks, before the base is loaded.
    """
    engine = open_engine(run.config.engine.timeout_seconds)
    engine.start_watchdog(inference_logs(options.run_dir), run.config.engine.silence_seconds)
    listening = engine.run_on_all(lambda: options.bind() if engine.is_main else None)
    digests = engine.run_on_main(lambda: base_digests(options.run_dir))
    opened = open_inference_base(engine, run, console, prompts=chosen, digests=digests)
    base = opened.load(console)
    models = served_models(base, chosen)
    prompts = [model.prompt for model in models.values() if model.prompt is not None]
    most_tokens = base.loaded.budget.generation_tokens(SPARE) * engine.world_size
    limits = Limits(options.concurrent, most_tokens, options.waiting)
    stop_signals.defer()
    server: HttpServer | None = None

    def note_end(error: BaseException | None) -> None:
        assert server is not None
        server.should_exit = True

    decoder = StreamingDecoder(engine, base.loaded.model, prompts, limits, note_end)
    if listening is None:
        decoder.run()
        base.close()
        return
    service = Service(decoder, base.files, models, base.date, options.max_tokens)
    server = HttpServer(service, options, token, console.detail)
    console.print(_announcement(models, options, listening))
    with decoder.running():
        server.run(sockets=[listening])
    if decoder.failure is not None:
        raise decoder.failure
    console.print("stopped")
    base.close()


class HttpServer(uvicorn.Server):
    """The HTTP server of rank 0, which stops at a stop signal to any rank."""

    def __init__(
        self,
        service: Service,
        options: Options,
        token: str | None,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        metrics = Metrics()
        app = Access(
            make_app(service, metrics),
            metrics,
            token=token,
            local_only=options.is_loopback and token is None,
            max_bytes=options.request_bytes,
            log=log,
        )
        connections = 2 * (options.concurrent + options.waiting) + 100
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=connections,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)
        self._decoder = service.decoder

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to ``stop_signals``."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """End running answers when the server stops."""
        ends = await super().on_tick(counter) or stop_signals.stop_requested()
        if ends:
            self._decoder.close()
        return ends


def served_models(base: InferenceBase, chosen: Sequence[TrainedPrompt]) -> dict[str, ServedModel]:
    """Return the prompts and, last, the base alone."""
    models = {}
    for prompt in chosen:
        created = int((prompt.folder / WEIGHTS).stat().st_mtime)
        values = base.soft_prompt(prompt)
        model = ServedModel(prompt.name, prompt.task, values, prompt.placement, created)
        models[prompt.name] = model
    name = next(name for name in BASE_NAMES if name not in models)
    plain = settings_of(base.config.base).tasks[0]
    return models | {name: ServedModel(name, plain, None)}


def _announcement(
    models: dict[str, ServedModel], options: Options, listening: socket.socket
) -> str:
    port = listening.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    names = ", ".join(list(models)[:8]) + (", ..." if len(models) > 8 else "")
    return f"serving {names} at http://{host}:{port}/v1 (Ctrl-C stops the server)"
