"""Streamed text equals that of ``generate``, for every combination of requests in a batch."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.random_base import save_random
from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from tests.soft_prompts import soft_prompts
from tests.thread_ranks import on_thread_ranks
from tests.tokenizers_of_families import BYTE_LEVEL, SENTENCE_PIECE, make_tokenizer
from trainer.config import Base
from trainer.evaluation.generation import generate
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.inference import stream_schedule
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream import Busy, Limits, StreamingDecoder
from trainer.inference.stream_text import WINDOW, Piece, TextPieces
from trainer.model.attention.batch_cache import SPARE, BatchCache
from trainer.model.checkpoint_files import open_base
from trainer.prompts.soft_prompt import VirtualTokens

H, LAYERS, HEADS, HEAD = 64, 3, 2, 16
GREEDY = Sampling()
SIZES = [(4, H), (7, H), (5, LAYERS, 2, HEADS, HEAD)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return open_base(Base(model=str(folder))).tokenizer


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return soft_prompts([torch.randn(size, generator=generator) * 0.3 for size in SIZES])


@pytest.fixture(scope="module")
def requests(tokenizer: Any, prompts: Any) -> list[GenerationRequest]:
    """Requests of every prompt and none, with different lengths, limits, places and ends."""
    draw = random.Random(0)
    made = []
    for i in range(24):
        ids = tuple(draw.randrange(3, 300) for _ in range(draw.randrange(1, 20)))
        prompt = [None, *prompts][i % 4]
        at = draw.randrange(len(ids)) if isinstance(prompt, VirtualTokens) else 0
        # Some words end a text; others are stop strings.
        ends = frozenset(draw.sample(range(3, 300), 5 * (i % 3)))
        strings = tuple(f"w{n} " for n in draw.sample(range(3, 300), 5 * (i % 2)))
        stop = StopCriteria(tokenizer, ends, strings)
        made.append(GenerationRequest(ids, at, prompt, stop, draw.randrange(1, 25)))
    return made


@pytest.fixture(scope="module")
def generated(folder: Path, requests: Sequence[GenerationRequest]) -> list[str]:
    """What ``generate`` writes for each request alone."""
    base = load_unsharded(folder, "int8")
    texts = []
    for request in requests:
        (generated,) = generate(
            *(OneRank(), base, request.stop, [request.input_ids], request.prompt),
            request.max_new_tokens,
            prompt_at=[request.prompt_at],
        )
        texts.append(request.stop.text(generated.ids, skip_special_tokens=True))
    return texts


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def decode_all(decoder: StreamingDecoder, requests: Sequence[GenerationRequest]) -> list[str]:
    """Stream requests from a thread each."""
    texts = [""] * len(requests)

    def read(i: int) -> None:
        texts[i] = text_of(list(decoder.stream(requests[i])))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


@pytest.mark.parametrize("ranks", [1, 2])
def test_text_equals_generate(folder, prompts, requests, generated, ranks, monkeypatch):
    """Fewer rows than requests, which join and leave in small groups."""
    monkeypatch.setattr(stream_schedule, "READ_TOKENS", 40)

    bases = [load_unsharded(folder, "int8") for _ in range(ranks)]

    def program(engine: OneRank) -> tuple[list[str], int, int]:
        base = bases[engine.rank]
        limits = Limits(rows=6, tokens=400)
        decoder = StreamingDecoder(engine, base, prompts, limits)
        if not engine.is_main:
            decoder.run()
            return [], 0, 0
        with decoder.running():
            texts = decode_all(decoder, requests)
        return texts, decoder.rows, decoder.generated

    if ranks == 1:
        texts, rows, count = program(OneRank())
    else:
        texts, rows, count = on_thread_ranks([0, 1], program)[0]
    assert texts == generated
    assert rows == 0
    assert count >= sum(map(bool, generated))


def test_pieces_are_delivered_as_early_as_the_text_is_settled(folder, prompts, requests, generated):
    base = load_unsharded(folder, "int8")
    decoder = StreamingDecoder(OneRank(), base, prompts)
    longest = max(range(len(requests)), key=lambda i: len(generated[i]))
    with decoder.running():
        pieces = list(decoder.stream(requests[longest]))
        (single,) = read_at_end(decoder, requests[longest])
    assert text_of(pieces) == single.text == generated[longest]
    assert len(pieces) > 5
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == single.finish
    assert [token for piece in pieces for token in piece.tokens] == list(single.tokens)


def read_at_end(
    decoder: StreamingDecoder, request: GenerationRequest, sampling: Sampling = GREEDY
) -> list[Piece]:
    pieces: list[Piece] = []
    ended = threading.Event()

    def note(piece: Piece) -> None:
        pieces.append(piece)
        ended.set()

    decoder.submit(request, sampling, note, at_end=True)
    assert ended.wait(20)
    return pieces


class Letters:
    """A tokenizer whose tokens are the bytes of a text in UTF-8."""

    clean_up_tokenization_spaces = False

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["a€b", "é\ufffd", "xxSTO STSTOP later", "ST", "SSTOSTOP", ""])
def test_incomplete_characters_and_stop_strings_are_delayed(text):
    stop = StopCriteria(Letters(), frozenset(), ("STOP", "€b"))  # type: ignore[arg-type]
    ids = list(text.encode())
    pieces, writer = [], TextPieces(stop)
    for end in range(1, len(ids) + 1):
        pieces.append(writer.next(ids[:end]))
        final = stop.text(ids)
        assert final.startswith("".join(pieces)), "nothing is written that is not final"
    pieces.append(writer.next(ids, is_last=True))
    assert "".join(pieces) == stop.text(ids)


class Recorded:
    """A tokenizer that records how many tokens are decoded at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.sizes = tokenizer, list[int]()
        self.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> Any:
        self.sizes.append(len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", [*SENTENCE_PIECE, *BYTE_LEVEL])
@pytest.mark.parametrize("cleans", [False, True])
def test_pieces_of_long_texts_decode_only_the_last_tokens(kind: str, cleans: bool) -> None:
    draw = random.Random(0)
    words = [
        "The",
        " patient",
        " rests ",
        ".",
        " , it",
        " 's",
        "\n",
        "  ",
        "naïve",
        "脈",
        "🫀🫁",
        "é",
    ]
    text = "".join(draw.choices(words, k=600))
    tokenizer = make_tokenizer(kind, [text[:300], "patient rests"], 400)
    tokenizer.clean_up_tokenization_spaces = cleans
    recorded = Recorded(tokenizer)
    stop = StopCriteria(recorded, frozenset([2]), ("no such text",))  # type: ignore[arg-type]
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, 2]
    assert len(ids) > 10 * WINDOW
    writer = TextPieces(stop)
    pieces = [writer.next(ids[:end]) for end in range(1, len(ids) + 1)]
    pieces.append(writer.next(ids, is_last=True))
    assert max(recorded.sizes) <= 3 * WINDOW
    assert "".join(pieces) == stop.text(ids, skip_special_tokens=True)


