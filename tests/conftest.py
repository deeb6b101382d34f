"""One thread per process, as in a run: small models lose time with two, and the tests start processes of their own. And the usual
caches of compiled kernels."""

import getpass
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Configs that are loaded in this process would point these at run directories that are never made.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
os.environ.setdefault("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))
