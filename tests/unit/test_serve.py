"""The HTTP server with OpenAI's own client, on the tiny base in this process."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from benchmarks.unsharded_base import load_unsharded
from tests.command_line import promptshard
from tests.one_rank import OneRank
from tests.soft_prompts import soft_prompts
from tests.tokenizers_of_families import BYTE_LEVEL, SENTENCE_PIECE, make_tokenizer
from tests.unit.saved_run import save_run
from trainer.commands.serve import access
from trainer.commands.serve.answers import Answers, ChatAnswers, CompletionAnswers
from trainer.commands.serve.app import event
from trainer.commands.serve.bodies import CompletionBody
from trainer.commands.serve.metrics import Metrics
from trainer.commands.serve.options import Options, parse
from trainer.commands.serve.program import HttpServer
from trainer.commands.serve.service import ServedModel, Service
from trainer.commands.serve.token_texts import TokenTexts
from trainer.config import Base, Task
from trainer.evaluation.generation import generate
from trainer.evaluation.token_sampling import ScoredToken
from trainer.inference.requests import GenerationRequest, dialogue_request, text_request
from trainer.inference.stream import Limits, StreamingDecoder
from trainer.inference.stream_text import Piece
from trainer.model.checkpoint_files import BaseFiles, open_base
from trainer.model.prompted_model import PromptedBase
from trainer.runtime.errors import BadInput

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_base"
TOKEN = "0123456789abcdef"
TEXTS = ["Chest pain since this morning.", "My bill is wrong", "", "Where is 'the' café?"]


@dataclass
class World:
    """What a server serves."""

    files: BaseFiles
    base: PromptedBase
    models: dict[str, ServedModel]

    def service(self, limits: Limits) -> Service:
        prompts = [model.prompt for model in self.models.values() if model.prompt is not None]
        decoder = StreamingDecoder(OneRank(), self.base, prompts, limits)
        return Service(decoder, self.files, self.models, max_tokens=64)

    def generated(self, request: GenerationRequest) -> str:
        """What ``generate`` writes."""
        (generated,) = generate(
            *(OneRank(), self.base, request.stop, [request.input_ids], request.prompt),
            request.max_new_tokens,
            prompt_at=[request.prompt_at],
        )
        return request.stop.text(generated.ids, skip_special_tokens=True)

    def completion(self, name: str, text: str, most: int) -> str:
        model = self.models[name]
        return self.generated(
            text_request(*(self.files, model.task, text, model.prompt, model.position, most, None))
        )


@pytest.fixture(scope="module")
def world() -> World:
    files, base = open_base(Base(model=str(TINY))), load_unsharded(TINY, "int8")
    config, draw = base.model.config, torch.Generator().manual_seed(0)
    heads = config.num_key_value_heads
    past = (6, config.num_hidden_layers, 2, heads, config.hidden_size // config.num_attention_heads)
    ids = torch.randint(base.vocab_size, (10,), generator=draw)
    words = base(ids, []).embeddings_TH.float().split(5)
    one, two, three = soft_prompts([*words, 0.1 * torch.randn(past, generator=draw)])
    plain = {"name": "t", "train": "x.jsonl", "target": " {a}", "max_new_tokens": 12}
    answer = Task(**plain, input="{text}\nAnswer:", stop=["."])
    inside = Task(**plain, input="Read {virtual_tokens} {text}\n")
    chat = Task(name="t", train="x.jsonl", messages="messages", max_new_tokens=12)
    models = [
        ServedModel("answer", answer, one),
        ServedModel("inside", inside, two),
        ServedModel("prefix", answer, three),
        ServedModel("system", chat, two, "system"),
        ServedModel("base", Task(**plain, input="{text}"), None),
    ]
    return World(files, base, {model.name: model for model in models})


class Running:
    """A server that listens on a free port."""

    def __init__(self, service: Service, token: str | None, **options: Any) -> None:
        settings = Options(Path(), host="127.0.0.1", port=0, **options)
        listening = settings.bind()
        self.service, self.lines = service, list[str]()
        self.server = HttpServer(service, settings, token, self.lines.append)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, args=(listening,))

    def _run(self, listening: socket.socket) -> None:
        with self.service.decoder.running():
            self.server.run(sockets=[listening])

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(**self.settings(**settings))

    def settings(self, **settings: Any) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": TOKEN, "max_retries": 0} | settings

    def send(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Send a raw request; return status and body."""
        fields = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, fields | names)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        _, text = self.send("/metrics")
        return sum(map(float, re.findall(rf"^promptshard_serve_{name}\S* (\S+)$", text, re.M)))

    def wait_until_idle(self) -> None:
        """Return when no request is left; the test's timeout ends the wait."""
        names = ("running", "waiting", "cache_rows")
        while any(self.metric(name) for name in names) or self.metric("open_requests") > 1:
            time.sleep(0.05)


