"""Random sentences in front of a prompt, so that a key is not that of one context alone."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host

_TOP_K = 5


def sampled_prefixes(
    host: Host, starts: Sequence[str], lengths: Sequence[int], seed: int
) -> tuple[str, ...]:
    """Sentences that a model makes up, each to stand in front of a prompt.

    Args:
        host: The model.
        starts: What each begins with; `""` begins with the tokenizer's BOS, or end of text, alone.
        lengths: Tokens of each, its start included.
        seed: Of the random numbers; the same seed gives the same sentences.

    Returns:
        Texts that end in `". "`.

    Raises:
        EditError: If the model has no tokenizer, or one without a token to begin with.
    """
    tokenizer = host.tokenizer
    if tokenizer is None:
        raise EditError("the model has no tokenizer, so no prefixes can be sampled; set one on it")
    first = next(
        (
            token_id
            for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
            if token_id is not None and 0 <= token_id < host.d_vocab
        ),
        None,
    )
    if first is None and "" in starts:
        raise EditError("the tokenizer has neither a BOS nor an EOS token to sample prefixes from")
    bare = [] if first is None else [int(first)]
    prompts = [tokenize_prompts(host, start, False)[0].ids if start else bare for start in starts]
    n_new = [max(1, n - len(prompt)) for n, prompt in zip(lengths, prompts, strict=True)]
    # Hashed, so that the next seed has no prefix in common with this one.
    seeds = [
        int(sha256(f"{seed} {place}".encode()).hexdigest()[:15], 16) for place in range(len(starts))
    ]
    drawn = sample(host, prompts, n_new, top_k=_TOP_K, seeds=seeds)
    texts = [
        start + host.vocabulary.decode(tokens) if tokens else start
        for start, tokens in zip(starts, drawn, strict=True)
    ]
    return tuple(f"{' '.join(text.split())}. " for text in texts)
