"""Stacks of experts' matrices whose backward computes the gradient of their kept entries only.

The gradient of a whole stack is the largest tensor of a training step of such a model. Here it is computed
matrix by matrix, from the tokens routed to that expert: at the kept rows, columns or blocks of the matrix,
or, for scattered entries on a CPU, in a scratch buffer of one matrix from which they are gathered. An expert
without tokens has the gradient zero.

What is replaced are the two matrix products of a module whose forward pass transformers chooses by name
(`use_experts_implementation`, `config._experts_implementation`); what lies between them (gate, biases, norm,
routing weights) is the module's own. Towards autograd it is as in compact_linear.py: the weight stays a leaf,
and its hook runs once per pass. All other modules with stacks stay autograd's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.optim.compact_linear import is_transformed, refuse_second_derivative, weight_gradient
from lota.optim.masked import MaskedOptimizer
from lota.optim.products import Stacked, first_columns, stack_products

# What `use_experts_implementation` of transformers 5.17 to 5.23 may say of a class, and the implementations
# that all compute what `_routed` does.
_UNDERSTOOD = {
    *("experts_class", "experts_interface", "is_concatenated", "is_transposed", "has_bias", "has_gate"),
    "has_post_expert_norm",
}
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class _Routing:
    """Which rows belong to which expert. ends: (experts,), after each one's last row; rows: of all."""

    def __init__(self, ends: Tensor, rows: int):
        self.ends, self.rows = ends.int(), rows

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each expert, then those of none. On a GPU this waits for it."""
        return [stop - start for start, stop in pairwise([0, *self.ends.tolist(), self.rows])]


class _CompactStack(torch.autograd.Function):
    """Each expert's x W^T, or x W if transposed, with the stack's gradient a^T b at kept entries only.

    x: (rows, in), expert after expert. a: output gradient (rows, out); b: x; transposed: they change places.
    product: None computes the whole gradient of the stack.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stack: Tensor,
        routing: _Routing,
        product: Stacked | None,
        put_aside: Callable[[Tensor], None],
        transposed: bool,
    ) -> Tensor:
        saved = x
        if product is not None and product.needed is not None:
            saved = product.few_features(x, routing.sizes)
        ctx.save_for_backward(saved, stack)
        ctx.routing, ctx.product, ctx.put_aside, ctx.transposed = routing, product, put_aside, transposed
        return _grouped(x, stack if transposed else stack.transpose(1, 2), routing)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, stack = ctx.saved_tensors
        grad_x = grad_stack = None
        if ctx.needs_input_grad[0]:
            grad_x = _grouped(grad_output, stack.transpose(1, 2) if ctx.transposed else stack, ctx.routing)
        if ctx.needs_input_grad[1]:
            a, b = (x, grad_output) if ctx.transposed else (grad_output, x)
            if ctx.product is None:
                grad_stack = _whole_gradient(ctx, a, b, stack)
            else:
                grad_stack = weight_gradient(
                    ctx,
                    stack,
                    lambda: ctx.put_aside(ctx.product(a, b, ctx.routing.sizes)),
                    lambda: _whole_gradient(ctx, a, b, stack),
                )
        return grad_x, grad_stack, None, None, None, None


def _grouped(x: Tensor, stack: Tensor, routing: _Routing) -> Tensor:
    """x (rows, in), expert after expert, times the experts' matrices (experts, in, out): (rows, out).

    Rows of no expert become zero on a CPU; elsewhere they are undefined, as in transformers' implementations.
    """
    if _has_grouped_kernel(stack):
        return F.grouped_mm(x.contiguous(), stack, offs=routing.ends)
    pieces = zip(x.split(routing.sizes), stack, strict=False)
    if torch.is_grad_enabled():  # create_graph=True: operations that can be differentiated again
        products = [piece @ matrix for piece, matrix in pieces]
        return torch.cat([*products, x.new_zeros(routing.sizes[-1], stack.shape[2])])
    out = x.new_empty(len(x), stack.shape[2])
    results = out.split(routing.sizes)
    for (piece, matrix), result in zip(pieces, results, strict=False):
        torch.mm(piece, matrix, out=result)
    results[-1].zero_()
    return out