_SAMPLE = re.compile(
    r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (\S+)'
)


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """Values by name and labels; asserts the rules of Prometheus' text format 0.0.4."""
    assert text.endswith("\n")
    values: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, current, _ = line.split(" ", 3)
            assert current not in kinds, "one group of lines for each metric"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert (name, kind in ("counter", "gauge", "summary")) == (current, True)
            kinds[name] = kind
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample is not None, line
            name, labels, value = sample[1], sample[2] or "", float(sample[3])
            ends = ("_sum", "_count") if kinds[current] == "summary" else ("",)
            assert name in [current + end for end in ends]
            assert (name, labels) not in values
            assert kinds[current] != "counter" or (name.endswith("_total") and value >= 0)
            values[name, labels] = value
    return values


@contextmanager
def running(service: Service, token: str | None = None, **options: Any) -> Iterator[Running]:
    one = Running(service, token, **options)
    one.thread.start()
    try:
        while not one.server.started:
            time.sleep(0.01)
        yield one
    finally:
        one.server.should_exit = True
        one.thread.join(30)
        assert not one.thread.is_alive()


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:
    with running(world.service(Limits(rows=16, waiting=300)), request_bytes=20_000) as one:
        yield one


def test_completions_equal_generate(world: World, server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == list(world.models)
    for name in world.models:
        if name == "system":
            continue  # a chat
        wanted = [world.completion(name, text, 10) for text in TEXTS if text]
        sent = {"model": name, "prompt": [text for text in TEXTS if text], "max_tokens": 10}
        assert [choice.text for choice in client.completions.create(**sent).choices] == wanted
        streamed = [""] * len(wanted)
        for chunk in client.completions.create(**sent, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == wanted
    # The default of max_tokens is the task's.
    answer = client.completions.create(model="answer", prompt=TEXTS[0])
    assert answer.choices[0].text == world.completion("answer", TEXTS[0], 12)
    assert answer.usage is not None
    assert answer.usage.total_tokens > answer.usage.completion_tokens > 0


def test_chats_equal_generate(world: World, server: Running) -> None:
    client = server.client()
    dialogue: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": [{"type": "text", "text": "What now?"}]},
    ]
    turns = [*dialogue[:3], {"role": "user", "content": "What now?"}]
    for name in ("system", "answer", "prefix", "base"):
        model = world.models[name]
        wanted = world.generated(
            dialogue_request(
                *(world.files, model.task, turns, model.prompt, model.position, 10, None)
            )
        )
        sent = {"model": name, "messages": dialogue, "max_completion_tokens": 10}
        answer = client.chat.completions.create(**sent)
        assert answer.choices[0].message.content == wanted
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = client.chat.completions.create(**sent, **options)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == wanted
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
        assert last.usage == answer.usage


def test_sampling_stop_strings_and_log_probabilities(world: World, server: Running) -> None:
    client = server.client()
    base: dict[str, Any] = {"model": "base", "prompt": "The patient", "max_tokens": 12}
    text = world.completion("base", "The patient", 12)
    stop = text[len(text) // 2 :][:3]
    (choice,) = client.completions.create(**base, stop=[stop, "\x00"], logprobs=2).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []).startswith(choice.text)
    assert {len(top) for top in choice.logprobs.top_logprobs or []} == {2}

    sampled: dict[str, Any] = {**base, "temperature": 1.5, "seed": 3, "n": 3}
    texts = [choice.text for choice in client.completions.create(**sampled).choices]
    assert texts == [choice.text for choice in client.completions.create(**sampled).choices]
    assert len(set(texts)) == 3

    chat = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
    )
    assert chat.choices[0].logprobs is not None
    for token in chat.choices[0].logprobs.content or []:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob), "greedy"
        assert bytes(token.bytes or []).decode() == token.token


