"""The tokenizer: byte-level BPE in which every answer is one token."""

from __future__ import annotations

import random
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from facts_model.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 3072
CONTEXT = 256
DOCUMENTS = 6_000
# With this weight, the merges of the answers are learned before nearly all others.
ANSWER_COPIES = 5_000
SEED = 1


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a sample of the corpus.

    Args:
        corpus: Source of the text.

    Returns:
        A fast tokenizer whose end-of-text token is bos, eos and unk.

    Raises:
        ValueError: If an answer with its leading space is not a single token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    documents = islice(corpus.documents(random.Random(SEED)), DOCUMENTS)
    text = ["".join(piece.text for piece in document) for document in documents]
    text += [f" {answer}" for answer in corpus.answers] * ANSWER_COPIES
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    split = [a for a in corpus.answers if len(tokenizer.encode(f" {a}").ids) != 1]
    if split:
        raise ValueError(f"answers of several tokens: {split}; raise ANSWER_COPIES or VOCABULARY")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