def _has_grouped_kernel(stack: Tensor) -> bool:
    """Whether torch has a kernel for all experts at once: bf16, rows of whole 16 bytes, from Ampere on."""
    return (
        stack.device.type == "cuda"
        and stack.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and all(side % 8 == 0 for side in stack.shape[1:])
        and torch.cuda.get_device_capability(stack.device) >= (8, 0)
    )


def _dense(a: Tensor, b: Tensor) -> Tensor:
    return a.t() @ b


def _whole_gradient(ctx: Any, a: Tensor, b: Tensor, stack: Tensor) -> Tensor:
    """Every expert's a^T b, (experts, height, width); zeros for the features that were not saved."""
    sizes, needed = ctx.routing.sizes, None if ctx.product is None else ctx.product.needed
    pairs = list(zip(a.split(sizes), b.split(sizes), strict=True))[: len(stack)]
    if needed is None and torch.is_grad_enabled():
        return torch.stack([_dense(*pair) for pair in pairs])
    whole = stack.new_zeros(stack.shape)
    if needed is None:
        for (rows_of_a, rows_of_b), matrix in zip(pairs, whole, strict=True):
            torch.mm(rows_of_a.t(), rows_of_b, out=matrix)
        return whole
    refuse_second_derivative()
    axis = 0 if ctx.transposed else 1
    for number, features in needed.items():
        found = first_columns(_dense, axis, len(features), *pairs[number])
        whole[number].index_copy_(axis, features, found)
    return whole


# The products of a module by its stacks' names: (name, x (rows, in), routing) -> (rows, out).
_Multiply = Callable[[str, Tensor, _Routing], Tensor]


