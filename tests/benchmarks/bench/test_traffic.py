"""gsto bench traffic: bytes by shapes."""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gsto_benchmarks.bench.traffic import VARIANTS, Traffic, step_traffic
from gsto_benchmarks.cli import main


def counted(function):
    traffic = Traffic(lambda parents: "all")
    with FakeTensorMode(), traffic:
        function()
    return traffic.bytes["all", "forward"], traffic.bytes["all", "backward"]


def test_bytes_of_single_operators():
    def add():
        a, b = torch.empty(4, 8), torch.empty(4, 8)
        (a + b).view(2, 16)

    assert counted(add) == (3 * 32 * 4, 0)

    def in_place():
        torch.empty(10).relu_()

    assert counted(in_place) == (2 * 10 * 4, 0)

    def in_place_in_a_list():
        torch._foreach_mul_([torch.empty(10), torch.empty(6)], 2.0)

    assert counted(in_place_in_a_list) == (2 * 16 * 4, 0)

    def expanded():
        torch.empty(8, 1).expand(8, 100) + torch.empty(8, 100)

    assert counted(expanded) == ((8 + 800 + 800) * 4, 0)


def test_backward_is_counted_apart():
    def multiply():
        x = torch.empty(100, requires_grad=True)
        (x * x).sum().backward()

    forward, backward = counted(multiply)
    # The two operands of x * x are one map; then the sum; then the 1 that the backward pass starts from, and its operand.
    assert forward == (100 + 100) * 4 + (100 + 1) * 4 + 2 * 4
    assert backward >= 2 * 100 * 4


def test_pytorchs_batch_norm_reads_twice():
    def norm():
        F.batch_norm(torch.empty(2, 3, 4, 4), None, None, training=True)

    forward, _ = counted(norm)
    assert 3 * 96 * 4 <= forward <= 3 * 96 * 4 + 100


def test_fused_step_moves_less_than_the_plain_network_without_gates():
    totals = [step_traffic(variant, "w18_small_v2", 1, (64, 128)) for variant in VARIANTS]
    plain, composed, fused = (sum(counts.values()) for counts in totals)
    assert fused < plain < composed
    assert all(part in {key[0] for key in totals[2]} for part in ("branches", "fusion", "transitions", "head", "loss"))


def test_traffic_command(capsys):
    assert main(["bench", "traffic", "--trunk", "w18_small_v2", "--batch", "1", "--size", "64x64"]) == 0
    assert "GSTO-HRNet, fused" in capsys.readouterr().out
