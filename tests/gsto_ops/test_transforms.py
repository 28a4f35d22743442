"""torch.func and vmap over the public functions and over torch.ops, against the same transform of the plain formulas."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import gsto_ops
from gsto_ops import reference
from gsto_ops.ops import layout_of
from gsto_ops.ops.autograd import differentiable
from gsto_ops.ops.batching import vmap_rule

RESAMPLING = ("relu", (8, 10), "bilinear")


def operands():
    return SimpleNamespace(
        x=torch.randn(2, 3, 4, 5, dtype=torch.float64),
        rho=torch.randn(1, 3, 1, 1, dtype=torch.float64),
        b=torch.randn(1, dtype=torch.float64),
        w=torch.randn(4, 3, 1, 1, dtype=torch.float64),
        c=torch.randn(4, dtype=torch.float64),
        rhos=torch.randn(2, 3, 1, 1, dtype=torch.float64),
        v=torch.randn(3, dtype=torch.float64),
        labels=torch.randint(4, (2, 8, 10)),
        theta=torch.randn(1, 4, 1, 1, dtype=torch.float64),
    )


BATCH_NORM = nn.BatchNorm2d(3, affine=True, track_running_stats=False).double()


def fused_sum(x, w, o):
    """The end of a gated fusion: a branch's own part, whose gradient takes the carrier, and a projection with its batch norm."""
    split = gsto_ops.gated_split(x, o.rhos, None, w[:3], split=[3], carriers=1)
    own = {"gate": split.gate[:, 1:], "carrier": split.gated[0]}
    known = [(split.mean, split.var)]
    return gsto_ops.norm_sum(x, split.projected, [BATCH_NORM], **own, statistics=known, activation="relu")


def plain_sum(x, w, o):
    gates = F.conv2d(x, o.rhos).sigmoid()
    projected = F.batch_norm(gates[:, :1] * F.conv2d(x, w[:3]), None, None, *BATCH_NORM.parameters(), True)
    return F.relu(gates[:, 1:] * x + projected)


