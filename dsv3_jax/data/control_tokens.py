"""The control tokens, which never come from text: document boundaries, fill-in-middle, turns of a chat, thinking."""

from __future__ import annotations

# Spelled as published with DeepSeek-V3 and R1. The first three have ids 0, 1, 2; the others follow the text tokens.
BEGIN_OF_TEXT = "<｜begin▁of▁sentence｜>"
END_OF_TEXT = "<｜end▁of▁sentence｜>"
PADDING = "<｜▁pad▁｜>"
THINK = "<think>"
END_THINK = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

LEADING = (BEGIN_OF_TEXT, END_OF_TEXT, PADDING)
TRAILING = (THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)

# Names that other tokenizers give to the end and the beginning of a text, in the order in which they are tried.
END_NAMES = (END_OF_TEXT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
BEGIN_NAMES = (BEGIN_OF_TEXT, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
