"""Fill-in-middle at document level, in the prefix, suffix, middle order (report section 4.1).

<fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>
"""

from __future__ import annotations

import numpy as np


def cut_in_three(text: str, random: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text, cut at two random characters."""
    first, second = sorted(random.integers(0, len(text) + 1, size=2).tolist())
    return text[:first], text[first:second], text[second:]
