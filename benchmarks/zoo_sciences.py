"""The models of zoo.py for graphs, atoms, flows and fields: those of libraries of the sciences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, tuple[Any, ...]]
Builder = Callable[[], Built]

IRREPS = "4x0e+3x1o+2x2e"


class Calls(nn.Module):
    """A function of tensors, with the modules that it calls."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *args: Any) -> Any:
        """Calls the function."""
        return self.function(*args)


def _pairs(count: int) -> Tensor:
    return torch.tensor([(i, j) for i in range(count) for j in range(count) if i != j]).T


def _graph_layer(name: str, *args: Any, **settings: Any) -> Builder:
    """A layer of PyG on a graph of eight nodes with six features each."""

    def build() -> Built:
        import torch_geometric

        layer = getattr(torch_geometric.nn, name)(*args, **settings)
        return layer, (torch.randn(8, 6), torch.randint(0, 8, (2, 24)))

    return build


def _graph_network() -> Built:
    from torch_geometric import nn as gnn

    first, norm, second = gnn.GATv2Conv(6, 8, heads=2), gnn.GraphNorm(16), gnn.GCNConv(16, 8)
    head = nn.Linear(8, 3)

    def network(x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        x = norm(first(x, edges).relu(), batch, batch_size=2)
        return head(gnn.global_mean_pool(second(x, edges).relu(), batch, size=2))

    edges = torch.cat([torch.randint(0, 4, (2, 12)), torch.randint(4, 8, (2, 12))], 1)
    inputs = torch.randn(8, 6), edges, torch.arange(8) // 4
    return Calls(network, first, norm, second, head), inputs


def _e3nn() -> Any:
    torch.serialization.add_safe_globals([slice])  # older versions load one
    import e3nn.math
    import e3nn.nn
    import e3nn.o3

    return e3nn


def _equivariant_linear() -> Built:
    o3 = _e3nn().o3
    irreps = o3.Irreps(IRREPS)
    return o3.Linear(irreps, irreps), (irreps.randn(5, -1),)


def _tensor_product() -> Built:
    o3 = _e3nn().o3
    irreps = o3.Irreps(IRREPS)
    product = o3.FullyConnectedTensorProduct(irreps, "1x0e+1x1o", irreps)
    return product, (irreps.randn(5, -1), torch.randn(5, 4))


def _gate() -> Built:
    gate = _e3nn().nn.Gate("4x0e", [torch.tanh], "3x0e", [torch.sigmoid], "3x1o")
    return gate, (gate.irreps_in.randn(5, -1),)


def _convolution_of_points() -> Built:
    e3nn = _e3nn()
    o3 = e3nn.o3
    harmonics = o3.Irreps.spherical_harmonics(2)
    product = o3.FullyConnectedTensorProduct("4x0e", harmonics, "4x0e+2x1o", shared_weights=False)
    weights = e3nn.nn.FullyConnectedNet([8, 16, product.weight_numel], torch.relu)

    def convolution(points: Tensor, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        apart = points[source] - points[target]
        along = o3.spherical_harmonics(harmonics, apart, True, normalization="component")
        near = e3nn.math.soft_one_hot_linspace(
            apart.norm(dim=1), 0.0, 3.0, 8, basis="smooth_finite", cutoff=True
        )
        messages = product(x[source], along, weights(near))
        return messages.new_zeros(5, messages.shape[1]).index_add(0, target, messages)

    return Calls(convolution, product, weights), (torch.randn(5, 3), torch.randn(5, 4), *_pairs(5))


def _potential() -> nn.Module:
    """A MACE potential of hydrogen and oxygen."""
    o3 = _e3nn().o3
    import numpy as np
    from mace import modules

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=5.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=2, interaction_cls=block,
        interaction_cls_first=block, num_interactions=2, num_elements=2,
        hidden_irreps=o3.Irreps("8x0e+8x1o"), MLP_irreps=o3.Irreps("4x0e"),
        gate=functional.silu, atomic_energies=np.array([-1.0, -2.0]), avg_num_neighbors=4,
        atomic_numbers=[1, 8], correlation=2, radial_type="bessel", atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )  # fmt: skip


def _molecule(positions: Tensor, elements: Tensor) -> dict[str, Tensor]:
    """What MACE takes: all atoms see each other, in a box of 100."""
    count = len(positions)
    edges = _pairs(count)
    shifts = positions.new_zeros(edges.shape[1], 3)
    return {
        "positions": positions, "node_attrs": elements, "edge_index": edges, "shifts": shifts,
        "unit_shifts": shifts, "cell": 100 * torch.eye(3).to(positions),
        "batch": torch.zeros(count).long(), "ptr": torch.tensor([0, count]),
        "head": torch.tensor([0]),
    }  # fmt: skip


def _mace(forces: bool) -> Builder:
    """A MACE potential of four atoms; positions and elements move."""

    def build() -> Built:
        potential = _potential()

        def energy(positions: Tensor, elements: Tensor) -> Any:
            data = _molecule(positions, elements)
            out = potential(data, training=forces, compute_force=forces)
            return (out["energy"], out["forces"]) if forces else out["energy"]

        elements = functional.one_hot(torch.arange(4) % 2, 2).to(torch.get_default_dtype())
        return Calls(energy, potential), (1.2 * torch.randn(4, 3), elements)

    return build


def _flow(name: str, **settings: Any) -> Builder:
    """The log density of a flow of zuko in three dimensions, given two numbers."""

    def build() -> Built:
        import zuko

        flow = getattr(zuko.flows, name)(3, 2, **settings)
        inputs = 0.1 + 0.8 * torch.rand(6, 3), torch.randn(6, 2)
        return Calls(lambda x, given: flow(given).log_prob(x), flow), inputs

    return build


def _flow_of_layers(layer: Callable[[Any], Any]) -> Builder:
    """The log density of a flow of nflows in three dimensions."""

    def build() -> Built:
        from nflows import distributions, flows, transforms

        layers = [transforms.ReversePermutation(3), layer(transforms)]
        normal = distributions.StandardNormal([3])
        flow = flows.Flow(transforms.CompositeTransform(2 * layers), normal)
        return Calls(flow.log_prob, flow), (torch.randn(6, 3),)

    return build


def _ode(method: str, **options: Any) -> Builder:
    """A neural ODE of torchdiffeq at five times."""

    def build() -> Built:
        from torchdiffeq import odeint

        slope = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))

        def solution(y: Tensor) -> Any:
            times = torch.linspace(0, 1, 5, dtype=y.dtype)
            return odeint(lambda t, y: slope(y) * (1 + t), y, times, method=method, **options)

        return Calls(solution, slope), (torch.randn(4, 3),)

    return build


