"""ops.mlp against a chain of torch.nn.Linear, and against torch.compile of it (`--compile`), with the floor of FLOPs.

    python benchmarks/bench_mlp.py --csv benchmarks/results/mlp.csv

Results and gradients are compared before anything is timed. A forward pass has 2 N sum(in out) operations, the backward
pass of a chain that keeps its activations twice as many, ops.mlp's three times, because it computes them again.
"""

import argparse
import csv
import statistics
import time

import torch

from text3d_fast import nn, ops

FIELDS = ("commit", "threads", "case", "points", "way", "pass", "ms", "cpu_ms", "GFLOP/s")
CASES = [ops.MLPSpec(32, 4, 64), ops.MLPSpec(32, 16, 64, 2), ops.MLPSpec(16, 4, 32), ops.MLPSpec(32, 16, 64, 2, "silu"),
         ops.MLPSpec(64, 3, 128, 3)]
TORCH = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU}


def chain(module: nn.MLP) -> torch.nn.Sequential:
    layers = []
    for weight, bias in module.layers():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data.copy_(weight), linear.bias.data.copy_(bias)
        layers += [linear, TORCH[module.spec.activation]()]
    return torch.nn.Sequential(*layers[:-1])


def assert_same(got: torch.Tensor, want: torch.Tensor, ties: float, what: tuple) -> None:
    """Points [N, C] differ by rounding alone, 1e-5 of the root mean square of a point, but for at most `ties`.

    A tie: a ReLU whose sum is 0 but for rounding has the slope of one side or the other, which is a share of that
    point's gradient, not an error. notes/mlp.md counts them.
    """
    error = (got - want).norm(dim=1) / want.square().sum(1).mean().sqrt()
    assert (error > 1e-5).sum() <= ties, (*what, float(error.max()))


def measure(run, seconds: float) -> tuple[float, float]:
    """Median wall time and smallest CPU time (all threads) of a call, ms."""
    for _ in range(2):
        run()
    walls, cpus = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(walls) < 3:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall), cpus.append(time.process_time() - cpu)
    return 1e3 * statistics.median(walls), 1e3 * min(cpus)


def rows(options):
    generator = torch.Generator().manual_seed(0)
    for spec in CASES:
        module = nn.MLP(spec, generator=generator)
        peers = {"ops.mlp": module, "torch": chain(module)}
        if options.compile:
            peers["torch.compile"] = torch.compile(chain(module))
        flops = 2 * sum(out * into for out, into in spec.layer_shapes)
        name = f"{spec.inputs}-{spec.width}x{spec.hidden_layers}-{spec.outputs} {spec.activation}"
        for log2 in options.log2:
            points = 1 << log2
            x = torch.randn(points, spec.inputs, generator=generator).requires_grad_()
            grad_y = torch.randn(points, spec.outputs, generator=generator)
            results = {}
            for way, peer in peers.items():
                y = peer(x)
                results[way] = y.detach(), *torch.autograd.grad(y, x, grad_y)
            for way in peers:
                ties = max(4, 1e-4 * points) if spec.activation == "relu" else 0
                for got, want, allowed in zip(results[way], results["torch"], (0, ties)):
                    assert_same(got, want, allowed, (name, way))
            for way, peer in peers.items():
                def forward(peer=peer, x=x):
                    with torch.no_grad():
                        peer(x)

                def both(peer=peer, x=x, grad_y=grad_y):
                    peer(x).backward(grad_y)

                again = 4 if way == "ops.mlp" else 3
                for kind, run, times in (("forward", forward, 1), ("forward+backward", both, again)):
                    ms, cpu = measure(run, options.seconds)
                    rate = round(times * flops * points / cpu / 1e6, 1)
                    yield name, points, way, kind, round(ms, 3), round(cpu, 3), rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log2", type=int, nargs="+", default=[14, 17])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--commit", default="")
    parser.add_argument("--csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = []
    for row in rows(options):
        done.append((options.commit, options.threads, *row))
        print("  ".join(map(str, row)), flush=True)
    if options.csv:
        with open(options.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(FIELDS)
            writer.writerows(done)


if __name__ == "__main__":
    main()
