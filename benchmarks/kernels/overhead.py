"""``python -m gsto_benchmarks.kernels.overhead``: the host's time for an eager call on a tiny map, and for the chain it replaces.

On a map of 4x4 pixels there is nothing to compute: what is measured is argument checks, the choice of the backend, dispatch,
autograd. Both sides run in one process on one thread, in turn; a time is the thread's own, and the least of all rounds, because
other programs only ever add to it. On a GPU it is that of queueing the work; the queue is emptied between rounds.
"""

import argparse

import torch
from torch import Tensor

import gsto_ops

from .cases import Case, Function, affine, projection, pyramid, training, transfer
from .cpu import clock
from .measure import error_of, exact_results, make_operands, results

CALLS = 20  # per round: less than the scheduler's time slice
CASES = [
    transfer("up2 8 -> 4", 8, 4, (4, 4), (8, 8)),
    transfer("down2 8 -> 4", 8, 4, (4, 4), (2, 2)),
    transfer("up2, gate only", 8, None, (4, 4), (8, 8)),
    projection("8 -> 4", 8, 4, (4, 4)),
    affine("up2 4", 4, (4, 4), (8, 8)),
    training("up2 8 -> 4", 8, 4, (4, 4), (8, 8)),
    pyramid("bins 1, 2", 8, (4, 4), (1, 2)),
]


def microseconds(function: Function, operands: list[Tensor], grads: list[Tensor] | None) -> float:
    """The time of one call, the mean over a round."""
    if operands[0].is_cuda:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(CALLS):
        results(function, operands, grads)
    return (clock() - start) / CALLS * 1e6


def measure(case: Case, device: str, backward: bool, rounds: int) -> tuple[float, float]:
    """The times of eager PyTorch and of ours in microseconds. RuntimeError where ours is wrong."""
    operands = make_operands(case, torch.float32, torch.contiguous_format, device)
    grads = [torch.randn_like(o) for o in case.eager(*operands)] if backward else None
    error = error_of(results(case.ours, operands, grads), exact_results(case, operands, grads))
    if error > 1e-5:
        raise RuntimeError(f"{case}: error {error:.2g} against float64")
    for function in (case.eager, case.ours):
        microseconds(function, operands, grads)  # the first calls build what later ones use again
    times = [[microseconds(function, operands, grads) for function in (case.eager, case.ours)] for _ in range(rounds)]
    eager, ours = (min(t) for t in zip(*times, strict=True))
    return eager, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=500, help=f"interleaved rounds of {CALLS} calls per row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend = gsto_ops.backends.select(torch.device(arguments.device), torch.float32)
    print(f"torch {torch.__version__}, {arguments.device}, backend {backend}, times in microseconds per call")
    print("| case | forward, eager | ours | ratio | forward + backward, eager | ours | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        times = [measure(case, arguments.device, backward, arguments.rounds) for backward in (False, True)]
        cells = [f"{eager:.1f} | {ours:.1f} | {eager / ours:.2f}" for eager, ours in times]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
