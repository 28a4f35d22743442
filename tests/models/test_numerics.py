"""The networks against a straightforward composition of torch.nn.functional calls that reads the state dict."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_models import create_model

BLOCKS = 2
MODULES = {2: 1, 3: 3, 4: 2}  # of W18-Small-v2


class Composition:
    """An HRNet of the size W18-Small-v2, written out with F.* from the definition; `s` is a state dict."""

    def __init__(self, s, training, options, head="last_layer"):
        self.s, self.training, self.o, self.head_key = s, training, options, head

    def conv(self, x, key, stride=1):
        weight = self.s[key + ".weight"]
        return F.conv2d(x, weight, self.s.get(key + ".bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, x, key):
        mean, var = self.s[key + ".running_mean"].clone(), self.s[key + ".running_var"].clone()
        return F.batch_norm(x, mean, var, self.s[key + ".weight"], self.s[key + ".bias"], self.training)

    def conv_bn(self, x, key, stride=1):
        return self.bn(self.conv(x, key + ".0", stride), key + ".1")

    def up(self, x, like):
        if self.o.upsampling == "nearest":
            return F.interpolate(x, size=like.shape[-2:], mode="nearest")
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=self.o.align_corners)

    def concat(self, xs):
        return torch.cat([self.up(x, xs[0]) for x in xs], 1)

    def head(self, x, key):
        return self.conv(F.relu(self.bn(self.conv(x, key + ".0"), key + ".1")), key + ".3")

    def bottleneck(self, x, key):
        y = self.rival(F.relu(self.bn(self.conv(x, key + ".conv1"), key + ".bn1")), key + ".gate1", "layer")
        y = self.rival(F.relu(self.bn(self.conv(y, key + ".conv2"), key + ".bn2")), key + ".gate2", "layer")
        y = self.rival(self.bn(self.conv(y, key + ".conv3"), key + ".bn3"), key + ".gate3", "layer")
        return F.relu(y + (self.conv_bn(x, key + ".downsample") if key.endswith(".0") else x))

    def basic(self, x, key):
        y = self.rival(F.relu(self.bn(self.conv(x, key + ".conv1"), key + ".bn1")), key + ".gate1", "layer")
        return F.relu(self.rival(self.bn(self.conv(y, key + ".conv2"), key + ".bn2"), key + ".gate2", "layer") + x)

    def rival(self, x, key, position):
        if not self.o.gated_fusion or self.o.gate_position != position:
            return x
        if self.o.gate_kind == "channel":
            squeezed = F.relu(self.conv(x.mean((2, 3), keepdim=True), key + ".layers.1"))
            return torch.sigmoid(self.conv(squeezed, key + ".layers.3")) * x
        pooled = torch.stack([x.mean(1), x.max(1).values], 1)
        return torch.sigmoid(self.conv(pooled, key + ".conv")) * x

    def gated(self, x, key):
        if not self.o.gated_fusion or self.o.gate_position != "transfer":
            return x
        if self.o.gate_kind == "channel":
            return self.rival(x, key, "transfer")
        logit = self.conv(x, key + ".0")
        return torch.sigmoid(F.relu(self.bn(logit, key + ".1")) if self.o.gate_form == "released" else logit) * x

    def fuse(self, xs, key, outputs):
        ys = []
        for i, x_i in enumerate(xs[:outputs]):
            y = 0
            for j, x_j in enumerate(xs):
                t = self.gated(x_j, f"{key}.att_layers.{i}.{j}")
                if j > i:
                    t = self.up(self.conv_bn(t, f"{key}.fuse_layers.{i}.{j}"), x_i)
                for k in range(i - j):
                    t = self.conv_bn(t, f"{key}.fuse_layers.{i}.{j}.{k}", 2)
                    t = F.relu(t) if k < i - j - 1 else t
                y = y + t
            ys.append(self.rival(F.relu(y), f"{key}.block_gates.{i}", "block"))
        return ys

    def stage(self, xs, stage):
        for m in range(MODULES[stage]):
            for r in range(len(xs)):
                for b in range(BLOCKS):
                    xs[r] = self.basic(xs[r], f"stage{stage}.{m}.branches.{r}.{b}")
            single = stage == 4 and m == MODULES[4] - 1 and not self.o.multi_scale_output
            xs = self.fuse(xs, f"stage{stage}.{m}", 1 if single else None)
        return xs

    def transition(self, xs, stage):
        """The new branch behind the branches `xs` of a stage, and the class map or None."""
        lowest, class_map, new = xs[-1], None, f"transition{stage}.{stage}"
        gated, supervised = stage in self.o.gated_transition, self.o.transition_supervision
        u = self.concat(xs)
        if stage in self.o.auxiliary_supervision and not (gated and supervised):
            class_map = self.head(u, f"last_layer_stage{stage}")
        if gated and self.o.transition_form == "paper":
            source = u
            if supervised:
                source = class_map = self.conv(u, new + ".transfer.predictor")
            gate = torch.sigmoid(self.conv(source, new + ".transfer.gate"))
            projected = self.bn(self.conv(gate * u, new + ".transfer.projection"), new + ".transfer.norm")
            half = (-(-lowest.shape[2] // 2), -(-lowest.shape[3] // 2))
            return F.adaptive_avg_pool2d(F.relu(projected), half), class_map
        if gated:
            g = u
            if supervised:
                g = class_map = self.head(u, f"last_layer_stage{stage}")
            for k in range(stage):
                g = F.relu(self.conv_bn(g, f"att{stage}.{stage}.{k}", 1 if k == 0 else 2))
            lowest = torch.sigmoid(g) * lowest
        return F.relu(self.conv_bn(lowest, new + ".0", 2)), class_map

    def __call__(self, x):
        x = self.rival(F.relu(self.bn(self.conv(x, "conv1", 2), "bn1")), "gate1", "layer")
        x = self.rival(F.relu(self.bn(self.conv(x, "conv2", 2), "bn2")), "gate2", "layer")
        for b in range(2):
            x = self.bottleneck(x, f"layer1.{b}")
        new, p1 = self.transition([x], 1)
        xs = self.stage([F.relu(self.conv_bn(x, "transition1.0")), new], 2)
        new, p2 = self.transition(xs, 2)
        xs = self.stage([*xs, new], 3)
        new, p3 = self.transition(xs, 3)
        xs = self.stage([*xs, new], 4)
        if self.o.multi_scale_output:
            main = self.head(self.concat(xs), self.head_key)
        else:
            main = self.conv(xs[0], self.head_key)
        return [p for p in (main, p3, p2, p1) if p is not None]


def realistic(model, seed=0):
    """Random weights and BatchNorm statistics for which activations stay of order one and no gate is constant."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (1 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def build(name="gsto_hrnet_w18_small_v2", **options):
    return realistic(create_model(name, num_classes=7, **options).double())


