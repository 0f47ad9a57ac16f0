"""Ask the C library to keep freed memory for the next allocation of the same size.

Every training step allocates and frees the same large tensors. glibc gives large blocks back to the system at once and
asks for new ones, which the kernel has to zero page by page; on a virtual machine that took a quarter of a training
step (dev/LOG.md). The commands of `tao` call this; a library must not change its host's allocator, so importing
`opentao` does not.
"""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Freed memory stays with this process. Returns False, and changes nothing, where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # No block gets a mapping of its own, and the heap is not cut at its end: mallopt answers 1 if it was understood.
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
