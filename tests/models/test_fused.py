"""The fused networks against the plain composition: numbers, gradients, running statistics, processes, memory, checkpointing."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import gsto_ops
from gsto_models import create_model, record_gates, set_fused
from gsto_models.config import Options
from gsto_models.gated_fusion import MultiBranchModule

NETWORKS = {
    "paper": ("gsto_hrnet_w18_small_v2", {}),
    "released": ("gsto_hrnet_w18_small_v2", {"gate_form": "released", "gate_bias_init": 0.5}),
    "plain": ("hrnetv2_w18_small_v2", {}),
    "unsupervised": (
        "gsto_hrnet_w18_small_v2",
        {"transition_supervision": False, "scale_equalizer": True, "gate_bias_init": 4.0},
    ),
    "paper transition": ("gsto_hrnet_w18_small_v2", {"transition_form": "paper", "align_corners": True}),
    "one output": ("hrnet_w32", {}),
    "aspp": ("deeplabv3_r50", {"gate": "supervised", "output_stride": 16}),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def pair(name, options, dtype=torch.float64):
    """A network with weights of a useful size and running statistics of a batch, and its twin in the plain composition."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(image(dtype))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    twin = copy.deepcopy(model)
    set_fused(twin, False)
    return model, twin


def image(dtype=torch.float64):
    return torch.randn(2, 3, 64, 96, dtype=dtype, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model, x):
    outputs = model(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o in outputs]
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(outputs, parameters, seeds, allow_unused=True)
    return outputs, dict(zip(names, grads, strict=True)), dict(model.named_buffers())


def distance(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())


@pytest.mark.parametrize("training, memory_format", [(True, torch.channels_last), (False, torch.contiguous_format)])
@pytest.mark.parametrize("network", NETWORKS)
def test_same_numbers_as_the_plain_composition(network, training, memory_format):
    model, twin = pair(*NETWORKS[network])
    x = image().to(memory_format=memory_format)
    ours = outputs_and_gradients(model.train(training), x)
    theirs = outputs_and_gradients(twin.train(training), x)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.shape == b.shape and distance(a, b) < 1e-10
    largest = max(float(g.norm()) for g in theirs[1].values() if g is not None)
    for name, b in theirs[1].items():
        a = ours[1][name]
        assert (a is None) == (b is None), name
        # the gradient of a bias in front of a batch norm is zero but for rounding
        assert b is None or (a - b).norm() <= 1e-10 * max(float(b.norm()), 1e-4 * largest), name
    for name, b in theirs[2].items():
        assert distance(ours[2][name].double(), b.double()) < 1e-10, name


@pytest.mark.parametrize("network", ["paper", "released", "plain"])
def test_inference_without_gradients_is_the_same(network):
    """There the sums apply their own gate themselves."""
    model, twin = pair(*NETWORKS[network])
    with torch.inference_mode():
        assert distance(model.eval()(image()), twin.eval()(image())) < 1e-10


@pytest.mark.parametrize("network", ["paper", "plain"])
def test_inference_in_place_spoils_nothing(network):
    """Neither the image, nor what a hook has seen of a convolution: the sums write over other results of convolutions."""
    model, _ = pair(*NETWORKS[network], torch.float32)
    model.eval()
    seen, x = {}, image(torch.float32)
    with torch.inference_mode():
        expected = model(x)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, args, result, name=name: seen.update({name: result}))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)
    assert len(seen) > 50
    for name, result in seen.items():
        assert float(result.min()) < 0, name  # before its norm and ReLU
    assert torch.equal(x, image(torch.float32))


@pytest.mark.parametrize("network", ["paper", "released"])
def test_recorded_gates_are_the_same(network):
    model, twin = pair(*NETWORKS[network])
    recorded = []
    for network in (model, twin):
        with record_gates(network) as gates, torch.no_grad():
            network.eval()(image())
        recorded.append(gates)
    assert recorded[0].keys() == recorded[1].keys() and len(recorded[0]) > 30
    for name, gate in recorded[1].items():
        torch.testing.assert_close(recorded[0][name], gate, rtol=1e-10, atol=1e-12)


def test_bfloat16_error_is_not_larger():
    model, twin = pair(*NETWORKS["paper"], dtype=torch.float32)
    exact = copy.deepcopy(twin).double()
    x = image(torch.float32)
    wanted = exact.eval()(x.double())
    errors = []
    for network in (model, twin):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            errors.append(distance(network.eval()(x).double(), wanted))
    assert 0 < errors[0] <= 2 * errors[1], errors


def test_state_dicts_are_the_same():
    fused, plain = (create_model("gsto_hrnet_w18_small_v2", fused=fused) for fused in (True, False))
    assert list(fused.state_dict()) == list(plain.state_dict())


def multi_branch(gate_form="paper", gated=True, channels=(6, 12, 24), fused=True, **options):
    torch.manual_seed(0)
    module = MultiBranchModule(channels, 1, Options(gated_fusion=gated, gate_form=gate_form, **options))
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    set_fused(module, fused)
    return module


def branches(batch=4, channels=(6, 12, 24), size=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(batch, c, size >> k, size >> k, dtype=dtype, generator=generator) for k, c in enumerate(channels)
    ]


def train_once(module, inputs):
    """The outputs of one step, with the parameters' gradients left in them; the loss is a sum over images."""
    outputs = module(inputs)
    sum(o.sin().sum() for o in outputs).backward()
    return outputs


def half(rank):
    return [x[2 * rank : 2 * rank + 2] for x in branches()]