HIDDEN: dict[str, Any] = {"hidden_features": (16,)}
ONE, TWO = HIDDEN | {"transforms": 1}, HIDDEN | {"transforms": 2}


def _quantized(make: Builder) -> Builder:
    """A model with the weights of its linear layers in int8."""

    def build() -> Built:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model, inputs = make()
        quantize_(model, Int8WeightOnlyConfig())
        return model, inputs

    return build


def _perceptron() -> Built:
    layers = nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)
    return nn.Sequential(*layers), (torch.randn(4, 32),)


def _llama() -> Built:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return Calls(lambda tokens: model(tokens).logits, model), (torch.randint(0, 64, (2, 9)),)


FAMILIES: dict[str, dict[str, Builder]] = {
    "graph networks": {
        "pyg GCNConv": _graph_layer("GCNConv", 6, 4),
        "pyg GATConv": _graph_layer("GATConv", 6, 4),
        "pyg GATv2Conv": _graph_layer("GATv2Conv", 6, 4, heads=2),
        "pyg SAGEConv": _graph_layer("SAGEConv", 6, 4),
        "pyg SAGEConv by max": _graph_layer("SAGEConv", 6, 4, aggr="max"),
        "pyg GINConv": _graph_layer("GINConv", nn.Linear(6, 4)),
        "pyg TransformerConv": _graph_layer("TransformerConv", 6, 4, heads=2, beta=True),
        "pyg ChebConv": _graph_layer("ChebConv", 6, 4, 3),
        "pyg GraphConv": _graph_layer("GraphConv", 6, 4),
        "pyg ARMAConv": _graph_layer("ARMAConv", 6, 4),
        "pyg TAGConv": _graph_layer("TAGConv", 6, 4),
        "pyg SGConv": _graph_layer("SGConv", 6, 4),
        "pyg APPNP": _graph_layer("APPNP", 3, 0.1),
        "pyg EdgeConv": _graph_layer("EdgeConv", nn.Linear(12, 4)),
        "pyg GatedGraphConv": _graph_layer("GatedGraphConv", 6, 2),
        "pyg PNAConv": _graph_layer(
            "PNAConv", 6, 4, ["mean", "max", "std"], ["identity", "amplification"], torch.ones(9)
        ),
        "pyg GENConv": _graph_layer("GENConv", 6, 4),
        "pyg ResGatedGraphConv": _graph_layer("ResGatedGraphConv", 6, 4),
        "pyg LEConv": _graph_layer("LEConv", 6, 4),
        "pyg ClusterGCNConv": _graph_layer("ClusterGCNConv", 6, 4),
        "pyg FiLMConv": _graph_layer("FiLMConv", 6, 4),
        "pyg GeneralConv": _graph_layer("GeneralConv", 6, 4),
        "pyg EGConv": _graph_layer("EGConv", 6, 4, num_heads=2),
        "pyg MFConv": _graph_layer("MFConv", 6, 4),
        "pyg network": _graph_network,
    },
    "atoms": {
        "e3nn Linear": _equivariant_linear,
        "e3nn FullyConnectedTensorProduct": _tensor_product,
        "e3nn Gate": _gate,
        "e3nn convolution of points": _convolution_of_points,
        "mace energy": _mace(forces=False),
        "mace energy and forces": _mace(forces=True),
    },
    "flows": {
        "zuko MAF": _flow("MAF", **TWO),
        "zuko NSF": _flow("NSF", **TWO),
        "zuko NCSF": _flow("NCSF", **ONE),
        "zuko NAF": _flow("NAF", signal=4, **ONE),
        "zuko NICE": _flow("NICE", **TWO),
        "zuko BPF": _flow("BPF", **ONE),
        "zuko GF": _flow("GF", **ONE),
        "zuko GMM": _flow("GMM", components=3),
        "nflows MaskedAffineAutoregressiveTransform": _flow_of_layers(
            lambda transforms: transforms.MaskedAffineAutoregressiveTransform(3, 16)
        ),
        "nflows LULinear": _flow_of_layers(lambda transforms: transforms.LULinear(3)),
    },
    "quantized weights": {
        "torchao int8 perceptron": _quantized(_perceptron),
        "torchao int8 llama": _quantized(_llama),
    },
    "differential equations": {
        **{f"torchdiffeq {m}": _ode(m) for m in ("euler", "midpoint", "rk4", "explicit_adams")},
        "torchdiffeq rk4 in steps": _ode("rk4", options={"step_size": 0.1}),
    },
}
