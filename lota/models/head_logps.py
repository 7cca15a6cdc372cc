"""Log-probabilities of targets from hidden states and a head's weight, some words at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lota.system import device_kind

CHUNK_ENTRIES = 1 << 24  # logits at a time: 64 MiB in fp32


class After(NamedTuple):
    """What a model makes of its head's output x: scale x, or cap tanh(scale x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def values(self, x: Tensor) -> Tensor:
        """The logits, in place of x."""
        if self.scale != 1:
            x.mul_(self.scale)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, values: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to x, given the logits."""
        if self.cap is None:
            return self.scale
        return (values / self.cap).square_().mul_(-self.scale).add_(self.scale)


class HeadLogProbs(torch.autograd.Function):
    """log softmax(logits)[target] of (tokens,) from hidden states, where logits = after(hidden W^T + bias).

    hidden: (tokens, width); weight: (vocabulary, width); bias: (vocabulary,) or None; targets: (tokens,).
    Holds the logits of all tokens for CHUNK_ENTRIES / tokens words at a time. narrow: dtype that operands are
    rounded to. keep: whether a backward pass may follow.

    With p the softmax, d logp / d hidden = (1 - p_target) W_target - sum over other words of p W. If the head
    is frozen, that is summed up in the forward pass, and the backward pass only multiplies it by the gradient
    that arrives for each token. If the head trains, the backward pass computes the logits again. The target
    is kept out of the sums: of a token that is nearly certain 1 - p would be rounding otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        after: After,
        narrow: torch.dtype,
        keep: bool,
    ) -> Tensor:
        need_hidden, *need_head = (keep and needed for needed in ctx.needs_input_grad[:3])
        head = _Blocks(hidden, weight, bias, targets, after, narrow)
        # (tokens,): the highest logit so far; the target's logit; sum over other words of exp(logit - top)
        top = torch.full(targets.shape, torch.finfo(head.dtype).min, dtype=head.dtype, device=hidden.device)
        own, others = torch.zeros_like(top), torch.zeros_like(top)
        own_slope: Tensor | float = after.scale if after.cap is None else torch.ones_like(top)
        sums = None  # (tokens, width): sum over other words of exp(logit - top) W
        if need_hidden and not any(need_head):
            sums = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for words, values in head:
                mine, slope = words.of_targets(values), after.slope(values)
                own = torch.where(words.inside, mine, own)
                if isinstance(slope, Tensor):
                    own_slope = torch.where(words.inside, words.of_targets(slope), own_slope)
                higher = torch.maximum(top, values.amax(dim=1))
                shrink = (top - higher).exp_()
                exps = words.without_targets(values.sub_(higher[:, None]).exp_())  # (tokens, words)
                others.mul_(shrink).add_(exps.sum(dim=1))
                if sums is not None:
                    sums.mul_(shrink[:, None])
                    head.add_product(sums, _times(exps, slope), words.weight)
                top = higher
            total = others + (own - top).exp()
            normalizers = top + total.log()
            if sums is not None:  # d logp / d hidden, in place of the sums
                of_targets = head.rounded(weight.index_select(0, targets)).to(head.dtype)
                of_targets.mul_((others / total * own_slope)[:, None])
                sums.div_(-total[:, None]).add_(of_targets)
                ctx.save_for_backward(sums.to(hidden.dtype))
            else:
                ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.after, ctx.narrow, ctx.frozen = after, narrow, sums is not None
        return own - normalizers

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: log-probabilities of tokens have no second derivative")
        with torch.autocast(grad_logps.device.type, enabled=False):
            if ctx.frozen:
                (slopes,) = ctx.saved_tensors
                return (slopes * grad_logps[:, None]).to(slopes.dtype), *(None,) * 6
            return *_head_gradients(ctx, grad_logps), *(None,) * 4


