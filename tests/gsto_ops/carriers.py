"""A sum that multiplies by a branch's gate itself, its gradient by way of the carrier of ``gated_split`` and without one."""

import torch


def compare_carriers(ops, channels_last, device="cpu"):
    """Both ways give the same output and gradients, up to the rounding of sums in another order."""
    torch.manual_seed(0)
    x = torch.randn(2, 18, 6, 10, device=device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    shapes = (4, 18, 1, 1), (4,), (5, 18, 1, 1), (18,), (18,)
    operands = [x, *(torch.randn(shape, device=device) for shape in shapes)]
    small, seed = torch.randn(2, 18, 3, 5, device=device), torch.randn(2, 18, 6, 10, device=device)
    results = []
    for carriers in (0, 1):
        x, gate_weight, gate_bias, weight, gamma, beta = leaves = [o.detach().requires_grad_() for o in operands]
        split = ops.gated_split(x, gate_weight, gate_bias, weight, [5], 1, "none", carriers)
        (projected,), (copy, *carrier), gate, _, _ = split
        assert [(c.shape, c.stride(), bool(c.any())) for c in carrier] == [(x.shape, (0,) * 4, False)] * carriers
        terms = [copy, small]
        mean, var = map(list, zip(*(ops.channel_statistics(term.detach()) for term in terms), strict=True))
        norms = (mean, var, [gamma] * 2, [beta] * 2, [1e-5] * 2, True, None, None)
        total = ops.batch_norm_sum(x, gate[:, 2:3], terms, *norms, "relu", "bilinear", False, *carrier)
        outputs = [projected, total]
        grads = torch.autograd.grad(outputs, leaves, [seed[:, :5], seed])
        results.append([*outputs, *grads])
    without, with_carrier = results
    assert torch.equal(without[1], with_carrier[1])
    for a, b in zip(with_carrier, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
