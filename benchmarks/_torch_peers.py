"""PyHessian, hessian-eigenthings and curvlinops on the networks of benchmarks/_curvature_models.py.

Run by benchmarks/curvature.py in an interpreter that has torch and the three packages; it reads parameters
and data from an .npz file, and prints one JSON line. Each peer is run at growing budgets until the true
residual ||H v - lambda v|| / ||H v||, measured with a product outside its clock, is at most what is asked;
the seconds are those of the run that got there, its failed attempts are not counted.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import scipy.sparse.linalg
import torch
from torch.nn.functional import cross_entropy, gelu


class Net(torch.nn.Module):
    """The same forward passes as in _curvature_models.py."""

    def __init__(self, kind, arrays, heads):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.names = {name: name.replace(".", "_") for name in arrays}
        for name, array in arrays.items():
            self.register_parameter(self.names[name], torch.nn.Parameter(torch.from_numpy(array)))

    def get(self, name):
        return getattr(self, self.names[name])

    def forward(self, x):
        if self.kind == "mlp":
            for i in range(3):
                x = x @ self.get(f"{i}.w") + self.get(f"{i}.b")
                x = torch.tanh(x) if i < 2 else x
            return x
        if self.kind == "vit":
            h = self.blocks(x @ self.get("embed") + self.get("position"), causal=False)
            return h.mean(dim=1) @ self.get("head")
        h = self.blocks(self.get("embed")[x] + self.get("position"), causal=True)
        return h @ self.get("head")

    def blocks(self, h, causal):
        for i in range(sum(name.endswith("qkv") for name in self.names)):
            h = h + self.attention(norm(h), self.get(f"{i}.qkv"), self.get(f"{i}.out"), causal)
            h = h + gelu(norm(h) @ self.get(f"{i}.up"), approximate="tanh") @ self.get(f"{i}.down")
        return norm(h)

    def attention(self, h, qkv, out, causal):
        b, t, d = h.shape
        parts = (h @ qkv).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (d // self.heads) ** 0.5
        if causal:
            scores = scores.masked_fill(~torch.tril(torch.ones(t, t, dtype=torch.bool)), -1e30)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(b, t, d) @ out


def norm(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def criterion(outputs, y):
    return cross_entropy(outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1))


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    with np.load(sys.argv[1]) as file:
        arrays = {name[2:]: file[name] for name in file.files if name.startswith("p:")}
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
        kind, heads, tol = str(file["kind"]), int(file["heads"]), float(file["tol"])
    x = x.long() if kind == "transformer" else x
    net = Net(kind, arrays, heads)
    params = list(net.parameters())

    def product(v):
        gradient = torch.autograd.grad(criterion(net(x), y), params, create_graph=True)
        image = torch.autograd.grad(gradient, params, grad_outputs=v)
        return [z.detach() for z in image]

    def residual(v):
        size = torch.sqrt(sum((p * p).sum() for p in v))
        v = [p / size for p in v]
        image = product(v)
        value = sum((p * z).sum() for p, z in zip(v, image, strict=True))
        rest = torch.sqrt(sum(((z - value * p) ** 2).sum() for p, z in zip(v, image, strict=True)))
        return float(value), float(rest / torch.sqrt(sum((z * z).sum() for z in image)))

    def split(flat):
        pieces = torch.split(torch.as_tensor(flat), [p.numel() for p in params])
        return [piece.reshape(p.shape) for piece, p in zip(pieces, params, strict=True)]

    v = [torch.randn_like(p) for p in params]
    product(v)
    begin = time.perf_counter()
    for _ in range(5):
        product(v)
    seconds = (time.perf_counter() - begin) / 5
    rows = []
    for name, package, run, budgets in (
        ("PyHessian", "PyHessian", pyhessian(net, x, y), (100, 400)),
        ("hessian-eigenthings", "hessian-eigenthings", eigenthings(net, x, y, split), (20, 40, 80)),
        (
            "curvlinops + ARPACK",
            "curvlinops-for-pytorch",
            curvlinops(net, x, y, split),
            (1e-5, 1e-6, 1e-7),
        ),
    ):
        for budget in budgets:
            try:
                begin = time.perf_counter()
                vector, products = run(budget, tol)
                took = time.perf_counter() - begin
            except Exception as error:  # a peer that fails is a row that says so
                rows.append({"peer": name, "version": version(package), "error": repr(error)[:300]})
                break
            value, rest = residual(vector)
            row = {"peer": name, "version": version(package), "budget": budget, "products": products}
            row |= {"seconds": took, "value": value, "residual": rest, "reached": rest <= tol}
            if rest <= tol or budget == budgets[-1]:
                rows.append(row)
                break
    loss = float(criterion(net(x), y))
    print(json.dumps({"torch": torch.__version__, "loss": loss, "product_seconds": seconds, "rows": rows}))


def pyhessian(net, x, y):
    from pyhessian import hessian

    def run(budget, tol):
        computed = hessian(net, criterion, data=(x, y), cuda=False)
        _, vectors = computed.eigenvalues(maxIter=budget, tol=0.0, top_n=1)
        return [v.detach() for v in vectors[0]], budget

    return run


def eigenthings(net, x, y, split):
    import hessian_eigenthings as he

    def run(budget, tol):
        op = he.HessianOperator(net, [(x, y)], lambda model, batch: criterion(model(batch[0]), batch[1]))
        found = he.lanczos(op, k=1, max_iter=budget, tol=tol, reorthogonalize=True, seed=0)
        return split(found.eigenvectors[0].detach()), budget

    return run


def curvlinops(net, x, y, split):
    from curvlinops import HessianLinearOperator

    class Criterion(torch.nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            return super().forward(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

    def run(budget, tol):
        op = HessianLinearOperator(
            net, Criterion(), list(net.parameters()), [(x, y)], check_deterministic=False
        )
        linear, count = op.to_scipy(), [0]

        def matvec(v):
            count[0] += 1
            return linear @ v.astype(np.float32)

        counted = scipy.sparse.linalg.LinearOperator(linear.shape, matvec, dtype=np.float32)
        _, vectors = scipy.sparse.linalg.eigsh(counted, k=1, which="LM", tol=budget)
        return split(torch.from_numpy(np.ascontiguousarray(vectors[:, 0]))), count[0]

    return run


if __name__ == "__main__":
    main()