def composition(model, state, training):
    return Composition(state, training, model.options, model.head_name)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


PLAIN = {"gated_fusion": False, "gated_transition": ()}
POSE = {"task": "pose", "multi_scale_output": False, "upsampling": "nearest"}
RIVALS = [
    {"gate_kind": kind, "gate_position": position, "gated_transition": ()}
    for kind, position in itertools.product(("channel", "spatial"), ("transfer", "block", "layer"))
    if (kind, position) != ("spatial", "transfer")
]
CASES = [
    {},
    {"gate_form": "released"},
    {"gate_bias_init": 0.5},
    PLAIN,
    {"align_corners": True, "gate_form": "released"},
    {"gated_transition": (1, 2, 3)},
    {"gated_transition": (1, 3), "transition_supervision": False},
    {"gated_transition": (1, 2, 3), "transition_form": "paper"},
    {"gated_transition": (1, 2), "transition_form": "paper", "transition_supervision": False, "gate_bias_init": 0.5},
    {**POSE, **PLAIN},
    {**POSE, "gated_transition": (3,), "gate_kind": "channel"},
    *RIVALS,
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_eval_output(options):
    model = build(**options).eval()
    image = torch.randn(2, 3, 65, 98, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model(image), composition(model, model.state_dict(), False)(image)[0]
    assert found.shape == (2, 7, 17, 25)
    assert relative_error(found, expected) < 1e-10
    assert expected.std(dim=(2, 3)).min() > 0.01  # the map varies over the image, so the comparison means something


TRAINING = [
    ({}, 3),
    ({"gate_form": "released"}, 3),
    ({"gated_transition": (1,), "auxiliary_supervision": (1, 2)}, 3),
    ({"gated_transition": (1, 2, 3), "transition_supervision": False, "auxiliary_supervision": (3,)}, 2),
    ({"gated_transition": (1, 2, 3), "transition_form": "paper"}, 4),
    ({"gated_transition": (2,), "transition_form": "paper", "transition_supervision": False}, 1),
    ({**PLAIN, "auxiliary_supervision": (2, 3)}, 3),
    ({**POSE, "gated_transition": (3,)}, 2),
    (RIVALS[0], 1),
    (RIVALS[2], 1),
    (RIVALS[4], 1),
]


@pytest.mark.parametrize(("options", "outputs"), TRAINING, ids=str)
def test_training_outputs_and_gradients(options, outputs):
    model = build(**options)
    image = torch.randn(2, 3, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    state = {**{k: v.clone() for k, v in model.named_buffers()}, **params}
    expected = composition(model, state, True)(image)
    found = model(image)
    assert len(found) == len(expected) == outputs
    for a, b in zip(found, expected, strict=True):
        assert a.shape == (2, 7, 10, 16)
        assert relative_error(a, b) < 1e-10
    weights = [torch.randn_like(a) for a in found]
    sum((a * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    sum((b * w).sum() for b, w in zip(expected, weights, strict=True)).backward()
    largest = max(p.grad.norm() for p in params.values())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - params[name].grad).norm()
        assert error < 1e-8 * params[name].grad.norm() + 1e-11 * largest, name