def in_process(rank, folder, gate_form):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{gate_form}", rank=rank, world_size=2)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(multi_branch(gate_form).double())
    share = slice(0, 3) if rank == 0 else slice(3, 4)  # not the same number of images
    train_once(module, [x[share] for x in branches()])
    for parameter in module.parameters():  # DistributedDataParallel refuses SyncBatchNorm on CPUs
        dist.all_reduce(parameter.grad)
    alone = multi_branch(gate_form).double()  # norms of its own batch, gradients by DistributedDataParallel
    train_once(nn.parallel.DistributedDataParallel(alone), half(rank))
    if rank == 0:
        grads, averaged = ({name: p.grad for name, p in m.named_parameters()} for m in (module, alone))
        torch.save((grads, dict(module.named_buffers()), averaged), f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way ("terminate called without ...")


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("gate_form", ["paper", "released"])
def test_two_processes(gate_form, tmp_path):
    """With synchronised norms they are one process with both batches; without, they have the mean of their gradients."""
    mp.spawn(in_process, (str(tmp_path), gate_form), nprocs=2)
    grads, buffers, averaged = torch.load(tmp_path / "result")
    halves = [multi_branch(gate_form).double() for _ in range(2)]
    for rank, module in enumerate(halves):
        train_once(module, half(rank))
    for (name, a), b in zip(halves[0].named_parameters(), halves[1].parameters(), strict=True):
        torch.testing.assert_close(averaged[name], (a.grad + b.grad) / 2, rtol=1e-9, atol=1e-9, msg=name)
    module = multi_branch(gate_form).double()
    train_once(module, branches())
    largest = max(float(p.grad.norm()) for p in module.parameters())
    for name, parameter in module.named_parameters():
        assert (grads[name] - parameter.grad).norm() <= 1e-9 * max(float(parameter.grad.norm()), 1e-4 * largest), name
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("gate_form", ["paper", "released"])
def test_second_derivatives_are_the_same(gate_form):
    found = []
    for fused in (True, False):
        module = multi_branch(gate_form, channels=(3, 4, 5), fused=fused).double()
        inputs = [x.requires_grad_() for x in branches(2, (3, 4, 5))]
        grads = torch.autograd.grad(sum(o.sin().sum() for o in module(inputs)), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in grads), [*inputs, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < 1e-8


def saved_bytes(module, inputs):
    """Bytes of all storages that autograd keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        module(inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("gate_form", ["paper", "released"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_gated_module_keeps_less_than_a_plain_one(count, gate_form):
    """Under bfloat16, as in training; channels and sizes in the proportions of W48."""
    channels, size = (48, 96, 192, 384)[:count], 64
    inputs = [x.requires_grad_() for x in branches(1, channels, size, torch.bfloat16)]
    plain = saved_bytes(multi_branch(gated=False, channels=channels, fused=False), inputs)
    composed = saved_bytes(multi_branch(gate_form, channels=channels, fused=False), inputs)
    fused = saved_bytes(multi_branch(gate_form, channels=channels), inputs)
    assert fused < plain < composed


class PlainStep(nn.Module):
    """A network and its loss as one writes them with torch.nn.functional alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        labels = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.int64)
        total = 0
        for logits in self.network(x):
            logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")
            total = total + F.cross_entropy(logits.float(), labels)
        return total


class FusedStep(PlainStep):
    def forward(self, x):
        labels = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.uint8)
        return sum(gsto_ops.upsample_cross_entropy(logits, labels) for logits in self.network(x))


def test_a_step_of_the_gated_network_keeps_less_than_one_of_the_plain_network():
    """Three heads with gates against one head without: no upsampled logits, no concatenated branches."""
    plain = PlainStep(create_model("hrnetv2_w18_small_v2", fused=False))
    gated = create_model("gsto_hrnet_w18_small_v2")
    x = image(torch.float32)
    assert saved_bytes(FusedStep(gated), x) < saved_bytes(plain, x)
    assert saved_bytes(FusedStep(gated), x) < 0.85 * saved_bytes(
        PlainStep(create_model("gsto_hrnet_w18_small_v2", fused=False)), x
    )


def test_checkpointing_keeps_less_and_changes_no_number():
    name, options = NETWORKS["paper"]
    model, _ = pair(name, options)
    again, _ = pair(name, {**options, "checkpointing": (2, 3, 4)})
    ours, theirs = (outputs_and_gradients(m.train(), image()) for m in (again, model))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
    for a, b in ((ours[1], theirs[1]), (ours[2], theirs[2])):
        assert all((a[key] is None and b[key] is None) or torch.equal(a[key], b[key]) for key in b)
    x = image(torch.float32)
    assert saved_bytes(again.float(), x) < 0.7 * saved_bytes(model.float(), x)


def test_wrong_checkpointing_is_named():
    with pytest.raises(ValueError, match=r"checkpointing must be stages out of \(2, 3, 4\)"):
        create_model("gsto_hrnet_w18_small_v2", checkpointing=(1,))


def test_other_norms_run_by_themselves():
    module = multi_branch().double()
    for layers in module.modules():
        for name, child in list(layers.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(layers, name, nn.GroupNorm(2, child.num_features).double())
    twin = copy.deepcopy(module)
    set_fused(twin, False)
    for a, b in zip(module(branches()), twin(branches()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_norms_in_both_modes():
    """A frozen norm among others runs by itself; among the gates of one branch it is an error."""
    module = multi_branch("released").double()
    module.fuse_layers[0][1][1].eval()
    twin = copy.deepcopy(module)
    set_fused(twin, False)
    for a, b in zip(module(branches()), twin(branches()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(module.named_buffers()), dict(twin.named_buffers()), rtol=1e-10, atol=1e-12)
    module.att_layers[0][1][1].eval()
    with pytest.raises(ValueError, match="must all be in training mode or all in eval mode, got both"):
        module(branches())
