"""What the tests of the gated pyramid heads, pyramid pooling and ASPP, share."""

import pytest
import torch
import torch.nn.functional as F

from gsto_models import create_model

GATES = [None, "unsupervised", "supervised"]
C, CLASSES = 16, 5
outputs_of_options = pytest.mark.parametrize(
    ("options", "outputs"),
    [({}, 1), ({"auxiliary": True}, 2), ({"gate": "unsupervised"}, 1), ({"gate": "supervised"}, 2)],
    ids=str,
)


def class_map_of(s, x):
    """The class map (N, CLASSES, H, W) by a head's state dict, or None where it makes none."""
    return F.conv2d(x, s["predictor.weight"], s["predictor.bias"]) if "predictor.weight" in s else None


def gated(s, x, class_map, gate, k):
    """The input of branch ``k``."""
    if gate is None:
        return x
    bias = s.get("gates.conv.bias")
    logit = F.conv2d(class_map if gate == "supervised" else x, s["gates.conv.weight"][k : k + 1])
    return torch.sigmoid(logit + (0 if bias is None else bias[k])) * x


def bn(x, s, key, training):
    stats = [s[f"{key}.running_mean"].clone(), s[f"{key}.running_var"].clone()]
    return F.batch_norm(x, *stats, s[f"{key}.weight"], s[f"{key}.bias"], training)


def prepared(head):
    """The head in float64 with biases and batch norms that matter, and without dropout."""
    for m in head.double().modules():
        if isinstance(m, torch.nn.Conv2d) and m.bias is not None:
            m.bias.data.normal_(0, 0.5)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.5)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.2, 0.5)
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return head


def check_eval_output(head, x, composition):
    """``composition(state dict)`` returns [logits, class map]."""
    with torch.no_grad():
        found = head.eval()(x)
        expected = composition(head.state_dict())[0]
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)
    assert expected.std(dim=(2, 3)).min() > 0.01


def check_training_outputs_and_gradients(head, x, composition):
    params = {k: v.detach().clone().requires_grad_() for k, v in head.named_parameters()}
    expected = composition({**head.state_dict(), **params})
    found = head(x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(f) for f in found]
    sum((f * w).sum() for f, w in zip(found, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        assert p.grad.any(), name


def check_network_outputs(name, options, outputs):
    model = create_model(name, num_classes=CLASSES, output_stride=16, **options)
    maps = model(torch.randn(2, 3, 64, 96))
    assert [m.shape for m in maps] == [(2, CLASSES, 4, 6)] * outputs
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 65, 97)).shape == (1, CLASSES, 5, 7)
