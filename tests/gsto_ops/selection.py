"""Which of the sweeps' tests a GPU need not run."""

import torch


def left_out(items):
    """Of Triton's, in float32 and float16, those of other sizes than the first: Triton compiles a kernel for nearly each.

    All sizes run in bfloat16, and in all dtypes in Triton's interpreter and on the other backends: 1,634 kernels instead of
    3,595.
    """
    first, found = {}, []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        size = params.get("shape", params.get("case"))
        if params.get("backend") != "triton" or size is None:
            continue
        dtype = params.get("dtype")
        if dtype not in (torch.float32, torch.float16):
            continue
        test = item.nodeid.split("[")[0], dtype
        if first.setdefault(test, size) != size:
            found.append(item)
    return found
