"""Run code in processes of their own, each forked from one that has imported torch and the tests.

Instruction sets are chosen once a process, and some tests kill theirs. What such a test runs takes
far less time than ``import torch`` would.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

RunCode = Callable[..., subprocess.CompletedProcess]


@contextlib.contextmanager
def serving() -> Iterator[RunCode]:
    """Yield ``run(code, **environment)``: exit status, standard output and errors of its process.

    The server starts with the first call.
    """
    server = None

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        nonlocal server
        if server is None:
            path = os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))
            server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                text=True,
            )
        server.stdin.write(json.dumps([code, environment]) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(code, *json.loads(server.stdout.readline()))

    try:
        yield run
    finally:
        if server is not None:
            server.communicate()


def _run(code: str, environment: dict[str, str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ.update(environment)
            # Python 3.12 and later warn of forks beside torch's threads.
            warnings.filterwarnings("ignore", ".* is multi-threaded", DeprecationWarning)
            status = 1
            try:
                exec(code, {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return status, *texts


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # which optimizers import

    import test_cpu_reasoning  # noqa: F401
    import test_scoring  # noqa: F401

    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(*json.loads(line))) + "\n")
        sys.stdout.flush()