def test_text_after_an_invalid_byte_is_delivered() -> None:
    """Decoding replaces all of a run of byte tokens by U+FFFD if one of them is invalid."""
    tokenizer = make_tokenizer("prepend", ["rests"])
    byte = tokenizer.convert_tokens_to_ids("<0x00>")
    ids = [byte + value for value in [*"🫀".encode(), 0xF0]]
    ids += tokenizer("the patient rests", add_special_tokens=False).input_ids
    writer = TextPieces(StopCriteria(tokenizer, frozenset()))
    text = "".join(writer.next(ids[:end]) for end in range(1, len(ids) + 1))
    assert text.startswith("🫀")
    assert (text + writer.next(ids, is_last=True)).endswith("the patient rests")


def test_sampling_follows_the_seed_and_top_p(folder, prompts, tokenizer):
    base = load_unsharded(folder, "int8")
    stop = StopCriteria(tokenizer, frozenset())
    decoder = StreamingDecoder(OneRank(), base, prompts)

    def draw(**settings: Any) -> list[int]:
        sampling = Sampling(**({"temperature": 1.0, "top_logprobs": 3} | settings))
        (piece,) = read_at_end(
            decoder, GenerationRequest((5, 6), 0, prompts[0], stop, 12), sampling
        )
        for token in piece.tokens:
            values = [value for _, value in token.top]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert token.logprob is not None
            assert token.logprob <= values[0] + 1e-6
        return [token.token_id for token in piece.tokens]

    with decoder.running():
        assert draw(seed=7) == draw(seed=7)
        assert len({tuple(draw(seed=seed)) for seed in range(5)}) == 5
        assert len({tuple(draw()) for _ in range(3)}) == 3
        greedy = draw(temperature=0.0)
        assert draw(top_p=1e-6) == greedy == draw(temperature=1e-4)


