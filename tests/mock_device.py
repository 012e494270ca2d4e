"""A device that is not there, for tests of what would go wrong on one that is.

Its tensors hold their data on the CPU and claim another device. Under `MockDevices`, an operation that mixes devices
raises, as it would on an accelerator, and whatever an accelerator would have to wait for is counted, with the line of
gatekv that asked:

    devices = MockDevices()
    model = devices.move(tiny())
    with torch.no_grad(), devices:
        out = model(input_ids=devices.tensor(ids), past_key_values=KVCache(model, "snapkv", 0.5))
    host(out.logits)            # the data
    devices.reads               # {"item gatekv/cache/layer.py:120": 3, …}
    devices.written             # {"cpu -> meta:0 gatekv/cache/layer.py:80": 1, …}

The claimed device is "meta:0" (or any other index): the only type beside "cpu" that every build of torch can index on.
Models are loaded before they are moved: transformers itself initialises weights on "meta".
"""

import collections
import contextlib
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

torch._C._ensureCUDADeviceGuardSet()  # indexing asks for a guard of the device's type
TYPE = "meta"
READ = {"item", "tolist", "numpy", "cpu", "equal", "__bool__", "__int__", "__float__", "__index__", "__complex__"}
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
         "unique_consecutive", "repeat_interleave"}  # fmt: skip