# operator -> (public function, plain formula) of (x, w, the other operands): one map, and one weight to differentiate
CALLS = {
    "gated_scale_transfer": (
        lambda x, w, o: gsto_ops.gated_scale_transfer(x, o.rho, o.b, w, o.c, activation="relu", size=(8, 10)),
        lambda x, w, o: reference.gated_scale_transfer(x, o.rho, o.b, w, o.c, *RESAMPLING)[0],
    ),
    "torch.ops": (
        lambda x, w, o: torch.ops.gsto_ops.gated_scale_transfer(x, o.rho, o.b, w, o.c, *RESAMPLING, False, None, None)[
            0
        ],
        lambda x, w, o: reference.gated_scale_transfer(x, o.rho, o.b, w, o.c, *RESAMPLING)[0],
    ),
    "gated_batch_norm_transfer": (
        lambda x, w, o: gsto_ops.gated_batch_norm_transfer(x, o.rho, o.b, w, o.c, 2 * o.c, size=(8, 10))[0],
        lambda x, w, o: reference.gated_batch_norm_transfer(
            x, o.rho, o.b, w, o.c, 2 * o.c, 1e-5, "none", (8, 10), "bilinear"
        )[0],
    ),
    "gated_projection": (
        lambda x, w, o: gsto_ops.gated_projection(x, o.rho, o.b, w)[3],
        lambda x, w, o: reference.gated_projection(x, o.rho, o.b, w)[3],
    ),
    "supervised_gated_scale_transfer": (
        lambda x, w, o: torch.cat(
            gsto_ops.supervised_gated_scale_transfer(x, w, o.c, o.theta, o.b, scale_factor=1, activation="relu"), 1
        ),
        lambda x, w, o: torch.cat(
            reference.supervised_gated_scale_transfer(x, w, o.c, o.theta, o.b, None, None, "relu", (4, 5), "bilinear")[
                :2
            ],
            1,
        ),
    ),
    "affine_scale_transfer": (
        lambda x, w, o: gsto_ops.affine_scale_transfer(x, w[0, :, 0, 0], o.v, activation="relu", size=(8, 10)),
        lambda x, w, o: reference.affine_scale_transfer(x, w[0, :, 0, 0], o.v, *RESAMPLING),
    ),
    "gated_pyramid_pool": (
        lambda x, w, o: gsto_ops.gated_pyramid_pool(x, w[:2], bins=[1, 3])[0][1],
        lambda x, w, o: reference.gated_pyramid_pool(x, w[:2], None, [1, 3])[0][..., 1:].unflatten(2, (3, 3)),
    ),
    "gated_split and norm_sum": (fused_sum, plain_sum),
    "norm_sum of one term": (
        lambda x, w, o: gsto_ops.norm_sum(None, [F.conv2d(x, w[:3])], [BATCH_NORM], activation="relu"),
        lambda x, w, o: F.relu(F.batch_norm(F.conv2d(x, w[:3]), None, None, *BATCH_NORM.parameters(), True)),
    ),
    "upsample_cross_entropy": (
        lambda x, w, o: gsto_ops.upsample_cross_entropy(F.conv2d(x, w), o.labels[: len(x)], reduction="none"),
        lambda x, w, o: F.cross_entropy(
            F.interpolate(F.conv2d(x, w), (8, 10), mode="bilinear"), o.labels[: len(x)], reduction="none"
        ),
    ),
}
TRANSFORMS = {
    "vmap": lambda f, x, w: vmap(lambda x: f(x, w))(torch.stack([x, 2 * x, -x])),
    "vmap over another dimension": lambda f, x, w: vmap(lambda x: f(x, w), in_dims=1)(torch.stack([x, -x], 1)),
    "vmap of vmap": lambda f, x, w: vmap(vmap(lambda x: f(x, w)))(torch.stack([x, 2 * x, -x])[None]),
    "vmap over weights": lambda f, x, w: vmap(lambda w: f(x, w))(torch.stack([w, -w])),
    "vmap over both": lambda f, x, w: vmap(f)(torch.stack([x, -x]), torch.stack([w, 3 * w])),
    "grad": lambda f, x, w: grad(lambda w: f(x, w).square().sum())(w),
    "grad of vmap": lambda f, x, w: grad(lambda w: vmap(lambda x: f(x, w))(torch.stack([x, -x])).square().sum())(w),
    "gradients per sample": lambda f, x, w: vmap(grad(lambda w, x: f(x[None], w).square().sum()), (None, 0))(w, x),
    "grad of grad": lambda f, x, w: grad(lambda x: grad(lambda x: f(x, w).square().sum())(x).square().sum())(x),
    "forward mode": lambda f, x, w: jvp(lambda w: f(x, w), (w,), (w.square(),))[1],
    "forward over reverse": lambda f, x, w: hessian(lambda w: f(x, w).square().sum())(w),
    "jacobian": lambda f, x, w: jacrev(lambda w: f(x, w).flatten()[:7])(w),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", CALLS)
def test_transforms_equal_those_of_the_plain_formula(call, transform):
    o = operands()
    actual, expected = (TRANSFORMS[transform](lambda x, w, f=f: f(x, w, o), o.x, o.w) for f in CALLS[call])
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert actual.abs().max() > 0


def test_forward_mode_without_torch_func():
    o = operands()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(o.x, o.x.square())
        tangents = [forward_ad.unpack_dual(f(x, o.w, o)).tangent for f in CALLS["gated_scale_transfer"]]
    torch.testing.assert_close(*tangents)


def test_tensors_that_outlive_their_transform():
    """The pullback of vjp runs when its level is gone, on what was saved there; so does what a transform leaks."""
    o = operands()
    found = []
    for f in CALLS["gated_scale_transfer"]:
        output, pullback = vjp(lambda x, w, f=f: f(x, w, o), o.x, o.w)
        found.append((output, *pullback(torch.ones_like(output))))
        leaked = []
        w = o.w.clone().requires_grad_()
        grad(lambda x, leaked=leaked, w=w: leaked.append(x * w.sum()) or x.sum())(o.x)
        found[-1] += torch.autograd.grad(f(leaked[0], o.w, o).square().sum(), w)
    torch.testing.assert_close(*found)


def test_functional_call():
    module = gsto_ops.GatedScaleTransfer(3, 4, scale_factor=2, norm=None)
    others = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    x = torch.randn(2, 3, 4, 5)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(others[name])
    torch.testing.assert_close(functional_call(module, others, (x,)), twin(x))
    grads = grad(lambda p: functional_call(module, p, (x,)).square().sum())(others)
    twin(x).square().sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-4)


