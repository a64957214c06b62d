"""Benchmarks. Each first checks what it times, prints one line a case, and can write JSON.

The guard is off, so that what is timed as sparse is sparse.
"""

import os

os.environ.setdefault("SPARSIFY_GUARD", "off")
