"""Where these tests run: as tests/sample/kernels/conftest.py says of its own."""

from tests.sample.kernels.conftest import device, dtype  # noqa: F401
