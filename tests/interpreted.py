"""Steps compiled for a GPU where there is none: Triton's interpreter runs their kernels.

    TRITON_INTERPRET=1 python tests/interpreted.py mlp/normal decoder/rank-one

Inductor writes its code for a GPU of which only the properties are made up. The kernels of that
code run on the memory of the CPU, products and convolutions by torch. Prints as JSON, for each
model and step of test_devices.py, the kernels that ran and the greatest error of what the step
writes, relative to the same step without a compiler.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from nets import Block
from test_devices import LABELS, MODELS_WITH_INPUTS, STEPS
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import TRITON_MAX_BLOCK, DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import TensorHandle

from fwdcompile import FGD

GPU = torch.device("cuda", 0)
# of an H200; Inductor chooses by them how it writes a kernel
LIMITS = {
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
SMALL_CNN = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
)
MODELS = MODELS_WITH_INPUTS | {
    "small cnn": (lambda: SMALL_CNN, (torch.zeros(2, 1, 8, 8), LABELS), cross_entropy),
    "block": (lambda: Block(8, 2), (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)), mse_loss),
}
ELEMENTS = 2**15  # of a block, at most: the interpreter takes as long for one as for thousands
kernels_run = 0


@contextmanager
def pretended() -> Iterator[None]:
    """Torch and Triton believe in a GPU, as far as writing code for it goes."""
    properties = DeviceProperties(type="cuda", index=0, cc=90, major=9, **LIMITS)
    device = SimpleNamespace(name="none", major=9, minor=0, gcnArchName="", **LIMITS)
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    with (
        patch.multiple(
            torch.cuda,
            get_device_properties=lambda _=None: device,
            get_device_capability=lambda _=None: (9, 0),
            is_available=lambda: True,
            current_device=lambda: 0,
            device_count=lambda: 1,
        ),
        patch.object(scheduler, "has_triton", lambda *_: True),
        patch.object(DeviceProperties, "create", lambda device: properties),
        patch.object(fake_tensor, "init_gpu_context", lambda _=None: None),
    ):
        yield


class Library:
    """CUDA's library of functions, by torch's of the same names."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(torch, name)

        def call(*xs: Any) -> Any:
            values = [torch.from_numpy(x.handle.data) for x in xs]
            out = function(*values).numpy()
            return tl.tensor(TensorHandle(out, xs[0].dtype.scalar), xs[0].type)

        return call


