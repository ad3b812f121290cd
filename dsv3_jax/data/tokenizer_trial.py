"""Tries an untrusted tokenizer in a process of its own, under limits of memory and time.

The tokenizers library can take any amount of both for a small file, and prints a page of its own when it fails inside.
This file is also the program of that process, which imports nothing of this project, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

MEMORY = 4 * 2**30  # bytes of address space
SECONDS = 60


def try_tokenizer(definition: str, text: str, *, memory: int = MEMORY, seconds: int = SECONDS) -> str | None:
    """Builds a tokenizer and encodes a text with it, in a process of its own.

    Args:
      definition: the text of a tokenizer.json.
      text: what is encoded.
      memory: largest address space in bytes.
      seconds: longest time of CPU, and half of the longest time of the clock.

    Returns:
      What is wrong, or None where the tokenizer can be used (or where no process can be started).
    """
    if not sys.executable:
        return None
    task = json.dumps({"definition": definition, "text": text, "memory": memory, "seconds": seconds})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-X", "utf8", __file__]
    try:
        done = subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=2 * seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        done = None
    except OSError:
        return None
    if done is not None and done.returncode == 0:
        return json.loads(done.stdout)
    return f"it takes more than {memory / 2**30:g} GiB of memory or {seconds} s to load"


def _main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
        resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # systems without such limits
        pass
    import tokenizers

    problem = None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(task["definition"])
        tokenizer.encode_special_tokens = True
        tokenizer.encode(task["text"], add_special_tokens=False)
    except MemoryError:
        raise
    except BaseException as error:  # a Rust panic is no Exception
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    print(json.dumps(problem))


if __name__ == "__main__":
    _main()
