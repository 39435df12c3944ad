"""The rows of `fedcodec bench` under pytest-benchmark, for its comparisons and histograms."""

import pytest

from fedcodec.bench import data
from fedcodec.bench.cases import rows
from fedcodec.bench.measure import check, on_threads


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_speed(row, benchmark):
    values = [] if row.kind == "layout" else [data.values("student-t", 1_000_000)]
    case = row.build(*values)
    check(case)
    with on_threads(1):
        benchmark(case.run)
