"""Writes tests/fixtures/optimizers.json: weights after each of some steps, by PyTorch's own optimizers in float64.

Lion is not in PyTorch; it is algorithm 2 of arXiv 2302.06675. Muon's iteration is PyTorch's, run in float64 instead of
bfloat16. Run with a Python that has torch 2.9 or later: python tests/python/make_optimizer_fixture.py
"""

import inspect
import json
import pathlib

import torch
import torch.optim._muon as muon

SHAPES = {"wide": [3, 7], "tall": [6, 4], "vector": [5]}
STEPS = 4

source = inspect.getsource(muon._zeropower_via_newtonschulz)
assert "torch.bfloat16" in source
exec(source.replace("torch.bfloat16", "torch.float64"), muon.__dict__)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                update = (beta1 * momentum + (1 - beta1) * param.grad).sign()
                param.sub_(group["lr"] * (update + group["weight_decay"] * param))
                momentum.mul_(beta2).add_(param.grad, alpha=1 - beta2)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    "adafactor": lambda p: torch.optim.Adafactor(
        p, lr=1e-2, eps=(torch.finfo(torch.float32).eps, 1e-3), weight_decay=0.1
    ),
}

torch.manual_seed(7)
cases = []
for shape_name, shape in SHAPES.items():
    weight = torch.randn(shape, dtype=torch.float32)
    gradients = [torch.randn(shape, dtype=torch.float32) * 10.0 ** (1 - step) for step in range(STEPS)]
    for name, make in OPTIMIZERS.items():
        if name == "muon" and len(shape) == 1:
            continue
        parameter = torch.nn.Parameter(weight.double())
        optimizer = make([parameter])
        after = []
        for gradient in gradients:
            parameter.grad = gradient.double()
            optimizer.step()
            after.append(parameter.detach().flatten().tolist())
        cases.append(
            {
                "optimizer": name,
                "shape": shape,
                "weight": weight.flatten().tolist(),
                "gradients": [gradient.flatten().tolist() for gradient in gradients],
                "after": after,
            }
        )
path = pathlib.Path(__file__).parent.parent / "fixtures" / "optimizers.json"
path.write_text(json.dumps({"torch": torch.__version__, "cases": cases}) + "\n")
