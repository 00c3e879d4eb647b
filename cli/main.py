"""The `assay` command's entry: next to nothing is imported before Ctrl-C, and an import that fails, are heard."""

import errno
import os
import sys
from typing import TextIO

INTERRUPTED = 130  # as a shell says of a program that SIGINT ended
# bytes of addresses: less has been seen to end the process while it starts, with 2 threads and with 64
NEEDED, NEEDED_BY_A_THREAD = 10**9, 32 * 10**6


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exits 0 matches, 1 diverges or invalid, 2 could not be carried out, 130 on Ctrl-C, 141 if nobody reads the output.
    What nobody foresaw is 2 as well, with its traceback: Python's own 1 would say that a backend diverges.
    """
    try:
        _require_addresses()
        from assay.cli.app import run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if _is_out_of_memory(error):
            tell(_out_of_memory())
        elif isinstance(error, OSError):
            tell(str(error) if error.filename or not error.errno else f"a file cannot be read: {error.strerror}")
        else:
            sys.excepthook(*sys.exc_info())
            tell("ended by the error above, which says nothing of what was to be checked; please report it")
        sys.exit(2)


def tell(message: str) -> None:
    """A message on standard error, where there is one that can be written."""
    try:
        if sys.stderr is not None:  # a shell can close it
            print(f"assay: {message}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Let what is left in a stream's buffer go nowhere: Python flushes it as it ends, and exits 120 if that fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _require_addresses() -> None:
    """Exit 2 where `ulimit -v` leaves too few addresses to start with.

    OpenBLAS, libgomp and LLVM end the process themselves if they get none, the first two with status 1.
    """
    limit, asked = _limit(), os.environ.get("NUMBA_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() else os.cpu_count() or 1
    needed = NEEDED + threads * NEEDED_BY_A_THREAD
    if limit is not None and limit < needed:
        tell(
            f"memory is limited too tightly to start\n  expected: at least {needed / 1e9:.2f} GB for {threads} threads"
            f"\n  got: {_limited(limit)}\n  what to do: raise that limit, or give fewer threads in NUMBA_NUM_THREADS"
        )
        sys.exit(2)


def _limit() -> int | None:
    """Bytes of addresses that the process may have, if that is limited."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _limited(limit: int) -> str:
    return f"{limit / 1e9:.2f} GB, set by `ulimit -v`"


def _is_out_of_memory(error: Exception) -> bool:
    """Also where a library could not be loaded for want of it: in words, for the loader has no number for that."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = "failed to map segment", "annot allocate memory"
    return isinstance(error, (ImportError, OSError)) and any(word in str(error) for word in words)


def _out_of_memory() -> str:
    limit = _limit()
    got, remedy = ("", "") if limit is None else (f"\n  got: {_limited(limit)}", "raise that limit, or ")
    return f"out of memory{got}\n  what to do: {remedy}run fewer tokens, shorter --chunks or fewer --taps"


if __name__ == "__main__":
    main()
