"""From an error to the sentence that a user can act on; errors of the program itself have none."""

from __future__ import annotations


def sentence(error: Exception) -> str | None:
    """What to say of it; None where it is a mistake of ours, whose traceback is wanted."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed; go on without --compile ({_telling_line(error)})"
    if out_of_memory(error):
        first = str(error).partition("\n")[0] or type(error).__name__
        return f"out of memory; a smaller --batch or --size, a --micro-batch or a smaller network needs less ({first})"
    return None


TOO_LARGE = (
    "can't allocate memory",
    "integer multiplication overflow",  # more bytes than numbers count
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what torch means, on a GPU or a CPU."""
    known = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return known or (isinstance(error, RuntimeError) and any(said in str(error) for said in TOO_LARGE))


def _telling_line(error: Exception) -> str:
    """Of a compiler's message, what says most in fewest words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "Error" in line or "not found" in line), lines[0] if lines else "no reason given"
    )