def test_ensemble_of_modules():
    modules = [gsto_ops.GatedScaleTransfer(3, 4, scale_factor=2).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 3, 4, 5)
    outputs = vmap(lambda p, b: functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([module(x) for module in modules]))


def test_inference_mode():
    module = gsto_ops.GatedScaleTransfer(3, 4, scale_factor=2).eval()
    x = torch.randn(1, 3, 4, 5)
    with torch.inference_mode():
        output = module(x)
    assert output.is_inference()
    torch.testing.assert_close(output.clone(), module(x))


@pytest.mark.parametrize("call", ["gated_scale_transfer", "gated_projection"])
def test_vmap_needs_an_element(call):
    o = operands()
    with pytest.raises(ValueError, match=f"vmap of gsto_ops.{call}.default over input needs at least one element"):
        vmap(lambda x: CALLS[call][0](x, o.w, o))(o.x.new_empty(0, *o.x.shape))


@pytest.fixture(scope="module")
def lists():
    """An operator with lists of tensors among arguments and results: ([2 a_k], Σ a_k · b)."""
    library = torch.library.Library("gsto_test", "DEF")
    library.define("scaled(Tensor[] maps, Tensor factor, Tensor? other) -> (Tensor[] twice, Tensor total)")
    overload = torch.ops.gsto_test.scaled.default

    def formula(maps, factor, other):
        return [2 * m for m in maps], sum(maps) * factor + (0 if other is None else other)

    def setup_context(ctx, inputs, output):
        maps, factor, other = inputs
        assert isinstance(maps, list) and isinstance(output[0], list)
        ctx.save_for_backward(*maps, factor)
        ctx.other = other is not None

    def backward(_, ctx, grad_twice, grad_total):
        *maps, factor = ctx.saved_tensors
        assert len(ctx.needs_input_grad[0]) == len(maps) == len(grad_twice)
        grads = [2 * g + factor * grad_total for g in grad_twice]
        return grads, (sum(maps) * grad_total).sum(), grad_total if ctx.other else None

    library.impl("scaled", formula, "CompositeExplicitAutograd")
    torch.library.register_fake("gsto_test::scaled", formula, lib=library)
    torch.library.register_vmap("gsto_test::scaled", lambda *a: vmap_rule(overload, ("maps", "other"), *a), lib=library)
    call = differentiable(library, overload, formula, setup_context, backward, overload)
    yield SimpleNamespace(call=call, overload=overload, formula=formula)
    library._destroy()


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("way", ["call", "overload"])
def test_operators_may_have_lists_of_tensors(lists, way, other):
    maps = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    factor = torch.randn((), dtype=torch.float64, requires_grad=True)
    last = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if other else None
    function = getattr(lists, way)

    def flat(*operands):
        twice, total = function(list(operands[:3]), operands[3], operands[4] if other else None)
        return *twice, total

    operands = (*maps, factor, *([last] if other else []))
    torch.autograd.gradcheck(flat, operands)
    torch.library.opcheck(lists.overload, (maps, factor, last))
    with torch.no_grad():
        torch.testing.assert_close(flat(*operands)[-1], lists.formula(maps, factor, last)[1])
    grads = grad(lambda f: flat(*maps, f, *operands[4:])[-1].sum())(factor)
    torch.testing.assert_close(grads, sum(maps).sum())
    batch = torch.stack([maps[0], -maps[0]]).detach()
    mapped = vmap(lambda m: flat(m, *operands[1:]))(batch)
    for k, element in enumerate(batch):
        for actual, expected in zip(mapped, flat(element, *operands[1:]), strict=True):
            torch.testing.assert_close(actual[k], expected)


def test_the_layout_survives_a_folded_vmap():
    o = operands()
    x = torch.stack([o.x, -o.x]).flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 2))
    output = vmap(lambda x: gsto_ops.gated_scale_transfer(x, o.rho, size=6))(x)
    assert layout_of(output[1]) == torch.channels_last


def test_compiled_autograd():
    """The compiler sees the backward pass as Python, with the operators in it."""
    x, scale, shift = (torch.randn(*shape, requires_grad=True) for shape in ((1, 4, 4, 4), (4,), (4,)))

    def gradient():
        output = gsto_ops.affine_scale_transfer(x, scale, shift, size=8)
        output.square().sum().backward()
        found, x.grad = x.grad, None
        return found

    expected = gradient()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        torch.testing.assert_close(gradient(), expected)
