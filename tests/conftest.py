"""Options of the whole suite."""

from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, not about the code.
settings.register_profile("pio", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("pio")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the op and parity tests: cpu, cuda or cuda:N")