class Kernel:
    """A kernel as the code of a graph starts it."""

    def __init__(
        self, function: Any, size_hints: Any, triton_meta: Any, inductor_meta: Any
    ) -> None:
        self.function, self.grid_type = function, inductor_meta["grid_type"]
        names = list(triton_meta["signature"])
        self.arguments = [name for name in names if not name.endswith("BLOCK")]
        sizes = {axis.strip("_"): size for axis, size in size_hints.items()}
        across, y = min(sizes.get("r0", 1), 256), min(sizes.get("y", 1), 32)
        x = min(sizes["x"], max(ELEMENTS // (across * y), 1), TRITON_MAX_BLOCK["X"])
        blocks = {"XBLOCK": x, "YBLOCK": y, "R0_BLOCK": across}
        self.blocks = {name: blocks[name] for name in names if name.endswith("BLOCK")}

    def run(self, *values: Any, stream: int) -> None:
        """Runs all its blocks, one after the other."""
        global kernels_run
        kernels_run += 1
        given = dict(zip(self.arguments, values, strict=True))
        axes = {"Grid1D": "x", "Grid2D": "xy"}[self.grid_type]
        grid = [math.ceil(given[f"{a}numel"] / self.blocks[f"{a.upper()}BLOCK"]) for a in axes]
        self.function[tuple(grid)](**given, **self.blocks)


def heuristic(size_hints: Any, triton_meta: Any, inductor_meta: Any, **_: Any) -> Any:
    return lambda function: Kernel(function, size_hints, triton_meta, inductor_meta)


class Kernels:
    """Stands where Inductor's code compiles its kernels."""

    def triton(self, name: str, source: str, **_: Any) -> Kernel:
        # the interpreter reads a kernel's source from its file
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name[:60]}.py"
            path.write_text(source)
            kernel: Kernel = getattr(loaded(path), name)
        return kernel

    def wait(self, scope: dict[str, Any]) -> None:
        """Nothing is compiled elsewhere."""


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_for_gpu(graph: torch.fx.GraphModule, inputs: list[Any]) -> str:
    """What Inductor writes for the graph, were its tensors on a GPU."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)

    def there(x: Any) -> Any:
        if isinstance(x, torch.device):
            return GPU
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)

    placed = [there(x) for x in inputs]
    for node in graph.graph.nodes:
        assert node.op != "get_attr", "a graph with constants"
        node.args, node.kwargs = pytree.tree_map(there, (node.args, node.kwargs))
    graph.recompile()
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*placed)
    view_to_reshape(graph)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=placed, is_inference=True)
        with V.set_graph_handler(lowering), DebugContext():
            lowering.run(*placed)
            return str(lowering.codegen()[0].value)


# how the code of a graph differs where its memory is the CPU's
CHANGES = {
    r"async_compile = AsyncCompile\(\)": "async_compile = _Kernels()",
    r"_empty_strided_cuda": "_empty_strided_cpu",
    r"with torch\.cuda\._DeviceGuard\(\d\):": "if True:",
    r"torch\.cuda\.set_device\(\d\)": "pass",
    r"get_raw_stream\(\d\)": "0",
    r"from torch\._C import _cuda_getCurrentRawStream as get_raw_stream": "",
    # ops that are not kernels lay their results out otherwise on the CPU
    r"assert_size_stride\((\w+), (.*), 'torch\.ops\.[\w.]+'\)":
        r"\1 = torch.empty_strided(\2, dtype=\1.dtype).copy_(\1)",
}  # fmt: skip


def interpreted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler of torch.compile."""
    with pretended():
        code = code_for_gpu(copy.deepcopy(graph), inputs)
    for pattern, replacement in CHANGES.items():
        code = re.sub(pattern, replacement, code)
    scope: dict[str, Any] = {"__name__": "interpreted", "_Kernels": Kernels}
    exec(code, scope)
    return lambda *xs: scope["call"](list(xs))


def as_for_gpu(
    function: Any, *, fullgraph: bool, dynamic: bool | None, options: Any = None, **_: Any
) -> Any:
    """Stands for torch.compile; of its options it takes the pass over Inductor's graph."""
    rewrite = (options or {}).get("post_grad_custom_pre_pass")
    compiler = config.patch(post_grad_custom_pre_pass=rewrite)(interpreted)
    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    return real_compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic)


real_compile = torch.compile


def written(net: nn.Module, loss_fn: Any, step: str, inputs: Any, compile: bool) -> list[Tensor]:
    """Losses of two steps, and all that they write to a model."""
    made, settings = STEPS[step]
    net = copy.deepcopy(net)
    extra = {"lr": 0.1} if made is FGD else {}
    trainer = made(net, loss_fn, compile=compile, **settings, **extra)
    run = trainer.step if made is FGD else trainer
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention are each for one device
        losses = [run(*inputs).clone() for _ in range(2)]
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [*losses, *(x.detach() for x in net.state_dict().values()), *gradients]


def measured(case: str) -> dict[str, float]:
    """The greatest error of a compiled step and how many kernels ran."""
    global kernels_run
    model, step = case.split("/")
    build, inputs, loss_fn = MODELS[model]
    torch.manual_seed(0)
    net = build().double()
    numbers = [
        torch.randn_like(x, dtype=torch.float64)
        if x.is_floating_point()
        else torch.arange(x.numel()).view_as(x) % 3
        for x in inputs
    ]
    kernels_run = 0
    pairs = zip(*(written(net, loss_fn, step, numbers, c) for c in (True, False)), strict=True)
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]
    return {"error": float(torch.stack(errors).max()), "kernels": kernels_run}


def main() -> None:
    triton_helpers.libdevice, triton_helpers.set_driver_to_gpu = Library(), lambda: None
    for name in ("pointwise", "reduction", "persistent_reduction"):
        setattr(triton_heuristics, name, heuristic)
    torch.compile = as_for_gpu
    found: dict[str, Any] = {}
    for case in sys.argv[1:]:
        try:
            found[case] = measured(case)
        except Exception:
            found[case] = {"failed": traceback.format_exc()[-3000:]}
        torch._dynamo.reset()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