@pytest.mark.parametrize("kind", [*SENTENCE_PIECE, *BYTE_LEVEL])
def test_log_probabilities_name_tokens_by_their_text_and_bytes(kind: str) -> None:
    """Spaces are kept, and characters of several tokens can be joined from their bytes."""
    tokenizer = make_tokenizer(kind, ["Yes it rests. Yes"], 400)
    ids = tokenizer("it Yes it", add_special_tokens=False).input_ids
    ids += tokenizer("é🫀 rests", add_special_tokens=False).input_ids
    tokens = [ScoredToken(i, -0.5, ((i, -0.5),)) for i in ids]
    text = tokenizer.decode(ids)

    def written(kind_of_answer: type[Answers], *parts: Sequence[ScoredToken]) -> list[Any]:
        answers = kind_of_answer("m", TokenTexts(tokenizer), frozenset(), 1, 1, scored=True)
        pieces = [Piece("", tuple(part)) for part in parts]
        chunks = [answers.chunk(0, piece) for piece in pieces]
        return [chunk["choices"][0]["logprobs"] for chunk in chunks]

    (scores,) = written(CompletionAnswers, tokens)
    words, offsets = scores["tokens"], scores["text_offset"]
    assert "".join(words[:3]) in ("it Yes it", " it Yes it")
    for word, offset in list(zip(words, offsets, strict=True))[1:]:
        assert word.startswith("bytes:\\x") or text[offset:].startswith(word)
    assert any(word.startswith("bytes:\\x") for word in words)
    parts = written(CompletionAnswers, tokens[:2], tokens[2:7], tokens[7:])
    assert [offset for part in parts for offset in part["text_offset"]] == offsets
    (chat,) = written(ChatAnswers, tokens)
    data = b"".join(bytes(token["bytes"]) for token in chat["content"])
    assert data.decode().removeprefix(" ") == text
    vocabulary = [i for token, i in tokenizer.get_vocab().items() if not token.startswith("<0x")]
    (names,) = written(CompletionAnswers, [ScoredToken(i, -0.5) for i in vocabulary])
    assert len(set(names["tokens"])) == len(vocabulary), "top_logprobs are by name"


def test_200_requests_at_the_same_time_leave_nothing(world: World, server: Running) -> None:
    """Streamed and not, of all models; every fifth client disconnects while it reads."""
    draw = random.Random(0)
    names = [name for name in world.models if name != "system"]
    sent = [
        (draw.choice(names), draw.choice([text for text in TEXTS if text]), draw.randrange(1, 9))
        for _ in range(200)
    ]
    wanted = {one: world.completion(*one) for one in set(sent)}
    ended: list[str] = []

    async def ask(client: openai.AsyncOpenAI, i: int, name: str, text: str, most: int) -> None:
        body: dict[str, Any] = {"model": name, "prompt": text, "max_tokens": most}
        if i % 5 == 0:
            stream = await client.completions.create(**body | {"max_tokens": 64}, stream=True)
            async for _ in stream:
                break
            await stream.close()
            ended.append("disconnected")
            return
        if i % 5 == 1:
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**body | {"max_tokens": 64}, timeout=0.001)
            ended.append("disconnected")
            return
        if i % 2:
            stream = await client.completions.create(**body, stream=True)
            got = "".join([chunk.choices[0].text async for chunk in stream])
        else:
            got = (await client.completions.create(**body)).choices[0].text
        ended.append("equal" if got == wanted[name, text, most] else f"{got!r}")

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(**server.settings(timeout=120)) as client:
            await asyncio.gather(*(ask(client, i, *one) for i, one in enumerate(sent)))

    asyncio.run(ask_all())
    assert sorted(set(ended)) == ["disconnected", "equal"]
    assert len(ended) == 200
    server.wait_until_idle()
    decoder = server.service.decoder
    assert (decoder.rows, decoder.num_running, decoder.num_waiting) == (0, 0, 0)
    assert not any(TEXTS[0] in line or TOKEN in line for line in server.lines)


def test_an_event_is_one_line_for_clients_that_split_at_all_line_ends() -> None:
    value = {"text": "é \x0b\x0c\x1c\x85\u2028\u2029\r\n."}
    line, end = event(value).splitlines()
    assert (json.loads(line.removeprefix("data: ")), end) == (value, "")
    assert "é" in line