def _routed(
    self: Any, multiply: _Multiply, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What every implementation of transformers' interface computes: (tokens, hidden) -> (tokens, hidden)."""
    has_gate, has_bias = getattr(self, "has_gate", True), getattr(self, "has_bias", False)
    up, down = "gate_up_proj" if has_gate else "up_proj", "down_proj"
    # a row for each token and expert it goes to, sorted by expert: (tokens x top_k, hidden)
    tokens, top_k = top_k_index.shape
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(self.num_experts, device=experts.device, dtype=experts.dtype)
    routing = _Routing(torch.searchsorted(experts, numbers, right=True), len(experts))
    experts = experts.clamp(max=self.num_experts - 1)  # higher ones are none: their rows count nothing
    x = multiply(up, hidden_states[order // top_k], routing)
    if has_bias:
        x.add_(getattr(self, f"{up}_bias")[experts])
    x = self._apply_gate(x) if has_gate else self.act_fn(x)
    x = multiply(down, x, routing)
    if has_bias:
        x.add_(self.down_proj_bias[experts])
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(1)
    # back into the order of the tokens, and summed over each one's experts
    x = x[order.argsort()].view(tokens, top_k, -1).sum(1)
    return x.to(hidden_states.dtype)


def _even(self: Any, multiply: _Multiply, hidden_states: Tensor) -> Tensor:
    """Llama 4's: every expert gets all tokens, weighted before: (experts x tokens, hidden), as many back."""
    ends = torch.arange(1, self.num_experts + 1, device=hidden_states.device)
    routing = _Routing(ends * (len(hidden_states) // self.num_experts), len(hidden_states))
    gate, up = multiply("gate_up_proj", hidden_states, routing).chunk(2, dim=-1)
    return multiply("down_proj", up * self.act_fn(gate), routing)


def _parallel(self: Any, multiply: _Multiply, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """JetMoe's: one product of rows that are sorted already."""
    ends = torch.tensor(expert_size, device=inputs.device).cumsum(0)
    return multiply("weight", inputs, _Routing(ends, len(inputs)))


class _Kind(NamedTuple):
    """A kind of modules with stacks of experts."""

    stacks: tuple[str, ...]  # their names, in the order of use
    transposed: bool  # whether they are stored (experts, in, out)
    compute: Callable[..., Tensor]  # module, the products, its arguments -> its output


_TWO = ("gate_up_proj", "down_proj")
# Classes of transformers that do not go through its interface; the same in 5.17 and 5.23.
_OTHERS = {
    "llama4.modeling_llama4.Llama4TextExperts": _Kind(_TWO, True, _even),
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": _Kind(("weight",), False, _parallel),
    "step3p7.modeling_step3p7.Step3p7Experts": _Kind(_TWO, False, _routed),
}


def _kind_of(module: nn.Module) -> _Kind | None:
    """What a module computes; None if it has no stacks of experts or is of a kind not known here."""
    kind = type(module)
    known = _OTHERS.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models."))
    if "has_gate" in vars(module) and _has_interface(kind):
        up: Any = "gate_up_proj" if module.has_gate else "up_proj"
        known = _Kind((up, "down_proj"), bool(module.is_transposed), _routed)
    if known is None:
        return None
    stacks = [module._parameters.get(name) for name in known.stacks]
    fit = all(w is not None and w.ndim == 3 and len(w) == module.num_experts for w in stacks)
    return known if fit else None


def _has_interface(kind: type[nn.Module]) -> bool:
    """Whether transformers' interface chooses a class's forward pass, in a release that is known here."""
    names = getattr(kind.forward, "__globals__", {})
    if names.get("__name__") != "transformers.integrations.moe":
        return False
    return set(inspect.signature(names["use_experts_implementation"]).parameters) <= _UNDERSTOOD


def use_compact_experts(model: nn.Module, optimizer: MaskedOptimizer) -> Callable[[], None]:
    """Let every module of experts of a known kind compute its stacks' kept gradients only.

    On another device than the CPU only if whole rows, columns or blocks are kept. Returns a function that
    undoes it.
    """
    kinds = {m: kind for m in model.modules() if "forward" not in vars(m) and (kind := _kind_of(m))}
    transposed = {getattr(m, name): kind.transposed for m, kind in kinds.items() for name in kind.stacks}
    trained = [weight for weight in transposed if weight in optimizer.names]
    products = stack_products({weight: optimizer.kept[weight] for weight in trained})
    for weight, product in products.items():
        product.narrow(0 if transposed[weight] else 1)
    chosen = [m for m, kind in kinds.items() if any(getattr(m, name) in products for name in kind.stacks)]
    for module in chosen:
        module.forward = _forward(module, kinds[module], optimizer, products)

    def undo() -> None:
        for module in chosen:
            del module.forward

    return undo


def _forward(
    module: nn.Module, kind: _Kind, optimizer: MaskedOptimizer, products: dict[nn.Parameter, Stacked]
) -> Callable[..., Tensor]:
    """A forward bound to the module, so that a deep copy's is bound to the copy.

    It computes as the module's class does without gradients, and whenever the module no longer is what the
    products were made for, as in compact_linear.py.
    """
    stacks: dict[str, nn.Parameter] = {name: getattr(module, name) for name in kind.stacks}
    places = {name: (weight.device, weight.dtype) for name, weight in stacks.items()}

    def is_same(self: Any, x: Tensor) -> bool:
        return all(
            getattr(self, name) is weight and (weight.device, weight.dtype) == places[name]
            for name, weight in stacks.items()
        ) and all(weight.dtype == x.dtype for weight in stacks.values())

    def multiply(name: str, x: Tensor, routing: _Routing) -> Tensor:
        weight = stacks[name]

        def put_aside(grad: Tensor) -> None:
            optimizer.put_aside(weight, grad)

        return _CompactStack.apply(x, weight, routing, products.get(weight), put_aside, kind.transposed)

    @torch.compiler.disable  # a graph would be one of these numbers of rows only
    def forward(self: Any, hidden_states: Tensor, *more: Any, **named: Any) -> Tensor:
        ours = is_same(self, hidden_states) and not is_transformed(hidden_states)
        if not ours or not torch.is_grad_enabled() or not _computes_routed(self):
            return type(self).forward(self, hidden_states, *more, **named)
        return kind.compute(self, multiply, hidden_states, *more, **named)

    return MethodType(forward, module)


def _computes_routed(module: Any) -> bool:
    """Of a module with transformers' interface, whether its implementation computes what `_routed` does."""
    if "has_gate" not in vars(module):
        return True
    parallel = getattr(module, "_is_expert_parallel", False)
    return not parallel and module.config._experts_implementation in _IMPLEMENTATIONS
