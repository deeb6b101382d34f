"""One thread per process, as in a run: small models lose time with two, and the tests start processes of their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
