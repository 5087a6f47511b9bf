"""A micro-batch's forward and backward on tensors without contents: what they hold, and how much they compute.

The operations are the run's own, at their full size; only one layer of each kind is taken through them where all layers
are alike.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..report.collectives import bytes_sent
from .encoded import EncodedView, Encoder

# Layers that are run where all are alike: a first, a middle and a last one.
NUM_TRACED = 3
_KINDS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "moe", "experts", "fc"),
    "norms": ("norm", "ln_"),
    "embedding": ("embed", "wte", "wpe"),
    "head and loss": ("lm_head", "output_layer"),
}
OTHER = "between them"
# Of a stretch, what is no whole number of bytes or elements.
_GROUPED = torch.ops.aten._grouped_mm.default
_WORK = ("flops", "moved", "sent")
_ALL_WORK = (*_WORK, *(f"forward_{key}" for key in _WORK))


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of a forward and its backward: a layer, or what comes before or after all of them.

    Attributes:
        saved: bytes that are kept from forward to backward.
        forward: the most bytes in its forward, beyond what was there before.
        backward: the most bytes in its backward, beyond what is kept of it and of all before it.
        gradients: elements of the parameters' gradients that its backward makes.
        observed: bytes that its backward finds out about full gradients, where an optimizer asked for it.
        saved_by: ``saved`` of autograd's tensors, by kind of module.
        offloadable: bytes of the storages that activation offload may take, in order.
        flops: of matrix products, in forward and backward.
        moved: bytes that the other operations read and write.
        sent: bytes that its collectives send to the ranks that share it.
        forward_flops, forward_moved, forward_sent: of these, its forward's; of no use where head and loss are.
    """

    saved: int = 0
    forward: int = 0
    backward: int = 0
    gradients: int = 0
    observed: int = 0
    saved_by: Mapping[str, int] = field(default_factory=dict)
    offloadable: Sequence[int] = ()
    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    forward_flops: float = 0.0
    forward_moved: float = 0.0
    forward_sent: float = 0.0

    def towards(self, other: "Stretch", times: float) -> "Stretch":
        """This one and ``times`` the difference to another: what it is with more sequences."""
        assert len(self.offloadable) == len(other.offloadable)
        found: dict[str, Any] = {
            key: getattr(self, key) + times * (getattr(other, key) - getattr(self, key))
            for key in ("saved", "forward", "backward", "gradients", "observed", *_ALL_WORK)
        }
        # What a stretch takes beyond what is kept may be nothing, and not less.
        whole = {key: value if key in _ALL_WORK else max(0, round(value)) for key, value in found.items()}
        sizes = zip(self.offloadable, other.offloadable, strict=True)
        return Stretch(
            **whole,
            saved_by={
                kind: round(own + times * (other.saved_by.get(kind, 0) - own)) for kind, own in self.saved_by.items()
            },
            offloadable=[round(own + times * (more - own)) for own, more in sizes],
        )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A micro-batch.

    Attributes:
        before: what comes before the first layer.
        layers: in order.
        after: what comes after the last one, up to the loss; its forward ends with the first gradient of a parameter.
    """

    before: Stretch
    layers: Sequence[Stretch]
    after: Stretch

    @property
    def stretches(self) -> list[Stretch]:
        return [self.before, *self.layers, self.after]

    @property
    def saved(self) -> int:
        """Bytes that are kept while the loss is computed."""
        return sum(stretch.saved for stretch in (self.before, *self.layers))

    @property
    def saved_by(self) -> dict[str, int]:
        """What autograd keeps, by kind of module."""
        found: Counter[str] = Counter()
        for stretch in self.stretches:
            found.update(stretch.saved_by)
        return {kind: found[kind] for kind in (*_KINDS, OTHER) if found[kind]}

    @property
    def offloadable(self) -> list[int]:
        """Bytes of the storages that activation offload may take, in order."""
        return [nbytes for stretch in self.stretches for nbytes in stretch.offloadable]

    @property
    def flops(self) -> float:
        return sum(stretch.flops for stretch in self.stretches)

    @property
    def moved(self) -> float:
        return sum(stretch.moved for stretch in self.stretches)

    @property
    def sent(self) -> float:
        return sum(stretch.sent for stretch in self.stretches)

    def with_another_forward(self) -> "Passes":
        """With the work of a second forward, which has no gradients and ends before what comes after the layers."""
        before, *layers = (
            replace(stretch, **{key: getattr(stretch, key) + getattr(stretch, f"forward_{key}") for key in _WORK})
            for stretch in (self.before, *self.layers)
        )
        return replace(self, before=before, layers=layers)

    def towards(self, other: "Passes", times: float) -> "Passes":
        """See :meth:`Stretch.towards`."""
        layers = [own.towards(more, times) for own, more in zip(self.layers, other.layers, strict=True)]
        return Passes(
            before=self.before.towards(other.before, times),
            layers=layers,
            after=self.after.towards(other.after, times),
        )


def trace(
    model: nn.Module,
    layers: nn.ModuleList | None,
    run: Callable[[], Tensor],
    present: Sequence[Tensor],
    *,
    units: Sequence[Any],
    num_layers: int,
    min_offloaded: int | None,
    only_layer_inputs: bool,
    encoder: Encoder | None = None,
    scatter_factor: float = 1.0,
) -> Passes:
    """Take a model through forward and backward, inside :func:`without_contents`.

    Args:
        layers: the model's, as many as :func:`shorten` has left; None where it has none.
        run: the forward, up to a loss, or to what goes to the next stage of a pipeline.
        present: tensors that are there anyway: parameters, buffers, the batch.
        units: the model's compact ones.
        num_layers: of the whole model.
        min_offloaded: bytes of the smallest storage that is offloaded; None where nothing is.
        only_layer_inputs: of these, what goes into layers.
        encoder: what encodes saved tensors; None where all are kept as they are.
        scatter_factor: of :func:`narrowgauge.engine.report.dense_traffic.reduce_scatter_factor`.
    """
    operations = _Operations(scatter_factor)
    watch = _Watch(model, list(layers or ()), present, units, min_offloaded, only_layer_inputs, encoder, operations)
    with watch.watching():
        output = run()
        watch.end_of_forward(output)
        del run
        seed = torch.empty_like(output)
        output.backward(seed)
        del output, seed
    return _expanded(watch.result(), num_layers)


def _expanded(passes: Passes, num_layers: int) -> Passes:
    """The passes of all layers, from those of a first, a middle and a last one."""
    traced = list(passes.layers)
    if len(traced) == num_layers:
        return passes
    middle = traced[1]
    return Passes(
        before=passes.before,
        layers=[traced[0], *[middle] * (num_layers - NUM_TRACED + 1), traced[-1]],
        after=passes.after,
    )


def shorten(layers: nn.ModuleList | None) -> int:
    """Leave a few of a model's layers where all are alike; returns how many there were."""
    if layers is None:
        return 0
    count = len(layers)
    if count > NUM_TRACED and are_alike(layers):
        del layers[NUM_TRACED:]
    return count