def test_buffers_of_keys_follow_the_rows_that_are_left():
    """Room for short rows that have left is not kept when a long row joins, or rows grow."""
    batch = BatchCache()

    def join(tokens: int) -> None:
        read = DynamicCache()
        read.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), 0)
        batch.add(read, [tokens])

    def stored() -> int:
        """Tokens for which the memory has room."""
        return int(batch.layers[0].keys.untyped_storage().nbytes()) // (2 * 4)

    def leave(kept: int) -> None:
        while len(batch.lengths) > kept:
            batch.remove(0)

    for _ in range(64):
        join(100)
    leave(1)
    join(8_000)
    assert stored() <= SPARE * 2 * 8_100
    leave(0)
    for _ in range(64):
        join(100)
    leave(1)
    token = torch.zeros(1, 1, 1, 2)
    for _ in range(1_000):
        batch.layers[0].update(token, token)
        batch.note_step()
    assert stored() <= SPARE * 2 * 1_100


def test_a_cancelled_request_leaves_and_too_many_are_refused(folder, prompts, tokenizer):
    base = load_unsharded(folder, "int8")
    stop = StopCriteria(tokenizer, frozenset())
    decoder = StreamingDecoder(OneRank(), base, prompts, Limits(rows=1, waiting=1))
    endless = GenerationRequest((5, 6), 0, None, stop, 100_000)
    with decoder.running():
        first = decoder.stream(endless)
        assert next(first).text
        waiting: list[Piece] = []
        queued = decoder.submit(endless, GREEDY, waiting.append)
        with pytest.raises(Busy):
            decoder.submit(endless, GREEDY, waiting.append)
        decoder.cancel(queued)
        assert [piece.finish for piece in waiting] == ["cancelled"]
        first.close()
        assert (
            text_of(list(decoder.stream(GenerationRequest((5, 6), 0, None, stop, 3)))).count(" ")
            == 2
        )
        left = decoder.stream(endless)
        next(left)
    assert list(left)[-1].finish == "cancelled", "closing the decoder ends its requests"
    assert (decoder.rows, decoder.num_running, decoder.num_waiting) == (0, 0, 0)


def test_an_error_while_decoding_reaches_every_request(folder, prompts, tokenizer):
    base = load_unsharded(folder, "int8")
    ended: list[Any] = []
    decoder = StreamingDecoder(OneRank(), base, prompts, on_end=ended.append)
    stop = StopCriteria(tokenizer, frozenset())
    with decoder.running():
        with pytest.raises(RuntimeError, match="decoding has failed"):
            list(decoder.stream(GenerationRequest((100_000,), 0, None, stop, 3)))
        with pytest.raises(RuntimeError, match="decoding has failed"):
            list(decoder.stream(GenerationRequest((5,), 0, None, stop, 3)))
    assert ended == [decoder.failure]
    assert isinstance(decoder.failure, IndexError)
