"""All operators through ``torch.library.opcheck``, on small operands: schemas, fake kernels, autograd, compiled code.

Of ``batch_norm_sum_``, which is for CPUs alone, see test_norm_sum_in_place.py.
"""

import torch

from gsto_ops.ops.library import operators

OPERATORS = sorted(name for name in vars(operators["gsto_triton"]) if "_backward" not in name)


def operands(name, device):
    def constant(*shape):
        return torch.randn(*shape, device=device)

    def leaf(*shape):
        return constant(*shape).requires_grad_()

    x, gate, gates, weight = leaf(1, 3, 2, 3), (leaf(1, 3, 1, 1), leaf(1)), leaf(2, 3, 1, 1), leaf(2, 3, 1, 1)
    statistics = [constant(3)], [constant(3).exp()]
    resampling = ("relu", [4, 3], "bilinear", False, None, None)
    norm = (*statistics, [leaf(3)], [leaf(3)], [1e-5], True, None, None)
    running = [constant(3)], [constant(3).exp()], [torch.tensor(3, device=device)]
    return {
        "affine_scale_transfer": (x, leaf(3), leaf(3), *resampling),
        "batch_norm_sum": (None, None, [x], *norm, "relu", "bilinear", False),
        "channel_statistics": (constant(1, 3, 2, 3),),
        "class_map": (x, weight, leaf(2)),
        "gated_batch_norm_transfer": (x, *gate, weight, leaf(2), leaf(2), 1e-5, *resampling),
        "gated_projection": (x, *gate, weight),
        "gated_pyramid_pool": (x, gates, None, [1, 2]),
        "gated_scale_transfer": (x, *gate, weight, leaf(2), *resampling),
        "gated_split": (x, gates, None, weight, [2], 1, "none"),
        "update_running_statistics_": (*running, *statistics, [6], [], 0.1),
        "upsample_cross_entropy": (x, torch.randint(0, 3, (1, 4, 3), device=device), None, 255, "mean", False),
    }[name]


def check_operator(namespace, name, device="cpu"):
    torch.manual_seed(0)
    operator = getattr(getattr(torch.ops, namespace), name).default
    torch.library.opcheck(operator, operands(name, device))