def are_alike(layers: nn.ModuleList) -> bool:
    """Whether one layer's passes are every layer's."""
    return len({_description(layer) for layer in layers}) == 1


def _description(layer: nn.Module) -> str:
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()]
    kinds = [getattr(module, "layer_type", getattr(module, "attention_type", None)) for module in layer.modules()]
    windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
    return f"{type(layer).__name__} {shapes} {kinds} {windows}"


@contextmanager
def without_contents(model: nn.Module, units: Sequence[Any], *others: nn.Module) -> Iterator[None]:
    """Within it, a model of the meta device can be run on the CPU's operations without storage.

    Args:
        units: its compact ones.
        others: modules that share its parameters.
    """
    # Parallel layers tell by their values which of them keep the same columns; layers seldom do.
    own = {id(u): torch.arange(u.local.numel()) + n for n, u in enumerate(units) if hasattr(u, "local")}
    with FakeTensorMode(allow_non_fake_inputs=True), _silent(logging.getLogger("torch._subclasses.fake_tensor")):
        made: dict[int, Any] = {}
        for module in (part for whole in (model, *others) for part in whole.modules()):
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = _made(parameter, made)
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = torch.empty_like(buffer, device="cpu")
        for unit in units:
            unit.watch = None
            if id(unit) in own:
                unit.local = own[id(unit)]
            for key, value in unit.subspace().items():
                setattr(unit, key, torch.empty_like(value, device="cpu"))
            if unit.probe is not None:
                omega = unit.omega
                unit.start_probe(unit.probe_kind, None if omega is None else torch.empty_like(omega, device="cpu"))
        yield


@contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    """What cannot be run is told by whoever asked, without PyTorch's traceback."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _made(parameter: nn.Parameter, made: dict[int, Any]) -> nn.Parameter:
    """What stands for a parameter, once for each, with what engines note on it."""
    if id(parameter) not in made:
        found = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
        vars(found).update(vars(parameter))
        made[id(parameter)] = found
    return made[id(parameter)]


class _Watch:
    """Marks where layers begin and end, in forward and in backward, and what is held in between."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        present: Sequence[Tensor],
        units: Sequence[Any],
        min_offloaded: int | None,
        only_layer_inputs: bool,
        encoder: Encoder | None,
        operations: "_Operations",
    ) -> None:
        self._model, self._layers = model, layers
        self._min_offloaded, self._only_inputs, self._encoder = min_offloaded, only_layer_inputs, encoder
        parameters = list(model.parameters())
        self._probes = [unit.probe for unit in units if unit.probe is not None]
        known = [*parameters, *model.buffers(), *self._probes, *present]
        self._operations = operations
        operations.leave_out(known)
        self._trained = [p for p in parameters if p.requires_grad]
        self._known = {id(tensor.untyped_storage()) for tensor in known}
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kinds: list[str] = []
        self._stretches = [_Draft() for _ in range(len(layers) + 2)]
        # Of which stretch the forward, or backward, is at work.
        self._at, self._is_backward, self._has_gradient = 0, False, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers, 1):
                for handle in (
                    layer.register_forward_pre_hook(self._begins(number), with_kwargs=True),
                    layer.register_forward_hook(self._ends(number)),
                ):
                    stack.callback(handle.remove)
            for name, module in self._model.named_modules():
                kind = _kind_of(name.rpartition(".")[2])
                if kind is not None:
                    for handle in (
                        module.register_forward_pre_hook(lambda *_, kind=kind: self._kinds.append(kind)),
                        module.register_forward_hook(lambda *_: self._leave()),
                    ):
                        stack.callback(handle.remove)
            for parameter in self._trained:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._made).remove)
            for probe in self._probes:
                stack.callback(probe.register_post_accumulate_grad_hook(self._observed).remove)
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            stack.enter_context(self._operations)
            yield
            self._close_backward(0)

    def _leave(self) -> None:
        self._kinds.pop()

    def _begins(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_backward:
                return
            self._close_forward(number)
            hidden = next(iter(tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)), None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._close_backward(number))
            if self._only_inputs:
                for tensor in tree_leaves((args, kwargs)):
                    if isinstance(tensor, Tensor) and tensor.is_floating_point():
                        self._mark(tensor)

        return hook

    def _ends(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self._is_backward and number == len(self._layers):
                self._close_forward(number + 1)
                hidden = output if isinstance(output, Tensor) else output[0]
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: self._close_backward(number + 1))

        return hook

    def end_of_forward(self, output: Tensor) -> None:
        """What comes after the last layer goes on to its backward."""
        if self._at <= len(self._layers):
            self._close_forward(len(self._layers) + 1)
        self._is_backward = True

    def _close_forward(self, next_one: int) -> None:
        """The forward of a stretch is through, the next one begins."""
        now, peak = self._operations.cut()
        draft = self._stretches[self._at]
        draft.forward, draft.kept = peak - self._kept_before(self._at), now
        self._take_work(draft)
        draft.forward_flops, draft.forward_moved, draft.forward_sent = draft.flops, draft.moved, draft.sent
        self._at = next_one

    def _close_backward(self, number: int) -> None:
        """The backward of a stretch is through."""
        if number > self._at:
            return
        for left in range(self._at, number, -1):
            self._end_stretch(left)
        self._end_stretch(number)
        self._at = number - 1

    def _end_stretch(self, number: int) -> None:
        _, peak = self._operations.cut()
        draft = self._stretches[number]
        kept = draft.kept if number <= len(self._layers) else self._kept_before(number)
        draft.backward = max(draft.backward, peak - kept)
        self._take_work(draft)

    def _kept_before(self, number: int) -> int:
        return self._stretches[number - 1].kept if number else 0

    def _take_work(self, draft: "_Draft") -> None:
        draft.flops += self._operations.flops
        draft.moved += self._operations.moved
        draft.sent += self._operations.sent
        self._operations.flops = self._operations.moved = self._operations.sent = 0.0

    def _made(self, parameter: Tensor) -> None:
        if not self._has_gradient:
            # What there is before the first gradient is without the buffers of gradients.
            self._has_gradient = True
            _, peak = self._operations.cut()
            last = self._stretches[self._at]
            last.forward = max(last.forward, peak - self._kept_before(self._at))
        self._stretches[self._at].gradients += parameter.numel()
        parameter.grad = None

    def _observed(self, probe: Tensor) -> None:
        assert probe.grad is not None
        self._stretches[self._at].observed += probe.grad.numel() * probe.grad.element_size()
        probe.grad = None

    def _mark(self, tensor: Tensor) -> None:
        """It goes into a layer, and is offloaded: what a codec makes of it, when it is saved."""
        if self._encoder is None:
            self._offload(tensor)
        else:
            storage: Any = tensor.untyped_storage()
            storage._narrowgauge_layer_input = True

    def _pack(self, tensor: Tensor) -> Tensor | EncodedView:
        storage = tensor.untyped_storage()
        if self._is_backward or id(storage) in self._known or storage in self._seen:
            return tensor
        draft, kind = self._stretches[self._at], self._kinds[-1] if self._kinds else OTHER
        if self._encoder is not None and (found := self._encoder.pack(tensor)) is not None:
            view, is_new = found
            if is_new:
                draft.saved_by[kind] += view.codes.nbytes
                self._offload(view.codes.tensor)
            return view
        self._seen.add(storage)
        draft.saved_by[kind] += storage.nbytes()
        if not self._only_inputs:
            self._offload(tensor)
        return tensor

    def _offload(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._min_offloaded is None or storage.nbytes() < self._min_offloaded or hasattr(storage, "_counted"):
            return
        storage._counted = True  # pyright: ignore[reportAttributeAccessIssue]
        self._stretches[self._at].offloadable.append(storage.nbytes())

    def result(self) -> Passes:
        found = []
        for number, draft in enumerate(self._stretches):
            saved = draft.kept - self._kept_before(number) if number <= len(self._layers) else 0
            found.append(
                Stretch(
                    saved=saved,
                    forward=draft.forward,
                    backward=draft.backward,
                    gradients=draft.gradients,
                    observed=draft.observed,
                    saved_by=dict(draft.saved_by),
                    offloadable=tuple(draft.offloadable),
                    flops=draft.flops,
                    moved=draft.moved,
                    sent=draft.sent,
                    forward_flops=draft.forward_flops,
                    forward_moved=draft.forward_moved,
                    forward_sent=draft.forward_sent,
                )
            )
        return Passes(before=found[0], layers=found[1:-1], after=found[-1])


def _unpack(packed: Tensor | EncodedView) -> Tensor:
    return packed.unpack() if isinstance(packed, EncodedView) else packed


@dataclass
class _Draft:
    kept: int = 0
    forward: int = 0
    backward: int = 0
    gradients: int = 0
    observed: int = 0
    saved_by: Counter[str] = field(default_factory=Counter)
    offloadable: list[int] = field(default_factory=list)
    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    forward_flops: float = 0.0
    forward_moved: float = 0.0
    forward_sent: float = 0.0


def _kind_of(name: str) -> str | None:
    lowered = name.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in lowered for part in parts)), None)