def test_metrics_are_in_the_format_of_prometheus(server: Running) -> None:
    client = server.client()
    before = parse_metrics(server.send("/metrics")[1])
    client.completions.create(model="answer", prompt="Hello", max_tokens=3)
    after = parse_metrics(server.send("/metrics")[1])

    def grown(name: str, labels: str) -> float:
        key = f"promptshard_serve_{name}", labels
        return after[key] - before.get(key, 0)

    assert grown("http_requests_total", 'path="/v1/completions",status="200"') == 1
    assert grown("answer_seconds_count", 'model="answer"') == 1
    assert 1 <= grown("generated_tokens_total", "") <= 3
    first = "first_token_seconds_count", 'model="answer"'
    assert ("promptshard_serve_" + first[0], first[1]) not in after or grown(*first) == 0
    list(client.completions.create(model="answer", prompt="Hello", max_tokens=3, stream=True))
    after = parse_metrics(server.send("/metrics")[1])
    assert grown(*first) == 1, "only of answers that are streamed"
    metrics = Metrics()
    metrics.note_answer('a "b"\\c\nd', 1.5, 0.5)
    labels = r'model="a \"b\"\\c\nd"'
    assert (
        parse_metrics(metrics.text({}, {}))["promptshard_serve_answer_seconds_sum", labels] == 1.5
    )


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "base", "prompt": "Hello", "max_tokens": 2} | changes).encode()


def test_the_limit_of_the_server_leaves_more_room_for_the_input(world: World) -> None:
    service = replace(world.service(Limits()), max_tokens=2)
    room = world.files.context_length - service.models["base"].task.max_new_tokens
    (request,) = service.completions(CompletionBody(model="base", prompt=" a" * (room + 5)))
    assert len(request.input_ids) > room
    assert request.max_new_tokens == 2


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("path", "sent", "status", "param", "words"),
    [
        ("completions", b"{", 400, "body", "not valid JSON"),
        ("completions", b"[" * 9_000, 400, None, "cannot be read"),
        ("completions", b"[]", 400, "body", "no JSON object"),
        ("completions", b"\xff\xfe", 400, "body", "not valid JSON"),
        ("completions", b"", 400, "body", ""),
        ("completions", body(prompt=None), 400, "prompt", ""),
        ("completions", body(prompt=[1, 2]), 400, "prompt", ""),
        ("completions", body(prompt=""), 400, "prompt", "0 tokens"),
        ("completions", body(prompt="\ud800"), 400, "prompt", "valid Unicode"),
        ("completions", body(prompt="word " * 3_000), 400, "prompt", "shorten it"),
        ("completions", body(max_tokens=0), 400, "max_tokens", "greater"),
        ("completions", body(max_tokens="2"), 400, "max_tokens", "integer"),
        ("completions", body(max_tokens=65), 400, "max_tokens", "--max-tokens"),
        ("completions", body(temperature=3), 400, "temperature", "less"),
        ("completions", body(top_p=0), 400, "top_p", "greater"),
        ("completions", body(n=129), 400, "n", "128"),
        ("completions", body(n=100, prompt=["a", "b"]), 400, "n", "128"),
        ("completions", body(stop=[""]), 400, "stop", ""),
        ("completions", body(seed=2**64), 400, "seed", ""),
        ("completions", body(best_of=2), 400, "best_of", "not supported"),
        ("completions", body(colour=2), 400, "colour", "not supported"),
        ("completions", body(model="anwser"), 404, "model", "did you mean 'answer'"),
        ("completions", body(prompt="x" * 30_000), 413, None, "--max-request-bytes"),
        ("chat/completions", body(), 400, "messages", "required"),
        ("chat/completions", b'{"model": "base", "messages": []}', 400, "messages", ""),
        ("completion", body(), 404, None, "/v1/completions"),
    ],
)
def test_wrong_requests_are_refused_with_the_remedy(
    server: Running, path: str, sent: bytes, status: int, param: str | None, words: str
) -> None:
    got, text = server.send(f"/v1/{path}", sent)
    error = json.loads(text)["error"]
    assert (got, error["param"]) == (status, param), error
    assert words in error["message"]


