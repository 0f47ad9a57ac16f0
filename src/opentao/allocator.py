"""Ask torch for large memory pages.

Every training step allocates and frees the same large tensors, and the kernel has to zero their fresh memory page by
page; on a virtual machine that can take a quarter of a step (dev/LOG.md). With pages of 2 MB it takes next to nothing.
The commands of `tao` call this; a library must not change its host's allocator, so importing `opentao` does not.
"""

from __future__ import annotations

import os


def use_large_pages() -> None:
    """torch puts tensors of 2 MB and more on large pages, where Linux has them. Call before the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
