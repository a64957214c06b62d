"""One hypothesis profile for all tests: no deadline (kernels compile), and the same examples always in CI."""

import os

from hypothesis import settings

settings.register_profile("sparsify", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("sparsify")
