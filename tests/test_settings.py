"""Settings: keyword > environment > default; what is wrong is refused by name."""

import math

import pytest

from blsrdma.errors import SettingsError
from blsrdma.settings import Settings, format_size, parse_size, timeout_ns


def test_keyword_over_environment_over_default() -> None:
    environment = {"BLSRDMA_LAG": "3", "BLSRDMA_WINDOW_BYTES": "64K", "BLSRDMA_DIRECT": "no", "PATH": "/bin"}
    settings = Settings.resolve(environment, lag=1, window_bytes=None)
    assert (settings.lag, settings.window_bytes, settings.direct, settings.timeout) == (1, 65536, False, 60.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("65536", 65536), ("64K", 65536), ("1.5 MiB", 3 << 19), ("2g", 2 << 30), ("1TB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 3 << 20)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB"]


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"lag": -1}, "lag = -1"),
        ({"lag": 1.5}, "lag = 1.5"),
        ({"lag": True}, "lag = True"),
        ({"lag": 10**9}, "lag = 1000000000"),
        ({"window_bytes": -5}, "window_bytes = -5"),
        ({"timeout": -1}, "timeout = -1"),
        ({"timeout": math.nan}, "timeout = nan"),
        ({"direct": "maybe"}, "direct = 'maybe'"),
        ({"windowbytes": 5}, "unknown setting: windowbytes"),
    ],
)
def test_bad_keywords(keywords: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named.replace(".", r"\.")):
        Settings.resolve({}, **keywords)


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("BLSRDMA_LAG", "two", "BLSRDMA_LAG = 'two'"),
        ("BLSRDMA_WINDOW_BYTES", "12 parsecs", "BLSRDMA_WINDOW_BYTES = '12 parsecs'"),
        ("BLSRDMA_DIRECT", "perhaps", "BLSRDMA_DIRECT = 'perhaps'"),
        ("BLSRDMA_LAGG", "1", "did you mean BLSRDMA_LAG"),
        ("BLSRDMA_COLOUR", "blue", "unknown setting in the environment: BLSRDMA_COLOUR"),
    ],
)
def test_bad_environment(variable: str, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        Settings.resolve({variable: text})


def test_infinite_timeouts() -> None:
    assert Settings.resolve({"BLSRDMA_TIMEOUT": "inf"}).timeout == math.inf
    assert timeout_ns(math.inf) == -1
    assert timeout_ns(1.5) == 1_500_000_000
