"""Machinery shared by the masked optimizers: state for kept entries only, gather, clip, update, write back.

What a parameter's state holds, by key:

    positions      int32 (kept,), ascending, in the flattened parameter, if single entries are kept
    tiles          int32, numbers of the tiles of `tile_shape` if whole rows, columns or blocks are kept
    master         fp32 (kept,), the exact values; absent if the parameter itself is fp32, and without masters
    square_avg...  fp32 or bf16 (kept,), the buffers of the update rule; of a factored one its
                   ..._rows, ..._columns in fp32 (lota/optim/low_precision.py)
    step           updates made so far
    anchor, pull   of lota/optim/pull.py, if trained entries are pulled to where they started

Values, gradients and buffers (kept,) are in the order of lota/optim/kept.py.

An update of a parameter goes: gather its gradient's kept entries into an fp32 tensor (kept,), sum over the
passes of an accumulation, clip, update the values (kept,), write them back into the parameter. Where state or
values are not fp32, the gradient of a whole parameter stays as it is and an update goes piece by piece. With
other processes (lota/optim/peers.py) their sum stands before the clipping, and all updates are made by
`step()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lota.masks import Mask
from lota.optim import launches
from lota.optim.clipping import check_settings, scale_to, tensor_limit, total
from lota.optim.frozen_gradients import clear_frozen_gradients
from lota.optim.kept import Everything, Kept, kept_entries
from lota.optim.low_precision import Precision, norm_of, update_in_pieces
from lota.optim.peers import Peers
from lota.optim.pull import ANCHOR, with_pull
from lota.optim.stored_state import OwnState, matching_states


class MaskedOptimizer(torch.optim.Optimizer):
    """Base of the masked optimizers: gather the kept gradient, clip, update, write back.

    model: a module, or (name, parameter) pairs, already on its device; parameters must be contiguous.
    mask: `lota.Mask` whose names and shapes fit; None trains every parameter that requires a gradient,
    densely.
    grad_norm_strategy: `even` clips each tensor's kept gradient to max_grad_norm, `proportional` to
    max_grad_norm / sqrt(number of trained tensors), `global` clips the norm over all of them, `none` does
    not clip.
    masters: hold fp32 copies of kept entries whose parameter is narrower. Without them updates are rounded to
    the parameter's dtype, and a `SwallowedUpdatesWarning` tells the share that this undoes.
    stochastic_rounding: bf16 parameters without masters, updates rounded up or down by lot, so that they add
    up on average. optimizer_state: of buffers, `float32`, `bfloat16` (rounded by lot) or `factored` (square
    averages of matrices as means of rows and columns, other buffers in bf16; for whole matrices only).
    seed: of the lots, which are a function of seed, parameter name, step and position.
    trained: names of the parameters that train, if these are parts of a sharded model's: some may have no
    kept entry in this part; None: those that have one.

    Sets `requires_grad` to False on every parameter without kept entries. One learning rate per group,
    read from `param_groups` when an update is made. Raises ValueError for a mask of another model, an
    unknown strategy, a precision that cannot be had, or when nothing would train.
    """

    square_average: str | None = None  # key of the buffer that is a running mean of squared gradients

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        mask: Mask | None = None,
        *,
        grad_norm_strategy: str = "none",
        max_grad_norm: float | None = None,
        masters: bool = True,
        stochastic_rounding: bool = False,
        optimizer_state: str = "float32",
        seed: int = 0,
        trained: Collection[str] | None = None,
        **settings: Any,
    ):
        check_settings(grad_norm_strategy, max_grad_norm, settings)
        named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
        if mask is not None:
            mask.check({name: p.shape for name, p in named})
        self.grad_norm_strategy = grad_norm_strategy
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.model = model if isinstance(model, nn.Module) else None
        self.names: dict[nn.Parameter, str] = {}  # of the parameters that train
        self.kept: dict[nn.Parameter, Kept] = {}  # which of their entries do
        self.fused = False
        self.peers: Peers | None = None  # other processes that train the same tensors
        self._accumulation = 1
        self._pending: dict[nn.Parameter, tuple[Tensor, int]] = {}  # summed gradient, passes it came from
        self._aside: dict[nn.Parameter, tuple[int, Tensor]] = {}  # autograd's number of the pass, gradient
        self._square_norms: list[Tensor] = []  # of the gradients since the last step, before clipping
        self._free = torch.empty(0)  # of these: not used yet
        self._grad_norm: Tensor | None = None
        for name, p in named:
            kept = mask.kept(name) if mask is not None else (p.numel() if p.requires_grad else 0)
            trains = kept > 0 if trained is None else name in trained
            p.requires_grad_(trains)
            if trains:
                if not p.is_contiguous():
                    raise ValueError(f"parameter {name} is not contiguous; call .contiguous() on it first")
                self.names[p] = name
        if not self.names:
            raise ValueError("nothing would train: the mask keeps no entry of any parameter")
        self.dtypes = {p: p.dtype for p in self.names}
        self.precision = Precision(masters, stochastic_rounding, optimizer_state, seed)
        self.precision.check(type(self).__name__, self.square_average, set(self.dtypes.values()))
        super().__init__(list(self.names), settings)
        for p, name in self.names.items():
            self.kept[p] = Everything(p.shape) if mask is None else kept_entries(mask, name, p.device)
            self._init_state(p)
            clear_frozen_gradients(p, self)

    def _init_state(self, p: nn.Parameter) -> None:
        state, kept = self.state[p], self.kept[p]
        state.update(kept.state)
        if self.precision.has_master(p.dtype):
            state["master"] = self.working_values(p).float()
        for key in self._buffer_names(self._group_of(p)):
            square = key == self.square_average
            state.update(self.precision.buffer(key, kept, self.names[p], square, p.device))
        state["step"] = 0

    # What a rule defines

    def _buffer_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Keys of the rule's buffers in the state."""
        raise NotImplementedError

    def _update(self, values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change values (kept,) and the state's buffers in place; all are fp32."""
        raise NotImplementedError

    def _squared(self, values: Tensor, grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """What the square average is of, and its decay; of rules that have one."""
        raise NotImplementedError

    def _step_by(
        self, values: Tensor, grad: Tensor, square: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """`_update` by a square average that holds this gradient already."""
        raise NotImplementedError

    def _kernel_rule(self, state: dict[str, Any], group: dict[str, Any]) -> launches.Rule:
        """The kernel that computes the same, and the numbers of this step; for rules that have one."""
        raise NotImplementedError

    # Reading

    @property
    def n_trained(self) -> int:
        """Number of entries that train."""
        return sum(kept.count for kept in self.kept.values())

    @property
    def gradient_accumulation_steps(self) -> int:
        """Backward passes per update if fused; 1 otherwise: then the caller's loop decides."""
        return self._accumulation

    @property
    def grad_norm(self) -> float:
        """Global norm of the trained gradient before clipping, as of the last `step()`; nan before it."""
        return math.nan if self._grad_norm is None else float(self._grad_norm)

    def positions(self, p: nn.Parameter) -> Tensor | None:
        """Flat kept positions of a trained parameter, in the order of its values; None if all are kept."""
        kept = self.kept[p]
        return None if isinstance(kept, Everything) else kept.positions()

    def kept_values(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """(name, flat positions or None if all are kept, `exact_values`) of every trained parameter."""
        for p, name in self.names.items():
            yield name, self.positions(p), self.exact_values(p)

    def exact_values(self, p: nn.Parameter) -> Tensor:
        """Values of a parameter's kept entries, (kept,): fp32 masters if there are any, else its own."""
        return self.state[p]["master"] if "master" in self.state[p] else self.working_values(p)

    def state_bytes(self) -> int:
        """Bytes of positions, masters and buffers."""
        return sum(t.nbytes for state in self.state.values() for t in state.values() if torch.is_tensor(t))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks first in `scaler.step(optimizer)`."""
        if self.fused:
            raise RuntimeError(
                "a GradScaler unscales gradients after the backward pass, where the fused optimizer has used "
                "them already: train in bf16 without a GradScaler, or leave out lota.fuse_in_backward"
            )
        return False

    # Steps

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's stub has an overload for either kind of closure
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Apply what has not been applied yet.

        Deferred: all gradients. Fused: the clipping and updates that had to wait for the end of the
        backward pass (`global`, or parameters whose gradient came fewer times than
        `gradient_accumulation_steps`). Call it once per optimizer step in either mode; then `grad_norm` is
        that of this step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.fused:
            self._receive_all()
        self._apply_pending()
        if self._square_norms:
            self._grad_norm = total(self._square_norms).sqrt()
        self._square_norms, self._free = [], self._free[:0]
        first = next(iter(self.names))
        self.precision.swallowed.warn(self.state[first]["step"], first.dtype, self.param_groups[0]["lr"])
        return loss

    def put_aside(self, p: nn.Parameter, grad: Tensor) -> None:
        """Keep a part of p's compact fp32 gradient (kept,) until the running backward pass has all of it."""
        number = torch._C._current_graph_task_id()
        before = self._aside.get(p)
        # what another pass left here died with it: an error stopped that pass before p's hook
        if before is not None and before[0] == number:
            grad = before[1].add_(grad)
        self._aside[p] = (number, grad)

    @torch.no_grad()
    def receive(self, p: nn.Parameter) -> None:
        """Take over p.grad: gather its kept entries, add what compact layers put aside; fused: free it."""
        whole = p.grad
        assert whole is not None  # hooks run once it is there
        aside, squares = self._aside.pop(p, None), None
        if aside is not None and aside[0] == torch._C._current_graph_task_id():
            grad = aside[1]
            if not whole.is_sparse:  # something else than compact layers used the weight too
                grad = grad.add_(self._gathered(p, whole))
        elif self._has_kernels(p) and not whole.is_sparse:
            slot = self._slot(p.device) if self._updates_at_once(p) else None
            (grad,), squares = launches.gather([self.kept[p]], [whole], slot)
        else:
            grad = self._gathered(p, whole)
        if self.fused:
            p.grad = None
        if squares is None:
            self.accumulate(p, grad)
        else:
            self.accumulate(p, grad, squares)

    def _updates_at_once(self, p: nn.Parameter) -> bool:
        """Whether the gradient of one backward pass is all that p's update waits for."""
        return self._accumulation == 1 and not self._waits and p not in self._pending

    @property
    def _waits(self) -> bool:
        """Whether complete gradients wait for `step()`."""
        return self.grad_norm_strategy == "global" or self.peers is not None

    def _receive_all(self) -> None:
        """Take over all gradients after a backward pass; those that have kernels together."""
        wholes = {p: p.grad for p in self.names if p.grad is not None}
        for together in self._by_device([p for p in wholes if not wholes[p].is_sparse]):
            grads, _ = launches.gather([self.kept[p] for p in together], [wholes.pop(p) for p in together])
            self._pending |= {p: (grad, 1) for p, grad in zip(together, grads, strict=True)}
        for p in wholes:
            self.receive(p)

    def _gathered(self, p: nn.Parameter, whole: Tensor) -> Tensor:
        """The kept entries of a whole gradient in fp32, (kept,); unless fused, in memory of their own.

        If a whole parameter is updated in pieces and nothing is added up, in the gradient's dtype and memory.
        """
        kept = self.kept[p]
        found = kept.gather(whole.to_dense() if whole.is_sparse else whole)
        whole_in_pieces = isinstance(kept, Everything) and self.precision.in_pieces(p.dtype)
        if whole_in_pieces and self._accumulation == 1 and found.dtype != torch.float32:
            return found
        shared = isinstance(kept, Everything) and found.dtype == torch.float32 and not self.fused
        return found.clone() if shared else found.float()

    def forget_gradients(self) -> None:
        """Drop gradients that no update has used yet."""
        self._pending.clear()
        self._aside.clear()

    def accumulate(self, p: nn.Parameter, grad: Tensor, squares: Tensor | None = None) -> None:
        """Add a pass's compact fp32 gradient (kept,); update if it is complete and needs no other's norm.

        squares: the square of its norm, (1,), which counts as measured if the update is made now.
        """
        before, count = self._pending.pop(p, (None, 0))
        if before is not None:
            grad, squares = before.float().add_(grad), None  # itself if it is fp32
        elif self.peers is not None:
            grad = self.peers.begin(p, grad)
        complete = count + 1 >= self._accumulation
        if not complete or self._waits:
            self._pending[p] = (grad, count + 1)
            if complete and self.peers is not None:
                self.peers.complete(p)
        else:
            self._apply(p, grad, squares)

    def _apply(
        self, p: nn.Parameter, grad: Tensor, squares: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Clip the complete gradient (kept,), update the kept values, write them back.

        squares: of the whole tensor's norm, (1,), if measured and counted already. scale: what `global`
        clipping multiplies the gradient with.
        """
        if self._has_kernels(p):
            if squares is None:
                squares = launches.squares_of([grad], self._slot(p.device))
            self._apply_together({p: grad}, squares)
            return
        if self.grad_norm_strategy != "global":  # `step` has measured those
            norm = norm_of(grad) if squares is None else squares.sqrt()
            if squares is None:
                self._square_norms.append(norm.square())
            limit = self._tensor_limit()
            if limit < math.inf:
                scale = scale_to(limit, norm)
        state, kept, group = self.state[p], self.kept[p], self._group_of(p)
        state["step"] += 1
        values = self._current_values(p)
        if self.precision.in_pieces(p.dtype):
            update_in_pieces(
                self, values, grad, state, group,
                precision=self.precision, name=self.names[p], kept=kept, scale=scale,
            )  # fmt: skip
        else:
            clipped = grad if scale is None else grad.mul_(scale)
            self._update(values, with_pull(clipped, values, state), state, group)
        if not isinstance(kept, Everything) or "master" in state:  # else the parameter itself
            self.write(p, values)

    def _apply_pending(self) -> None:
        """Apply what waited for the end of the backward pass; parameters that have kernels together."""
        grads = {p: self._pending[p][0] for p in self.names if p in self._pending}  # one order in either mode
        self._pending.clear()
        if self.peers is not None:
            grads = self.peers.gradients(grads)
        together = self._by_device(grads)
        squares = [launches.squares_of([grads[p] for p in served]) for served in together]
        alone = grads.keys() - {p for served in together for p in served}
        parts = self.peers is not None and self.peers.parts
        norms: dict[nn.Parameter, Tensor] = {}  # squares, of those that are not `_apply`'s to measure
        if parts or self.grad_norm_strategy == "global":
            norms = {p: norm_of(grads[p]).square() for p in grads if p in alone}
        if parts:
            squares, norms = self._of_whole_tensors(together, squares, norms)
        else:
            self._square_norms += [*squares, *norms.values()]
        scale = None
        if self.grad_norm_strategy == "global" and self._square_norms:
            whole = total(self._square_norms)
            scale = scale_to(self.max_grad_norm, whole.sqrt())
            squares = [whole.to(own.device).view(1) for own in squares]
        for served, square in zip(together, squares, strict=True):
            self._apply_together({p: grads[p] for p in served}, square)
            for p in served:
                del grads[p]
        for p in list(grads):  # each is freed when it is used
            self._apply(p, grads.pop(p), norms.get(p), scale if scale is None else scale.to(p.device))

    def _of_whole_tensors(
        self, together: list[list[nn.Parameter]], squares: list[Tensor], norms: dict[nn.Parameter, Tensor]
    ) -> tuple[list[Tensor], dict[nn.Parameter, Tensor]]:
        """The squares of norms of tensors of which each process holds a part, which count as measured."""
        assert self.peers is not None
        place = {p: at for at, p in enumerate(self.names)}
        own = torch.zeros(len(place), device=next(iter(place)).device)
        for served, square in zip(together, squares, strict=True):
            own[[place[p] for p in served]] = square.to(own.device)
        for p, square in norms.items():
            own[place[p]] = square
        whole = self.peers.squares(own)
        self._square_norms.append(whole)
        found = [whole[[place[p] for p in served]].to(served[0].device) for served in together]
        return found, {p: whole[place[p]].to(p.device) for p in norms}

    def _tensor_limit(self) -> float:
        """What each tensor's norm is clipped to; infinite if it is not."""
        return tensor_limit(self.grad_norm_strategy, self.max_grad_norm, len(self.names))

    # With kernels (lota/optim/launches.py)

    def _has_kernels(self, p: nn.Parameter) -> bool:
        if not self.kept[p].count or self.precision.in_pieces(p.dtype) or not _rule_has_kernel(type(self)):
            return False
        if ANCHOR in self.state[p]:  # which no kernel reads
            return False
        return launches.serves(p, self.kept[p], self.state[p])

    def _by_device(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those that have kernels, by the device that they are on."""
        found: dict[torch.device, list[nn.Parameter]] = {}
        for p in parameters:
            if self._has_kernels(p):
                found.setdefault(p.device, []).append(p)
        return list(found.values())

    def _apply_together(self, grads: dict[nn.Parameter, Tensor], squares: Tensor) -> None:
        """What `_apply` does, of several parameters on one device. squares: see `launches.update`."""
        limit = self.max_grad_norm if self.grad_norm_strategy == "global" else self._tensor_limit()
        updates = []
        for p, grad in grads.items():
            state = self.state[p]
            state["step"] += 1
            rule = self._kernel_rule(state, self._group_of(p))
            updates.append(launches.Update(p, self.kept[p], state, grad, rule, limit))
        launches.update(updates, squares)

    def _slot(self, device: torch.device) -> Tensor:
        """Room for the next square of a norm, (1,), in a tensor that they share until the step."""
        if not len(self._free) or self._free.device != device:
            self._free = torch.zeros(len(self.names), device=device)
            self._square_norms.append(self._free)
        slot, self._free = self._free[:1], self._free[1:]
        return slot

    # Kept entries of a parameter

    def working_values(self, p: nn.Parameter) -> Tensor:
        """Kept entries of the parameter itself, (kept,); a view if all are kept."""
        return self.kept[p].gather(p.detach())

    def _current_values(self, p: nn.Parameter) -> Tensor:
        """The values to update, (kept,): fp32 masters if there are any.

        An entry that somebody else has changed since the last update (a moving average, a merge,
        `load_state_dict`) no longer is its master rounded; its master becomes the new value.
        """
        values = self.working_values(p)
        if p.dtype != self.dtypes[p]:
            raise RuntimeError(
                f"{self.names[p]} has become {p.dtype} since the optimizer was made: cast the model first"
            )
        if "master" not in self.state[p]:
            return values
        master = self.state[p]["master"]
        changed = master.to(p.dtype) != values
        return master.copy_(torch.where(changed, values.float(), master))

    def write(self, p: nn.Parameter, values: Tensor) -> None:
        """Set the parameter's kept entries, rounding to its dtype; a master stays as it is."""
        self.kept[p].write(p.detach(), values)

    def _group_of(self, p: nn.Parameter) -> dict[str, Any]:
        if len(self.param_groups) == 1:
            return self.param_groups[0]
        return next(group for group in self.param_groups if any(q is p for q in group["params"]))

    # Checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore positions and state in the dtypes they were saved in (torch's default casts state to the
        parameter's dtype).

        Raises ValueError if the state belongs to another mask, another set of parameters or another rule.
        """
        own = [p for group in self.param_groups for p in group["params"]]
        restored = matching_states(
            state_dict, [OwnState(self.names[p], self.state[p], self.kept[p], p.device) for p in own]
        )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for p, state in zip(own, restored, strict=True):
            self.state[p] = state


def _rule_has_kernel(kind: type[MaskedOptimizer]) -> bool:
    """Whether the class that defines the update rule also says which kernel computes it."""
    definer = (next(c for c in kind.__mro__ if name in vars(c)) for name in ("_update", "_kernel_rule"))
    return next(definer) is next(definer) is not MaskedOptimizer
