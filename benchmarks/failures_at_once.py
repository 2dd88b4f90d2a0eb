"""A plugin of pytest that tells why a test failed at once: a run that is stopped tells no more."""

from typing import Any

import pytest


class _Telling:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed:
            terminal.write_sep("_", report.nodeid)
            terminal.write_line(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to their controller
        config.pluginmanager.register(_Telling(config))