class _Operations(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live, and the work.

    Attributes:
        now: bytes.
        flops, moved, sent: since someone last set them to zero.
    """

    def __init__(self, scatter_factor: float) -> None:
        super().__init__()
        self.now = self._peak = 0
        self.flops = self.moved = self.sent = 0.0
        self._factor = scatter_factor

    def leave_out(self, known: Sequence[Tensor]) -> None:
        """These are there anyway."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        # Storages are told apart as long as their tensors are there.
        self._present = list(known)

    def cut(self) -> tuple[int, int]:
        """Bytes now, and the most since the last call."""
        peak, self._peak = self._peak, self.now
        return self.now, peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.sent += bytes_sent(func, args, scatter_factor=self._factor)[0]
        try:
            result = _grouped(*args, **kwargs) if func is _GROUPED else func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            # Some value that is asked for; shapes that followed from it would be wrong, and are refused elsewhere.
            return _some(args[0].dtype)
        packet = func._overloadpacket
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in outputs:
            self._add(tensor.untyped_storage())
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet in _ATTENTION:
            self.flops += _ATTENTION[packet](*args)
        elif func is _GROUPED:
            self.flops += _grouped_flops(*args)
        elif not func.is_view and packet not in _FREE:
            inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        nbytes = storage.nbytes()
        self.now += nbytes
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._drop, nbytes)

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes


def _some(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> float:
    # Scores again, and the gradients of scores, queries, keys and values.
    return 2.5 * float(sdpa_flop_count(query.shape, key.shape, value.shape))


_FREE = {
    torch.ops.aten._unsafe_view,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten.empty_strided,
}
# The CPU's, which stands for the GPU's.
_ATTENTION: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Products of each expert's tokens, without contents: PyTorch tells their shapes in bf16 alone."""
    shape = (a.shape[-2], b.shape[-1])
    if a.dim() == b.dim():
        # A product of each expert: of matrices, or of the tokens that offsets part.
        shape = (a.shape[0] if offs is None else offs.numel(), *shape)
    return a.new_empty(shape, dtype=out_dtype)


def _grouped_flops(a: Tensor, b: Tensor, *others: Any) -> float:
    """Each token meets one expert's matrix."""
    return 2 * a.shape[-2] * b.numel() if b.dim() == 2 and a.dim() == 3 else 2 * a.numel() * b.shape[-1]
