"""Dialogues up to each learned turn -> one tree of tokens, in which common tokens occur once."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.data.tokenization.row_tokenizer import common_length

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as tokens: trunk and branches as in ``Example``.

    Attributes:
        spans: (start, stop) of the tokens of learned turns of the assistant, ascending and
            disjoint.
        merged: the tokenizer would merge the end of a turn with the beginning of the next one; they
            are tokenized separately, as in generation.
        omits: the chat template does not write a part of a learned turn.
        longest: number of tokens of the longest text.
        prompt_at: number of tokens before the virtual tokens.
    """

    ids: list[int]
    spans: Spans
    merged: bool = False
    omits: bool = False
    branches: Spans = field(default_factory=list)
    longest: int = 0
    prompt_at: int = 0


@dataclass(frozen=True)
class LearnedTurn:
    """A learned turn: the tokens of the dialogue up to it, of which start to stop are labels."""

    ids: list[int]
    start: int
    stop: int
    merged: bool = False
    omits: bool = False
    prompt_at: int = 0


Turns = list[LearnedTurn]


def join_turns(trunk: list[int], turns: Turns) -> Dialogue:
    """Join the dialogues up to each turn, so that their common tokens occur once."""
    turns = [turn for turn in turns if turn.start < turn.stop]
    place = turns[-1].prompt_at if turns else 0
    merged, omits = any(turn.merged for turn in turns), any(turn.omits for turn in turns)
    longest = len(trunk)
    ids, spans, branches, branch_ids = list(trunk), Spans(), Spans(), trunk
    texts = [(trunk, *divide(trunk, turns))]
    while texts[-1][2]:
        branch_ids = texts[-1][2][-1].ids
        texts.append((branch_ids, *divide(branch_ids, texts[-1][2])))
    for text, inside, _ in [texts[0], *reversed(texts[1:])]:  # branches in the dialogue's order
        shared = len(trunk) if text is trunk else common_length(text, trunk)
        shift, longest = len(ids) - shared, max(longest, len(text))
        if shared < place:
            raise ValueError(
                "the chat template rewrites the text before the virtual tokens once other turns "
                "follow; use another prompts.position"
            )
        if shared < len(text):
            branches.append((len(ids), shared))
            ids += text[shared:]
        for turn in inside:
            start, stop = turn.start, turn.stop
            spans += [(start, min(stop, shared))] if start < shared else []
            spans += [(max(start, shared) + shift, stop + shift)] if stop > shared else []
    return Dialogue(ids, sorted(spans), merged, omits, branches, longest, place)


def divide(text: list[int], turns: Turns) -> tuple[Turns, Turns]:
    """Divide turns into those whose dialogue is the beginning of a text, and the others."""
    inside, others = Turns(), Turns()
    for turn in turns:
        (inside if text[: turn.stop] == turn.ids[: turn.stop] else others).append(turn)
    return inside, others
