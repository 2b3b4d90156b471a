"""PyTorch's ways to the diagonal Fisher, run by `fisher.py --peer-python` in an environment of their own.

`loop` is what FISH, T-Few and Fisher merging do: one example, one backward, add the squared gradient.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.fisher import CLASSES, SHAPES, _arguments, _split, serve


class Layer(nn.Module):
    """Post-norm attention and feed-forward, as in BERT."""

    def __init__(self, d: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-12), nn.LayerNorm(d, eps=1e-12)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // self.heads), -1)
        x = self.norm1(x + self.o((a @ v).transpose(1, 2).reshape(b, t, d)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x), approximate="tanh")))


class Encoder(nn.Module):
    """A BERT-shaped classifier."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, vocabulary: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.segment, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([Layer(width, heads, inner) for _ in range(layers)])
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, ids):
        where = torch.arange(ids.shape[1])[None].expand_as(ids)
        x = self.norm(self.token(ids) + self.position(where) + self.segment(torch.zeros_like(ids)))
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(self.pool(x[:, 0])))


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    method, size = _split(args.worker)
    shape = SHAPES[args.shape]
    if args.shape == "mlp":
        d, n = shape["width"], shape["layers"]
        hidden = [m for _ in range(n - 1) for m in (nn.Linear(d, d), nn.ReLU())]
        model: nn.Module = nn.Sequential(*hidden, nn.Linear(d, CLASSES))
        x = torch.randn(args.examples, d)
    else:
        model = Encoder(**shape)
        x = torch.randint(0, shape["vocabulary"], (args.examples, args.tokens))
    y = torch.randint(0, CLASSES, (args.examples,))
    ways = {
        "loop": loop,
        "exact": exact,
        "vmap": vmapped,
        "opacus": opacus,
        "backpack": backpack,
        "rate": rate,
    }
    serve(ways[method.removeprefix("torch_")](model, x, y, size))


def loop(model, x, y, size) -> Callable[[], Any]:
    """One backward an example."""
    names = list(model.parameters())

    def run():
        total = [torch.zeros_like(p) for p in names]
        for i in range(len(x)):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            for t, p in zip(total, names):
                t += p.grad.square()

    return run


def exact(model, x, y, size) -> Callable[[], Any]:
    """One backward an example and class, weighted by the class's probability."""
    names = list(model.parameters())

    def run():
        total = [torch.zeros_like(p) for p in names]
        for i in range(len(x)):
            log_p = nn.functional.log_softmax(model(x[i : i + 1])[0], -1)
            for c in range(CLASSES):
                model.zero_grad()
                log_p[c].backward(retain_graph=c + 1 < CLASSES)
                for t, p in zip(total, names):
                    t.add_(p.grad.square(), alpha=log_p[c].exp().item())

    return run


def vmapped(model, x, y, size) -> Callable[[], Any]:
    """torch.func: vmap of grad, in chunks."""
    from torch.func import functional_call, grad, vmap

    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, x, y):
        return nn.functional.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))

    def run():
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        for i in range(0, len(x), size):
            for n, g in gradients(params, x[i : i + size], y[i : i + size]).items():
                total[n] += g.square().sum(0)

    return run


def opacus(model, x, y, size) -> Callable[[], Any]:
    """Opacus: hooks that keep the gradients of each example."""
    from opacus import GradSampleModule

    model = GradSampleModule(model, loss_reduction="sum")
    params = list(model.parameters())

    def run():
        total = [torch.zeros_like(p) for p in params]
        for i in range(0, len(x), size):
            model.zero_grad(set_to_none=True)
            logits = model(x[i : i + size])
            nn.functional.cross_entropy(logits, y[i : i + size], reduction="sum").backward()
            for t, p in zip(total, params):
                t += p.grad_sample.square().sum(0)

    return run


def backpack(model, x, y, size) -> Callable[[], Any]:
    """BackPACK: the second moment beside the gradient, for the layers that it has rules for."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))
    params = list(model.parameters())

    def run():
        total = [torch.zeros_like(p) for p in params]
        for i in range(0, len(x), size):
            model.zero_grad()
            with backpack(SumGradSquared()):
                loss(model(x[i : i + size]), y[i : i + size]).backward()
            for t, p in zip(total, params):
                t += p.sum_grad_squared

    return run


def rate(model, x, y, size) -> Callable[[], Any]:
    """The rate of a float32 matrix product, in GFLOP/s."""

    def run(n: int = 3072) -> float:
        a = torch.ones(n, n)
        a @ a
        start = time.perf_counter()
        a @ a
        return 2 * n**3 / (time.perf_counter() - start) / 1e9

    return run


if __name__ == "__main__":
    main()
