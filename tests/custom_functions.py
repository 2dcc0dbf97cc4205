"""A zoo of `torch.autograd.Function`s, as users write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Lying(Function):
    """x^2, whose derivative is said to be 100."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 100


class Rectified(Function):
    """The ReLU of torch's tutorial: a backward that writes in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = gradient.clone()
        grad[x < 0] = 0
        return grad


class RoundThrough(Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reversed(Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


class Linear(Function):
    """The linear layer of torch's tutorial: several arguments, one of which may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        y = x.mm(weight.t())
        return y if bias is None else y + bias.unsqueeze(0).expand_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        x_grad = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        weight_grad = gradient.t().mm(x) if ctx.needs_input_grad[1] else None
        bias_grad = gradient.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return x_grad, weight_grad, bias_grad


class Softmax(Function):
    """Saves its output, and a tensor on ctx itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x - x.amax(-1, keepdim=True)).exp()
        y = y / y.sum(-1, keepdim=True)
        ctx.y = y
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.y * (gradient - (gradient * ctx.y).sum(-1, keepdim=True))


class Sorted(Function):
    """Values and places; the places have no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = x.sort()
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        return values, places

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        return torch.zeros_like(gradient).scatter_add(-1, places, gradient)


class Cube(Function):
    """Torch's example of a Function for torch.func: forward apart, a jvp, an extra output."""

    @staticmethod
    def forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        slope = 3 * scale * x**2
        return scale * x**3, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, scale = inputs
        ctx.scale = scale
        ctx.save_for_backward(x, output[1])
        ctx.save_for_forward(x, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_slope: Tensor) -> tuple[Tensor, None]:
        x, slope = ctx.saved_tensors
        return gradient * slope + of_slope * 6 * ctx.scale * x, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: None) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        return x_dot * slope, 6 * ctx.scale * x * x_dot


class Products(Function):
    """Two outputs, of which a gradient may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        return x * y, x + 2 * y

    @staticmethod
    def backward(ctx: Any, of_product: Tensor | None, of_sum: Tensor | None) -> Any:
        x, y = ctx.saved_tensors
        x_grad, y_grad = torch.zeros_like(x), torch.zeros_like(y)
        if of_product is not None:
            x_grad, y_grad = x_grad + of_product * y, y_grad + of_product * x
        if of_sum is not None:
            x_grad, y_grad = x_grad + of_sum, y_grad + 2 * of_sum
        return x_grad, y_grad


class Convolved(Function):
    """A convolution whose backward calls torch.nn.grad, once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.conv2d(x, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (
            torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=1),
            torch.nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1),
        )


class Sigmoid(Function):
    """Saves neither an input nor an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1 / (1 + (-x).exp())
        ctx.save_for_backward(y * (1 - y))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope


class Modulus(Function):
    """The absolute value of a complex number."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.abs()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * z / z.abs()


class Spread(Function):
    """Rows alike, and a gradient with as many: autograd sums it over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.expand(3, *x.shape) * torch.tensor(3.0, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.tensor(3.0, dtype=gradient.dtype)


class Pullback(Function):
    """Names its backward `vjp`, and uses the gradient twice, once without autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin() + x

    @staticmethod
    def vjp(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            first = gradient * x.cos()
        return first + gradient.detach()