COPIES = {"_to_copy", "copy_", "to"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevices(RuntimeError):
    """An operation had tensors of several devices."""


class MockTensor(torch.Tensor):
    """A tensor that claims a device; `data_on_host` is what it holds, `devices` the `MockDevices` that it is of."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, device, devices: "MockDevices", requires_grad: bool = False):
        data = data.detach()
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            shape = torch.empty_strided(data.size(), data.stride(), dtype=data.dtype, device=TYPE)
        self = torch.Tensor._make_subclass(cls, shape, requires_grad, dispatch_device=True)
        self.data_on_host, self.claimed, self.devices = data, torch.device(device), devices
        return self

    def __repr__(self, **kwargs):
        return f"MockTensor({self.claimed}, {self.data_on_host})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        mock = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, MockTensor))
        return mock.devices.dispatch(func, args, kwargs or {})


def host(value):
    """The data of a mock tensor, or of all of them in a list, tuple or dict; what is on the CPU stays as it is."""
    return tree_map(lambda t: t.data_on_host if isinstance(t, MockTensor) else t, value)


def _claims(device) -> torch.device | None:
    """The mock device that is meant, or None."""
    if not isinstance(device, (str, torch.device)):
        return None
    try:
        device = torch.device(device)
    except RuntimeError:
        return None
    return torch.device(TYPE, device.index or 0) if device.type == TYPE else None


def _asker() -> str:
    """The innermost line of gatekv on the stack, or "elsewhere"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if "/gatekv/" in path and "/tests/" not in path:
            return f"gatekv/{path.rpartition('/gatekv/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Dispatch(TorchDispatchMode):
    def __init__(self, devices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.devices.dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What never gets as far as an operation on a tensor without data: reads, moves, and tensors made of numbers."""

    def __init__(self, devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(first, MockTensor):
            if name in READ:
                self.devices.count_read(name)
                return func(*host(args), **host(kwargs))
            if name in ("data_ptr", "untyped_storage"):
                return func(first.data_on_host)
            if name == "new_tensor":
                return self.devices.made(torch.tensor, args[1:], {"dtype": first.dtype} | kwargs, first.claimed)
        if isinstance(first, torch.Tensor) and name in ("to", "cuda"):
            wanted = _claims(TYPE) if name == "cuda" else None
            for value in (*args[1:], *kwargs.values()):
                wanted = wanted or _claims(value.device if isinstance(value, torch.Tensor) else value)
            if wanted is not None:
                return self._moved(first, wanted, args[1:], kwargs)
        if _claims(kwargs.get("device")) is not None:
            return self.devices.made(func, args, kwargs, _claims(kwargs["device"]))
        return func(*args, **kwargs)

    def _moved(self, tensor, device, args, kwargs):
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        dtype = like.dtype if like is not None else dtypes[0] if dtypes else tensor.dtype
        if tensor.device == device:
            return tensor if tensor.dtype == dtype and not kwargs.get("copy") else tensor.to(dtype, copy=True)
        self.devices.count_write(f"{tensor.device} -> {device}")
        return _Move.apply(tensor, device, dtype, self.devices)


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back to where it was copied from."""

    @staticmethod
    def forward(ctx, tensor, device, dtype, devices):
        ctx.back = tensor.device, tensor.dtype, devices
        return devices.tensor(host(tensor).to(dtype, copy=True), device)

    @staticmethod
    def backward(ctx, grad):
        device, dtype, devices = ctx.back
        data = host(grad).to(dtype, copy=True)
        return devices.tensor(data, device) if device.type == TYPE else data, None, None, None


class MockDevices:
    """Devices that are not there; a context manager.

    Attributes:
        reads: what the host waited for -> how often. Keys: what was asked and the line of gatekv, or "elsewhere".
        written: copies to a device -> how often.
    """

    def __init__(self):
        self.reads, self.written = collections.Counter(), collections.Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def tensor(self, data: torch.Tensor, device="meta:0") -> MockTensor:
        """A tensor on a device, of data on the CPU."""
        return MockTensor(data, device, self)

    def move(self, module: torch.nn.Module, placed=lambda name: "meta:0") -> torch.nn.Module:
        """The module, with parameters and buffers on the devices that placed(name) says; tied ones stay tied."""
        seen = {}
        for prefix, part in module.named_modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, MockTensor):
                        continue
                    if id(tensor) not in seen:
                        moved = self.tensor(tensor.detach().clone(), placed(f"{prefix}.{name}"))
                        if isinstance(tensor, torch.nn.Parameter):
                            moved = torch.nn.Parameter(moved, tensor.requires_grad)
                        seen[id(tensor)] = tensor, moved  # the tensor too: its id must stay its own
                    tensors[name] = seen[id(tensor)][1]
        return module

    def count_read(self, what: str) -> None:
        self.reads[f"{what} {_asker()}"] += 1

    def count_write(self, what: str) -> None:
        self.written[f"{what} {_asker()}"] += 1

    def made(self, function, args, kwargs, device):
        """What a function that makes tensors gives on a device."""
        if getattr(function, "__name__", "") in ("tensor", "as_tensor"):
            self.count_write(f"cpu -> {device}")
        out = function(*host(args), **host(kwargs) | {"device": "cpu"})
        return tree_map(lambda t: self.tensor(t, device) if isinstance(t, torch.Tensor) else t, out)

    def dispatch(self, func, args, kwargs):
        """One operation of torch's dispatcher: checked, counted, done on the CPU, and claimed for its device."""
        if func is torch.ops.prim.device.default:
            return args[0].claimed if isinstance(args[0], MockTensor) else func(*args)
        name = func.name().removeprefix("aten::").partition(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mocks = [t for t in tensors if isinstance(t, MockTensor)]
        device = mocks[0].claimed if mocks else torch.device("cpu")
        if name in COPIES:
            device = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or device)
            self._count_copy(args[1] if name == "copy_" else args[0], device)
        else:
            self._check(name, args, tensors, mocks)
            device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else device
        device = _claims(device) or device
        given = dict(kwargs)
        if given.get("device") is not None:
            given["device"] = torch.device("cpu")
        out = func(*host(args), **host(given))
        if device.type != TYPE:
            return out
        held = {id(t.data_on_host): t for t in mocks}  # an operation in place gives its own tensor back
        wrap = lambda t: held.get(id(t)) if id(t) in held else self.tensor(t, device)  # noqa: E731
        return tree_map(lambda t: wrap(t) if isinstance(t, torch.Tensor) else t, out)

    def _count_copy(self, source: torch.Tensor, device: torch.device) -> None:
        if isinstance(source, MockTensor) and device.type == "cpu":
            self.count_read("cpu")
        elif source.device != device and device.type == TYPE:
            self.count_write(f"{source.device} -> {device}")

    def _check(self, name: str, args, tensors: list[torch.Tensor], mocks: list[MockTensor]) -> None:
        """Raises MixedDevices; counts what the host waits for. Numbers, tensors without dimensions, may be anywhere."""
        if lost := [t for t in tensors if t.device.type == TYPE and not isinstance(t, MockTensor)]:
            raise MixedDevices(f"{name} has a tensor without data, such as a list taken for an index: {lost[0].shape}")
        found = {str(t.device) for t in tensors if not (t.device.type == "cpu" and t.dim() == 0)}
        indices = [i for i in args[1] if i is not None] if name in INDEXES else []
        if len(found) > 1:
            if not isinstance(args[0], MockTensor) or not indices or len({str(t.device) for t in mocks}) > 1:
                raise MixedDevices(f"{name} mixes {', '.join(sorted(found))} at {_asker()}")
            if any(not isinstance(t, MockTensor) and t.dim() for t in args[2:] if isinstance(t, torch.Tensor)):
                raise MixedDevices(f"{name} writes a tensor of the CPU to {args[0].device} at {_asker()}")
            self.count_write(f"index cpu -> {args[0].device}")
        if mocks and (name in WAITS or any(i.dtype == torch.bool for i in indices if isinstance(i, MockTensor))):
            self.count_read(name)
