"""What all tests share: the Hypothesis profiles, the backend in the header, a backend at a time."""

import os

import pytest
from hypothesis import HealthCheck, settings

from fedcodec import ops

# "ci", the default, tries the same examples on every run; "explore" looks for new ones, and long.
settings.register_profile(
    "ci",
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("ci"), max_examples=5000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header():
    return f"fedcodec: {ops.active()} is the backend, of {', '.join(ops.available())}"


@pytest.fixture(params=ops.available())
def isa(request):
    """The name of a backend, which is the one in use during the test."""
    before = ops.active()
    ops.use(request.param)
    yield request.param
    ops.use(before)


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread, as the simulator computes: sums come out the same."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
