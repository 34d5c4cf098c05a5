"""Options of the whole suite."""


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the op and parity tests: cpu, cuda or cuda:N")
