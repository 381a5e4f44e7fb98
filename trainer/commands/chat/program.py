"""Answer the questions of a chat on all ranks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trainer.api import base_digests
from trainer.commands.chat.messages import Channel, Question, Reply
from trainer.evaluation.token_sampling import Sampling
from trainer.inference.engine import open_engine
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.opened_base import open_inference_base
from trainer.inference.requests import GenerationRequest, RequestNames, TooLong
from trainer.inference.saved_run import open_run
from trainer.inference.stream import Stream, StreamingDecoder
from trainer.inference.stream_text import Piece
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import inference_logs

#: The user types messages, and has the option of the command line.
NAMES = RequestNames("message", "--max-new-tokens")


def chat(run_dir: Path, channel: Channel | None, console: Console) -> None:
    """Load the base and answer questions until the channel is closed; on all ranks.

    Args:
        channel: on rank 0.

    Raises:
        BadInput: on all ranks, before the base is loaded.
    """
    run = open_run(run_dir)
    engine = open_engine(run.config.engine.timeout_seconds)
    engine.start_watchdog(inference_logs(run_dir), run.config.engine.silence_seconds)
    digests = engine.run_on_main(lambda: base_digests(run_dir))
    trained = list(run.prompts.values())
    opened = open_inference_base(engine, run, console, prompts=trained, digests=digests)
    base = opened.load(console)
    values = [base.soft_prompt(prompt) for prompt in trained]
    prompts = [prompt for prompt in values if prompt is not None]
    decoder = StreamingDecoder(engine, base.loaded.model, prompts)
    if channel is None:
        decoder.run()
    else:
        Answers(base, decoder, channel).run()
    base.close()


class Answers:
    """Answers questions on rank 0."""

    def __init__(self, base: InferenceBase, decoder: StreamingDecoder, channel: Channel) -> None:
        self._base, self._decoder, self._channel = base, decoder, channel
        self._running: dict[int, Stream] = {}

    def run(self) -> None:
        """Answer until the channel is closed; raises the error of a decoder that has failed."""
        with self._decoder.running():
            self._send(Reply(0, has_chat_template=bool(self._base.tokenizer.chat_template)))
            for question in self._channel.questions():
                if question.cancel:
                    if stream := self._running.pop(question.number, None):
                        self._decoder.cancel(stream)
                    continue
                try:
                    self._answer(question)
                except BadInput as error:
                    self._send(Reply(question.number, error="\n".join(error.problems)))
        if self._decoder.failure is not None:
            raise self._decoder.failure

    def _answer(self, question: Question) -> None:
        number = question.number
        request, dropped = make_request(self._base, question)
        if dropped:
            self._send(Reply(number, dropped=dropped))

        def on_piece(piece: Piece) -> None:
            self._send(Reply(number, piece.text, finish=piece.finish))

        self._running[number] = self._decoder.submit(request, Sampling(), on_piece)

    def _send(self, reply: Reply) -> None:
        with suppress(OSError):  # the command line has ended
            self._channel.send(reply)


def make_request(base: InferenceBase, question: Question) -> tuple[GenerationRequest, int]:
    """Make the request for an answer, without the oldest turns if all do not fit.

    The turn of the system is kept.

    Returns:
        The request, and the number of turns left out.

    Raises:
        BadInput: not even the last question fits, or the chat template rejects the dialogue.
    """
    turns = question.dialogue
    task = None if question.prompt is not None else base.config.tasks[0].name
    prompt, most = question.prompt, question.max_new_tokens
    if most is not None:  # leaves half of the context for the dialogue
        most = min(most, base.files.context_length // 2)
    if not question.chat_template:
        text = turns[-1]["content"]
        request = base.text_request(text, prompt, task=task, max_new_tokens=most, names=NAMES)
        return request, 0
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    kept = turns[len(system) :]
    while True:
        try:
            request = base.dialogue_request(
                [*system, *kept], prompt, task=task, max_new_tokens=most, names=NAMES
            )
        except TooLong:
            if len(kept) == 1:
                raise
            kept = kept[1:]
            while kept[0]["role"] != "user":
                kept = kept[1:]
        else:
            return request, len(turns) - len(system) - len(kept)
