"""``promptshard serve`` on two ranks: answers, a stop signal to one rank, and a killed rank."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from os import kill
from pathlib import Path

import openai
import pytest

from benchmarks.unsharded_base import load_unsharded
from launch.launcher_command import free_port
from tests import preloaded
from tests.distributed.conftest import environments
from tests.one_rank import OneRank
from tests.unit.saved_run import TINY, save_run
from trainer.config import Base
from trainer.evaluation.generation import generate
from trainer.inference.requests import text_request
from trainer.inference.saved_run import open_run
from trainer.model.checkpoint_files import open_base

TEXTS = ["Chest pain since noon.", "The pulse is irregular.", "A cough.", "Hello"]
NAMES = ["short", "long", "words"]

#: Ranks and a client of their server.
Served = tuple[list[preloaded.Process], openai.OpenAI]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Return a function that starts two ranks and waits until they serve."""
    save_run(tmp_path)
    with ExitStack() as stack:

        def start() -> Served:
            port = free_port()
            ranks = [
                preloaded.start(
                    "trainer.commands.serve",
                    *(str(tmp_path), f"--port={port}"),
                    environ=environ,
                    stdout=tmp_path / f"out-{rank}.log",
                    stderr=None,
                )
                for rank, environ in enumerate(environments(2))
            ]
            for rank in ranks:
                stack.callback(rank.kill)
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
            )
            while True:
                with suppress(openai.APIConnectionError):
                    client.models.list()
                    return ranks, client
                assert [rank.poll() for rank in ranks] == [None, None]
                time.sleep(0.2)

        yield start


def generated(folder: Path) -> dict[tuple[str, str], str]:
    """What ``generate`` writes on one rank."""
    base, files = load_unsharded(TINY, "none"), open_base(Base(model=str(TINY)))
    answers = {}
    for name in NAMES:
        prompt = open_run(folder).prompts[name]
        for text in TEXTS:
            request = text_request(
                *(files, prompt.task, text, prompt.soft_prompt, prompt.position, 8, None)
            )
            (written,) = generate(
                *(OneRank(), base, request.stop, [request.input_ids], request.prompt),
                request.max_new_tokens,
                prompt_at=[request.prompt_at],
            )
            answers[name, text] = request.stop.text(written.ids, skip_special_tokens=True)
    return answers


def test_answers_equal_one_rank_until_a_signal_to_any_rank_stops_all(
    tmp_path: Path, serve: Callable[[], Served]
) -> None:
    ranks, client = serve()
    wanted = generated(tmp_path)

    def ask(name: str, text: str) -> str:
        answer = client.completions.create(model=name, prompt=text, max_tokens=8)
        return answer.choices[0].text

    with ThreadPoolExecutor(len(wanted)) as threads:
        texts = list(threads.map(lambda key: ask(*key), wanted))
    assert dict(zip(wanted, texts, strict=True)) == wanted
    running = client.completions.create(model="base", prompt="A", max_tokens=400, stream=True)
    next(iter(running))
    kill(ranks[1].pid, signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(running)
    assert [rank.wait(60) for rank in ranks] == [0, 0]


def test_a_killed_rank_ends_the_server(serve: Callable[[], Served]) -> None:
    ranks, client = serve()
    running = client.completions.create(model="base", prompt="A", max_tokens=400, stream=True)
    next(iter(running))
    kill(ranks[1].pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the server has failed"):
        list(running)
    assert ranks[0].wait(60) == 1
