"""Log-probabilities of given tokens from a model whose head never makes the logits of all tokens at once.

A vocabulary of 128k words and 4,096 tokens make 2 GiB of logits in fp32, and their gradient is as large.
While the model runs, the last layer (its head) is replaced by a function that takes only those hidden states
that a token is predicted from, multiplies them with a part of the vocabulary at a time and keeps running sums
of exp(logit). All else is the model's own: whatever it does before the head, and its arguments.

What it does after the head is found once by asking (`find_head`): the head returns chosen numbers instead
of logits, and what the model makes of them must be s x, or c tanh(s x / c). That, and a plain `nn.Linear`
that is called once for all tokens, is true of all 229 families in docs/MODELS.md. Other models, and heads
that LoRA or quantisation has wrapped, give their whole logits (`logps_of_logits`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.models.causal import probe_ids
from lota.models.head_logps import After, HeadLogProbs

logger = logging.getLogger(__name__)


def token_logps(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Log-probability in nats that `model` gives each target, (rows, length) fp32; 0 where it is negative.

    inputs: keyword arguments of the model, of rows of `length` tokens; targets: (rows, length), the token
    predicted AT a position, negative (-100) where none counts. Under autocast the head's operands are rounded
    to its dtype, as its class would; products and all that follows are fp32 with operands of any dtype.
    """
    head = find_head(model)
    if head is None:
        return logps_of_logits(model(**inputs).logits, targets)
    where = (targets >= 0).flatten().nonzero().squeeze(1)  # (counted,): positions in (rows * length,)
    found: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        assert hidden.shape[:-1] == targets.shape, (hidden.shape, targets.shape)
        counted = hidden.flatten(0, 1).index_select(0, where)  # (counted, width)
        found.append(head.logps(counted, targets.flatten().index_select(0, where)))
        return hidden.new_zeros(*hidden.shape[:-1], 1)  # logits of a vocabulary of one word, for the model

    with _replaced(head.layer, forward):
        model(**inputs)
    (counted,) = found
    logps = torch.zeros(targets.numel(), dtype=torch.float32, device=counted.device)
    return logps.index_copy(0, where, counted.float()).view(targets.shape)


def logps_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability in nats of each target, (rows, length) fp32; 0 where it is negative.

    logits: (rows, length, vocabulary); targets: (rows, length), the token predicted AT a position.
    """
    counted = targets >= 0
    nats = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return logits.new_zeros(targets.shape, dtype=torch.float32).masked_scatter(counted, -nats)


class Head(NamedTuple):
    layer: nn.Linear
    after: After

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(tokens,) from hidden states (tokens, width) and targets (tokens,)."""
        weight, kind = self.layer.weight, hidden.device.type
        autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
        narrow = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        return HeadLogProbs.apply(
            hidden, weight, self.layer.bias, targets, self.after, narrow, torch.is_grad_enabled()
        )


# Model -> its head, and what the model does after it (None: not to be replaced).
_asked: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], After | None]] = WeakKeyDictionary()
# What the head is made to return once: a small number for the slope, a large one for the cap, and others.
_LADDER = [2.0**-10, 2.0**20, -(2.0**20), 0.0, -(2.0**-10), 0.5, -1.0, 3.0, -7.0, 20.0, -50.0, 120.0]


def find_head(model: nn.Module) -> Head | None:
    """The layer to replace and what the model does after it; None if logits have to be the model's own.

    A model is asked once, with a forward pass of a few tokens, and again if its head has become another.
    """
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    if type(layer) is not nn.Linear:
        return None
    known = _asked.get(model)
    if known is None or known[0]() is not layer:
        after = _ask(model, layer)
        _asked[model] = known = ref(layer), after
        if after is None:
            logger.info("%s: the logits of all tokens are computed at once", type(model).__name__)
    return None if known[1] is None else Head(layer, known[1])


def presume_head(model: nn.Module, after: After) -> None:
    """Take for known what `find_head` would find by asking, of a model whose weights are not there."""
    layer = model.get_output_embeddings()  # type: ignore[operator]  # of a PreTrainedModel
    if type(layer) is nn.Linear:
        _asked[model] = ref(layer), after


@torch.no_grad()
def _ask(model: nn.Module, layer: nn.Linear) -> After | None:
    """What the model makes of its head's output; None if that is not to be done for single words."""
    given: list[Tensor | None] = []
    own = layer.forward

    def forward(hidden: Tensor) -> Tensor:
        x = own(hidden).float()
        given.append(_with_ladder(x) if _is_plain(layer, hidden, x) else None)
        return x if given[-1] is None else given[-1].clone()  # which the model may write into

    devices = [layer.weight.device] if layer.weight.is_cuda else []
    try:
        ids = probe_ids(model).repeat(2, 1)  # type: ignore[arg-type]  # has embeddings, or raises
        with torch.random.fork_rng(devices), _replaced(layer, forward):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except torch.OutOfMemoryError:  # says what it is
        raise
    except Exception:
        return None
    if len(given) != 1 or given[0] is None or given[0].shape != (*ids.shape, len(layer.weight)):
        return None
    return _fitted(given[0], logits) if given[0].shape == logits.shape else None


def _is_plain(layer: nn.Linear, hidden: Tensor, x: Tensor) -> bool:
    """Whether x, in fp32, is the layer's product, of a weight that blocks can be taken of."""
    if type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    product = F.linear(hidden, layer.weight, layer.bias).float()
    return torch.allclose(x, product, rtol=0, atol=1e-2 * product.abs().max().item())


def _with_ladder(x: Tensor) -> Tensor:
    """x (2, tokens, vocabulary) with the ladder at the beginning of its second row."""
    x = x.clone()
    x[1].view(-1)[: len(_LADDER)] = x.new_tensor(_LADDER)
    return x


def _fitted(x: Tensor, logits: Tensor) -> After | None:
    """The function that gives these logits (2, tokens, vocabulary) of x, whose second row has the ladder."""
    small, large, *_ = logits[1].view(-1)[: len(_LADDER)].tolist()
    scale, cap = small / _LADDER[0], None
    if abs(large) < 0.5 * abs(scale) * _LADDER[1]:
        cap = large
    if not scale or cap == 0:
        return None
    after = After(scale, cap)
    made = after.values(x.clone())
    return after if torch.allclose(made, logits.float(), rtol=1e-5, atol=1e-6) else None


@contextlib.contextmanager
def _replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer with another `forward`; one that it has of its own, as under a mask, comes back."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
