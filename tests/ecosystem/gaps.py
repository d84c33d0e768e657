"""A tokenizer and a collator of transformers, which pads and draws the gaps of a masked language model: gaps:collate."""

from foreign_parts import LENGTH, WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[END]": 3}
vocabulary |= {f"word{index}": index for index in range(4, WORDS)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")),
    pad_token="[PAD]",
    unk_token="[UNK]",
    mask_token="[MASK]",
    model_max_length=LENGTH,
)
collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
