"""Compare virtual tokens with the vocabulary, with their start, and with each other.

Nearest tokens can be arbitrary (Khashabi et al. 2022, arXiv 2112.08348): read them beside controls.

Shape letters: V vocabulary, H hidden size, P virtual tokens, N virtual tokens of several prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedTokenizerBase

#: Tokens whose embeddings are looked up together.
CHUNK = 4096


@dataclass(frozen=True)
class VocabularyScan:
    """The vocabulary's norms, and the tokens that are most similar to some vectors.

    Attributes:
        norms_V: sorted.
        cosine, product: for each vector, token ids and similarities of the nearest, best first.
    """

    norms_V: Tensor
    cosine: list[list[tuple[int, float]]]
    product: list[list[tuple[int, float]]]

    @property
    def mean_norm(self) -> float:
        return float(self.norms_V.mean())

    def percentile(self, norm: float) -> float:
        """Share of the vocabulary with a smaller norm, from 0 to 100."""
        return 100 * int(torch.searchsorted(self.norms_V, norm)) / len(self.norms_V)


@torch.no_grad()
def scan_vocabulary(
    embed: Callable[[Sequence[int]], Tensor],
    token_ids: Sequence[int],
    vectors_NH: Tensor,
    count: int,
    advance: Callable[[float], None] = lambda tokens: None,
) -> VocabularyScan:
    """Find the tokens nearest to each vector by cosine and by inner product; a collective.

    Args:
        embed: token ids -> embeddings [n, H]; every rank calls it with the same ids.
        token_ids: of the vocabulary.
        count: number of tokens of each vector.
        advance: called with the number of tokens read since the last call.
    """
    vectors_NH = vectors_NH.float()
    unit_NH = normalize(vectors_NH, dim=1)
    best: list[tuple[Tensor, Tensor]] = []
    norms = []
    for start in range(0, len(token_ids), CHUNK):
        ids = list(token_ids[start : start + CHUNK])
        embedded_nH = embed(ids).float()
        norms.append(embedded_nH.norm(dim=1).cpu())
        of_chunk = (unit_NH @ normalize(embedded_nH, dim=1).T, vectors_NH @ embedded_nH.T)
        ids_n = torch.tensor(ids, device=vectors_NH.device)
        nearest = []
        for i, similarity_Nn in enumerate(of_chunk):
            values, places = similarity_Nn.topk(min(count, len(ids)), dim=1)
            kept_ids = ids_n[places]
            if best:
                values = torch.cat([best[i][0], values], dim=1)
                kept_ids = torch.cat([best[i][1], kept_ids], dim=1)
            values, order = values.topk(min(count, values.shape[1]), dim=1)
            nearest.append((values, kept_ids.gather(1, order)))
        best = nearest
        advance(len(ids))
    cosine, product = (
        [
            list(zip(ids, values, strict=True))
            for values, ids in zip(values_Nk.tolist(), ids_Nk.tolist(), strict=True)
        ]
        for values_Nk, ids_Nk in best
    )
    return VocabularyScan(torch.cat(norms).sort().values, cosine, product)


def vocabulary_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Return the ids of all tokens with an embedding; rows without a token are left out."""
    return sorted({i for i in tokenizer.get_vocab().values() if i < size})


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Decode a token; one that is a part of a character is shown as the vocabulary spells it."""
    text = str(tokenizer.decode([token_id]))
    return str(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text else text


def redundancy(prompt_PH: Tensor) -> list[tuple[int, float]]:
    """For each virtual token, the most similar other one and their cosine; empty for one token."""
    if len(prompt_PH) < 2:
        return []
    unit_PH = normalize(prompt_PH.float(), dim=1)
    cosine_PP = (unit_PH @ unit_PH.T).fill_diagonal_(-torch.inf)
    values, places = cosine_PP.max(dim=1)
    return list(zip(places.tolist(), values.tolist(), strict=True))


def prompt_similarity(prompts: Sequence[Tensor]) -> list[list[float]]:
    """Cosines between the mean virtual tokens [H] of prompts, which may differ in length.

    Source: SPoT (Vu et al. 2022, arXiv 2110.07904), section 4, "cosine similarity of average
    tokens".
    """
    means_KH = torch.stack([prompt_PH.float().mean(0) for prompt_PH in prompts])
    cosine_KK = cosine_similarity(means_KH[:, None], means_KH[None], dim=-1)
    matrix: list[list[float]] = cosine_KK.clamp(-1, 1).tolist()
    return matrix


def random_like(prompt_PH: Tensor, generator: torch.Generator) -> Tensor:
    """Draw random directions with the norms of a prompt's virtual tokens, fp32 on the CPU."""
    prompt_PH = prompt_PH.float().cpu()
    drawn_PH = torch.randn(prompt_PH.shape, generator=generator)
    norms_P1 = prompt_PH.norm(dim=-1, keepdim=True)
    return normalize(drawn_PH, dim=-1) * norms_P1
