"""The networks against a straightforward composition of torch.nn.functional calls that reads the state dict."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_models import create_model

BLOCKS = 2
MODULES = {2: 1, 3: 3, 4: 2}  # of W18-Small-v2


class Composition:
    """GSTO-HRNet-W18-Small-v2, written out with F.* from the definition; `s` is a state dict."""

    def __init__(self, s, training, gate_form="paper", gates=True, align_corners=False):
        self.s, self.training, self.gate_form, self.gates = s, training, gate_form, gates
        self.align_corners = align_corners

    def conv(self, x, key, stride=1):
        weight = self.s[key + ".weight"]
        return F.conv2d(x, weight, self.s.get(key + ".bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, x, key):
        mean, var = self.s[key + ".running_mean"].clone(), self.s[key + ".running_var"].clone()
        return F.batch_norm(x, mean, var, self.s[key + ".weight"], self.s[key + ".bias"], self.training)

    def conv_bn(self, x, key, stride=1):
        return self.bn(self.conv(x, key + ".0", stride), key + ".1")

    def up(self, x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def concat(self, xs):
        return torch.cat([self.up(x, xs[0]) for x in xs], 1)

    def head(self, x, key):
        return self.conv(F.relu(self.bn(self.conv(x, key + ".0"), key + ".1")), key + ".3")

    def bottleneck(self, x, key):
        y = F.relu(self.bn(self.conv(x, key + ".conv1"), key + ".bn1"))
        y = F.relu(self.bn(self.conv(y, key + ".conv2"), key + ".bn2"))
        y = self.bn(self.conv(y, key + ".conv3"), key + ".bn3")
        return F.relu(y + (self.conv_bn(x, key + ".downsample") if key.endswith(".0") else x))

    def basic(self, x, key):
        y = F.relu(self.bn(self.conv(x, key + ".conv1"), key + ".bn1"))
        return F.relu(self.bn(self.conv(y, key + ".conv2"), key + ".bn2") + x)

    def gate(self, x, key):
        logit = self.conv(x, key + ".0")
        return torch.sigmoid(F.relu(self.bn(logit, key + ".1")) if self.gate_form == "released" else logit)

    def fuse(self, xs, key):
        ys = []
        for i, x_i in enumerate(xs):
            y = 0
            for j, x_j in enumerate(xs):
                t = self.gate(x_j, f"{key}.att_layers.{i}.{j}") * x_j if self.gates else x_j
                if j > i:
                    t = self.up(self.conv_bn(t, f"{key}.fuse_layers.{i}.{j}"), x_i)
                for k in range(i - j):
                    t = self.conv_bn(t, f"{key}.fuse_layers.{i}.{j}.{k}", 2)
                    t = F.relu(t) if k < i - j - 1 else t
                y = y + t
            ys.append(F.relu(y))
        return ys

    def stage(self, xs, stage):
        for m in range(MODULES[stage]):
            for r in range(len(xs)):
                for b in range(BLOCKS):
                    xs[r] = self.basic(xs[r], f"stage{stage}.{m}.branches.{r}.{b}")
            xs = self.fuse(xs, f"stage{stage}.{m}")
        return xs

    def transition(self, xs, stage):
        lowest, class_map = xs[-1], None
        if self.gates:
            class_map = self.head(self.concat(xs), f"last_layer_stage{stage}")
            g = class_map
            for k in range(stage):
                g = F.relu(self.conv_bn(g, f"att{stage}.{stage}.{k}", 1 if k == 0 else 2))
            lowest = torch.sigmoid(g) * lowest
        return [*xs, F.relu(self.conv_bn(lowest, f"transition{stage}.{stage}.0", 2))], class_map

    def __call__(self, x):
        x = F.relu(self.bn(self.conv(x, "conv1", 2), "bn1"))
        x = F.relu(self.bn(self.conv(x, "conv2", 2), "bn2"))
        for b in range(2):
            x = self.bottleneck(x, f"layer1.{b}")
        xs = [F.relu(self.conv_bn(x, "transition1.0")), F.relu(self.conv_bn(x, "transition1.1.0", 2))]
        xs, p2 = self.transition(self.stage(xs, 2), 2)
        xs, p3 = self.transition(self.stage(xs, 3), 3)
        xs = self.stage(xs, 4)
        return [p for p in (self.head(self.concat(xs), "last_layer"), p3, p2) if p is not None]


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


def build(gate_form="paper", gates=True, **options):
    name = "gsto_hrnet_w18_small_v2" if gates else "hrnetv2_w18_small_v2"
    return realistic(create_model(name, num_classes=7, gate_form=gate_form, **options).double())


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


CASES = [
    {},
    {"gate_form": "released"},
    {"gate_bias_init": 0.5},
    {"gates": False},
    {"align_corners": True, "gate_form": "released"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_eval_output(options):
    model = build(**options).eval()
    composition = {k: v for k, v in options.items() if k != "gate_bias_init"}
    image = torch.randn(2, 3, 65, 98, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model(image), Composition(model.state_dict(), False, **composition)(image)[0]
    assert found.shape == (2, 7, 17, 25)
    assert relative_error(found, expected) < 1e-10
    assert expected.std(dim=(2, 3)).min() > 0.01  # the map varies over the image, so the comparison means something


@pytest.mark.parametrize("gate_form", ["paper", "released"])
def test_training_outputs_and_gradients(gate_form):
    model = build(gate_form)
    image = torch.randn(2, 3, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    state = {**{k: v.clone() for k, v in model.named_buffers()}, **params}
    expected = Composition(state, True, gate_form)(image)
    found = model(image)
    assert len(found) == len(expected) == 3
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
