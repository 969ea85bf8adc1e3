"""What all tests share: nothing that a test starts outlives the test run."""

import os
import resource
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import pytest

MARK = "SIMMIM_TEST_RUN"


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = uuid.uuid4().hex
    # Two threads a process on two cores thrash as soon as a test starts a second process.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Under nohup: programs that tests start get the default, since handlers are not inherited.
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture
def no_file_above() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context in which no file can grow beyond so many bytes, as on a full disk."""

    @contextmanager
    def limited(length: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kill every process that some test started and lost, its ranks and workers among them."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
