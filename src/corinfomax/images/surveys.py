"""Facts about a set of images that take a look at every file: kept beside the cached images, for the next command."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from corinfomax.images.files import Source, default_cache
from corinfomax.runtime import run_folder

SURVEY_FORMAT = 1  # raise it with every change of what is kept


def survey_once(
    question: str, sources: Sequence[Source], cache: Path | None, look: Callable[[], tuple[Any, bool]]
) -> Any:
    """The answer of `look` to a question about these images, as JSON has it: kept until one of their files changes.

    `look` also says whether to keep it.
    """
    names, stamps = (hashlib.blake2b(digest_size=16) for _ in range(2))
    names.update(f"{SURVEY_FORMAT} {question}".encode())
    for source in sources:
        names.update(os.fsencode("\0".join((source.root, *source.paths))))
        stamps.update(source.stamps.tobytes())
    path = (cache or default_cache()).absolute() / "surveys" / f"{names.hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged
        kept = json.loads(path.read_text("utf-8"))
        if kept["stamps"] == stamps.hexdigest():
            return kept["answer"]
    answer, keep = look()
    if keep:
        with suppress(OSError):  # the next command looks again
            run_folder.write_text(path, json.dumps({"stamps": stamps.hexdigest(), "answer": answer}))
    return answer