def test_fields_without_effect_are_accepted_as_clients_send_them() -> None:
    plain = {"model": "base", "prompt": "x", "n": 2}
    neutral = {
        **{"best_of": 2, "echo": False, "frequency_penalty": 0.0, "suffix": None, "user": "me"},
        **{"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "ignore_eos": False},
    }
    both = [CompletionBody.model_validate(each) for each in (plain, plain | neutral)]
    assert both[0] == both[1]
    for name, value in {"best_of": 3, "repetition_penalty": 1.1, "top_k": 5}.items():
        with pytest.raises(ValueError, match=f"{name}: is not supported; leave it out"):
            CompletionBody.model_validate(plain | {name: value})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "assistant", "content": "x"}], "end with the user's"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, MESSAGE],
            "messages.0.tool_calls: is not supported; leave it out",
        ),
    ],
)
def test_wrong_dialogues_are_refused(server: Running, messages: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        server.client().chat.completions.create(model="base", messages=messages)


def test_a_chat_without_the_text_around_the_virtual_tokens_is_refused(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        server.client().chat.completions.create(model="inside", messages=[MESSAGE])


def test_requests_after_errors_are_answered(world: World, server: Running) -> None:
    """A body in chunks that never ends, no body, a closed connection, other protocols."""
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    parts = [
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n",
        head + b"Content-Length: 50\r\n\r\n{",
        b"\x16\x03\x01 not http\r\n\r\n",
        b"",
    ]
    for part in parts:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(part)
    server.wait_until_idle()
    assert server.send("/v1/completions", body())[0] == 200


def test_a_body_must_arrive_in_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.05)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Content-Length: 50\r\n\r\n{")
        assert b"408" in connection.recv(100)


def test_other_hosts_and_wrong_tokens_are_refused(world: World, server: Running) -> None:
    status, text = server.send("/v1/models", Host="evil.example")
    assert (status, json.loads(text)["error"]["code"]) == (403, "invalid_host")
    assert server.send("/v1/models", Host="localhost:80")[0] == 200
    with running(world.service(Limits()), TOKEN) as guarded:
        assert guarded.send("/health", Authorization="")[0] == 200
        assert guarded.send("/v1/models", Host="gpu-7.example")[0] == 200
        for wrong in ("", TOKEN, f"Bearer {TOKEN}x", "Bearer ", "Bearer \xe9"):
            status, text = guarded.send("/metrics", Authorization=wrong)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            guarded.client(api_key="another").models.list()
        assert len(list(guarded.client().models.list())) == len(world.models)
        assert guarded.lines
        assert not any(TOKEN in line for line in guarded.lines)


def test_full_servers_refuse_and_stopping_ends_answers(world: World) -> None:
    """One answer at a time, and one that waits."""
    service = replace(world.service(Limits(rows=1, waiting=1)), max_tokens=None)
    with running(service) as full:
        client = full.client()
        endless = {"model": "base", "prompt": "Hello", "max_tokens": 400, "stream": True}
        first = client.completions.create(**endless)
        next(iter(first))
        second = client.completions.create(**endless)
        with pytest.raises(openai.RateLimitError, match="--max-waiting") as refused:
            client.completions.create(**endless)
        assert refused.value.response.headers["retry-after"] == "5"
        with pytest.raises(openai.BadRequestError, match="more than 2; lower n"):
            client.completions.create(**endless | {"n": 3})
        second.close()
        while full.metric("waiting"):
            time.sleep(0.02)
        ends: list[str] = []

        def ask() -> None:
            try:
                client.completions.create(model="base", prompt="Hello", max_tokens=400)
            except openai.InternalServerError as error:
                ends.append(str(error))

        third = threading.Thread(target=ask)
        third.start()
        while not full.metric("waiting"):
            time.sleep(0.02)
        full.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(first)
        third.join(20)
        assert len(ends) == 1
        assert "the server is stopping" in ends[0]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--host", "0.0.0.0"], "PROMPTSHARD_SERVE_TOKEN"),
        (["--host", "203.0.113.9", "--no-token"], "not an address of this machine"),
        (["--token-file", "missing"], "cannot be read"),
    ],
)
def test_wrong_addresses_and_tokens_are_refused(words: Sequence[str], problem: str) -> None:
    options = parse(["run", *words])

    def check() -> None:
        options.read_token()
        options.bind()

    with pytest.raises(BadInput, match=problem):
        check()


def test_options_reach_the_ranks_and_tokens_do_not(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    options = Options(Path("run"), ("a", "-b"), "::1", 0, str(file), True, 3, 4, 5, 6)
    assert parse(options.arguments()) == options
    assert options.read_token() == TOKEN
    assert TOKEN not in str(options.arguments())
    monkeypatch.setenv("PROMPTSHARD_SERVE_TOKEN", "short")
    with pytest.raises(BadInput, match="16 or more"):
        Options(Path("run")).read_token()


def test_a_port_in_use_is_named_before_ranks_start(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=f"--port: {port} .* give another --port"):
            Options(tmp_path, port=port).bind()


def test_runs_and_extras_that_are_missing_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    refused = promptshard("serve", tmp_path / "none")
    assert refused.returncode == 2
    assert "no such folder" in refused.stderr
    run = save_run(tmp_path / "run")
    refused = promptshard("serve", run, "--prompt", "shrt")
    assert refused.returncode == 2
    assert "did you mean 'short'" in refused.stderr
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = promptshard("serve", run)
    assert refused.returncode == 2
    assert "pip install 'promptshard[serve]'" in refused.stderr
