"""What a service counts, as Prometheus reads it (text format 0.0.4)."""

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

SECONDS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Labels = tuple[tuple[str, str], ...]


def _series(name: str, labels: Labels) -> str:
    # Values are paths, codes and numbers of our own: nothing in them needs an escape.
    inside = ",".join(f'{key}="{value}"' for key, value in labels)
    return f"{name}{{{inside}}}" if inside else name


class Counter:
    """A number that grows, for each set of labels."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._values: defaultdict[Labels, int] = defaultdict(int)

    def add(self, **labels: str) -> None:
        self._values[tuple(labels.items())] += 1

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} counter"
        for labels, value in self._values.items():
            yield f"{_series(self.name, labels)} {value}"


class Gauge:
    """A number that is asked for when it is read."""

    def __init__(self, name: str, help: str, value: Callable[[], float]) -> None:
        self.name, self.help, self._value = name, help, value

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} gauge"
        yield f"{self.name} {self._value()}"


class Histogram:
    """How many values were at most each of some bounds, for each set of labels."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name, self.help, self._bounds = name, help, tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: defaultdict[Labels, float] = defaultdict(float)

    def observe(self, value: float, **labels: str) -> None:
        key = tuple(labels.items())
        counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
        counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sums[key] += value

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        for labels, counts in self._counts.items():
            bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
            for bound, n in zip(bounds, accumulate(counts), strict=True):
                yield f"{_series(self.name + '_bucket', (*labels, ('le', bound)))} {n}"
            yield f"{_series(self.name + '_sum', labels)} {self._sums[labels]:g}"
            yield f"{_series(self.name + '_count', labels)} {sum(counts)}"


def exposition(metrics: Sequence[Counter | Gauge | Histogram]) -> str:
    """Write all metrics as one text."""
    return "\n".join(line for metric in metrics for line in metric.lines()) + "\n"