def _head_gradients(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias of a head that trains, a block of words at a time."""
    hidden, weight, bias, targets, normalizers = ctx.saved_tensors
    need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
    head = _Blocks(hidden, weight, bias, targets, ctx.after, ctx.narrow)
    grad_hidden = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if need_bias else None
    for words, values in head:
        slope = ctx.after.slope(values)
        # d logp / d logit = 1[target] - softmax, times the gradient that arrives for each token
        grad = values.sub_(normalizers[:, None]).exp_().mul_(-grad_logps[:, None])  # (tokens, words)
        grad = _times(words.plus_at_targets(grad, grad_logps), slope)
        if grad_bias is not None:
            grad_bias[words.span] = grad.sum(dim=0)
        if grad_hidden is not None:
            head.add_product(grad_hidden, grad, words.weight)
        if grad_weight is not None:
            head.write_product(grad_weight[words.span], grad.t(), head.hidden)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _times(x: Tensor, slope: Tensor | float) -> Tensor:
    return x if isinstance(slope, float) and slope == 1 else x.mul_(slope)


class _Words(NamedTuple):
    """A block of the vocabulary, and which tokens have their target in it."""

    span: slice  # of the vocabulary
    weight: Tensor  # (words, width), as an operand
    inside: Tensor  # (tokens,): whether the target is among these words
    at: Tensor  # (tokens, 1): where; some other word if it is not

    def of_targets(self, values: Tensor) -> Tensor:
        """(tokens,) from (tokens, words): the targets' own; of no meaning where they are outside."""
        return values.gather(1, self.at).squeeze(1)

    def without_targets(self, values: Tensor) -> Tensor:
        """values (tokens, words) with 0 at the targets, in place."""
        return values.scatter_(1, self.at, values.gather(1, self.at).masked_fill_(self.inside[:, None], 0))

    def plus_at_targets(self, values: Tensor, what: Tensor) -> Tensor:
        """values (tokens, words) plus what (tokens,) at the targets, in place."""
        return values.scatter_(1, self.at, values.gather(1, self.at).add_((what * self.inside)[:, None]))


class _Blocks:
    """A head's logits, block by block of the vocabulary: (words, logits (tokens, words) in `dtype`).

    Operands are rounded to `narrow`. Products are fp32 (fp64 of fp64): a GPU adds up in fp32 anyway; a CPU
    multiplies in fp32, 25 times faster than in bf16 where it has no instruction for it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        after: After,
        narrow: torch.dtype,
    ) -> None:
        self.narrow, self.dtype = narrow, torch.promote_types(narrow, torch.float32)
        on_cpu = device_kind(hidden.device) == "cpu"
        self.operand = self.dtype if on_cpu else narrow  # dtype of what is multiplied
        self.weight, self.bias, self.targets, self.after = weight, bias, targets, after
        self.hidden = self.rounded(hidden).to(self.operand)

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.narrow)

    def __iter__(self) -> Iterator[tuple[_Words, Tensor]]:
        tokens, width = self.hidden.shape
        size = max(1, CHUNK_ENTRIES // max(tokens, width))  # neither logits nor operand is larger
        for start in range(0, len(self.weight), size):
            weight = self.rounded(self.weight[start : start + size]).to(self.operand)
            span, at = slice(start, start + len(weight)), self.targets - start
            inside = (at >= 0) & (at < len(weight))
            words = _Words(span, weight, inside, at.clamp(0, len(weight) - 1)[:, None])
            x = self._product(self.hidden, weight.t())
            if self.bias is not None:
                x.add_(self.rounded(self.bias[span]))
            yield words, self.after.values(x)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b in `dtype`."""
        a = a.to(self.operand)
        return torch.mm(a, b) if self.operand == self.dtype else torch.mm(a, b, out_dtype=self.dtype)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b, in `dtype`."""
        if self.operand == self.dtype:
            total.addmm_(a, b)
        else:
            total.add_(self._product(a, b))

    def write_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out = a b, in the dtype of `out`."""
        if out.dtype == self.operand == self.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(self._product(a, b))
