"""Language models with a tokenizer of a few words, in folders, as users have them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("<pad>", "<unk>", "<s>", "</s>", "a", "cat", "Once", "upon", "time", "Tell", "me", "more")


def save_text_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers in float16, and a tokenizer that splits at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(WORDS), max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder
