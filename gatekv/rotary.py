"""How an attention layer turns its keys and queries by position, found out by trying: no list of model names.

Families pair channels (i, i + half) as Llama does, or neighbours as Cohere does; turn a part of the head, or the other
way round; leave some layers without RoPE although these are handed positions too; and norm keys behind it (HunYuan).
The layer's own forward is run on made-up keys and angles, and the rotation that explains what it hands to attention is
the layer's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

Tensor = torch.Tensor

LAYOUTS = ("half", "interleaved")
ANGLES = ("channels", "pairs", "first")
TRIED = 3  # positions of a trial


class Rotary(tuple[Tensor, Tensor]):
    """(cos, sin) of tokens, [batch or 1, tokens, rotary_dim] each, one value a channel: the first rotary_dim ones of a
    head turn.

    Attributes:
        layout: which channels turn together: "half": i and i + rotary_dim / 2; "interleaved": 2i and 2i + 1; "none":
            the layer does not turn keys at all.
        scale: what keys are multiplied by behind the rotation, [head_dim], or None. relative: whether scores depend on
        distances alone; not where channels of a pair are multiplied by different numbers behind the rotation.
    """

    layout: str
    scale: Tensor | None
    relative: bool

    def __new__(
        cls, cos: Tensor, sin: Tensor, layout: str = "half", scale: Tensor | None = None, relative: bool = True
    ) -> Self:
        made = super().__new__(cls, cast(Any, (cos, sin)))
        made.layout, made.scale, made.relative = layout, scale, relative
        return made

    def columns(self, of: Callable[[Tensor], Tensor]) -> "Rotary":
        """Of some of the tokens, or all in another order: `of` tells which from a tensor [batch or 1, tokens, ...]."""
        return Rotary(of(self[0]), of(self[1]), self.layout, self.scale, self.relative)

    def token(self, i: int) -> "Rotary":
        """Of the i-th token alone."""
        return self.columns(lambda t: t[:, i : i + 1])


Angles = Rotary | tuple[Tensor, Tensor]  # a plain pair is in Llama's layout


def _split(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The two channels of each pair, [..., pairs] each."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    return cast("tuple[Tensor, Tensor]", x.chunk(2, -1))


def _joined(a: Tensor, b: Tensor, layout: str) -> Tensor:
    return torch.stack([a, b], -1).flatten(-2) if layout == "interleaved" else torch.cat([a, b], -1)


def _turned(x: Tensor, rotary: Angles, back: bool) -> Tensor:
    layout = getattr(rotary, "layout", "half")
    if layout == "none":
        return x
    width = rotary[0].shape[-1]
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        _split(t, layout) for t in (x[..., :width], *(t[:, None].to(x.dtype) for t in rotary))
    )
    if back:  # cos² + sin² is the square of RoPE's attention scaling
        size = cos_a * cos_b + sin_a * sin_b
        a, b = (a * cos_b + b * sin_a) / size, (b * cos_a - a * sin_b) / size
    else:
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return torch.cat([_joined(a, b, layout), x[..., width:]], -1)


def rotate(x: Tensor, rotary: Angles) -> Tensor:
    """x [batch, heads, tokens, head_dim], turned as RoPE turns it; the inverse of `unrotate`."""
    out = _turned(x, rotary, back=False)
    scale = getattr(rotary, "scale", None)
    return out if scale is None else out * scale.to(x)


def unrotate(keys: Tensor, rotary: Angles) -> Tensor:
    """Keys as they were before RoPE, and behind their norm where that comes after it.

    keys: [batch, kv_heads, tokens, head_dim]; rotary: of the tokens.
    """
    scale = getattr(rotary, "scale", None)
    return _turned(_divided(keys, scale), rotary, back=True)


def asked_from(q: Tensor, now: Angles, there: Angles) -> Tensor:
    """Queries as if they stood elsewhere: q [batch, heads, tokens, head_dim], turned by `now`, which is `relative`;
    `there`: (cos, sin) of the other places, one value a channel."""
    raw = _turned(q, now, back=True)
    return _turned(raw, Rotary(there[0], there[1], getattr(now, "layout", "half")), back=False)


def _divided(x: Tensor, scale: Tensor | None) -> Tensor:
    """x / scale; 0 where the scale is, which lets nothing through."""
    if scale is None:
        return x
    scale = scale.to(x)
    return torch.where(scale == 0, 0, x / torch.where(scale == 0, 1, scale))


@dataclass(frozen=True)
class Rotation:
    """How a layer turns keys and queries by the `position_embeddings` that it is handed.

    Attributes:
        layout: as in `Rotary`. angles: what cos and sin hold: a value for each of "channels"; of "pairs"; or for each
        channel, of which the "first" half is read, one a pair. sign: -1: the other way round.
        norms: names of the layer's modules that norm keys, and queries, behind the rotation.
    """

    layout: str
    angles: str = "channels"
    sign: int = 1
    norms: tuple[str | None, str | None] = (None, None)

    def read(self, given: Any, scale: Tensor | None = None, relative: bool = True) -> Rotary:
        """given: (cos, sin), or one complex tensor, [batch or 1, tokens, width]; the others as in `Rotary`."""
        cos, sin = _real(given)
        if self.layout == "none":
            return Rotary(cos, sin, "none", scale, relative)
        if self.angles == "first":
            cos, sin = (t.chunk(2, -1)[0] for t in (cos, sin))
        if self.angles != "channels":
            cos, sin = (_joined(t, t, self.layout) for t in (cos, sin))
        return Rotary(cos, self.sign * sin, self.layout, scale, relative)


def _real(given: Any) -> tuple[Tensor, Tensor]:
    return (given.real, given.imag) if isinstance(given, Tensor) else given


def rotary_of(module: "SelfAttention | None", given: Any) -> Rotary:
    """What `position_embeddings` mean to a layer; call it while the layer's forward runs.

    module: the self_attn, or None for Llama's way. given: as transformers hands them to it.

    Raises:
        ValueError: no rotation known here explains what the layer does; says what to use instead.
    """
    if module is None:
        return Rotation("half").read(given)
    held = vars(module).get("gatekv")
    found = getattr(held, "rotation", None)
    if found is None:
        found = _find(module, given)
        if held is not None:
            held.rotation = found
    if isinstance(found, str):
        raise ValueError(found)
    weighted = any(name and [*cast(nn.Module, module._modules[name]).parameters()] for name in found.norms)
    return found.read(given, _scale(module, found.norms[0], _real(given)[0].device), not weighted)


def _scale(module: nn.Module, name: str | None, device: torch.device) -> Tensor | None:
    """What a norm multiplies by, read by calling it: where weights are spread over processes, that gathers them."""
    norm = module._modules[name] if name is not None else None
    if norm is None or next(norm.parameters(), None) is None:
        return None
    weight = next(norm.parameters())
    with torch.no_grad():
        return cast(Tensor, norm(torch.ones(cast(int, module.head_dim), dtype=weight.dtype, device=device)))


@torch.compiler.disable
def _find(module: "SelfAttention", given: Any) -> Rotation | str:
    """The layer's rotation, or why there is none."""
    try:
        found = _tried(module, given)
        cause = "it is none of those that gatekv knows"
        if found is not None and all(_is_rms(module, name, _real(given)[0].device) for name in found.norms):
            return found
    except Exception as error:  # whatever a forward says to arguments that are not its model's
        cause = f"trying it failed: {type(error).__name__}: {error}"
    kind = getattr(getattr(module, "config", None), "model_type", "unknown model type")
    return (
        f"gatekv cannot tell how layer {module.layer_idx} of this model ({type(module).__name__}, {kind}) turns keys "
        f"by position ({cause}), and gate='key_mlp' and StreamingLLM(positions='cache') have to turn them back: use "
        "gate='mlp', or positions='original'."
    )


def _is_rms(module: nn.Module, name: str | None, device: torch.device) -> bool:
    """Whether a norm commutes with rotations, but for its weight: it divides by the root mean square, no more."""
    if name is None:
        return True
    norm = cast(nn.Module, module._modules[name])
    weight = next(norm.parameters(), torch.empty(0))
    x = torch.arange(1.0, cast(int, module.head_dim) + 1, device=device).to(weight.dtype)
    with torch.no_grad():
        wanted = norm(torch.ones_like(x)) * x / x.square().mean().sqrt()
        return torch.allclose(norm(x), wanted, rtol=0.02, atol=0.02)


# The trial: the layer's forward on a shell of the layer, whose projections answer with made-up numbers, the same at
# every position. No weight is read, so it is the same for quantised, offloaded and sharded ones.


class _Seen(Exception):
    """Carries what the forward hands to attention."""


class Probe:
    """In an `AttentionCall`'s place: takes what the attention function is handed, and ends the forward."""

    def see(self, q: Tensor, k: Tensor) -> NoReturn:
        """q: [1, heads, tokens, head_dim]; k: [1, kv_heads, tokens, head_dim]."""
        raise _Seen(k, q)


class _StandIn:
    """In a submodule's place: a projection gives one random vector at every position; all else is taken for a norm, and
    multiplies by random numbers of its own."""

    def __init__(self, module: nn.Module, generator: torch.Generator) -> None:
        self.module, self.generator = module, generator
        self.width = getattr(module, "out_features", None) or getattr(module, "nf", None)
        self.vectors: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width = self.width or x.shape[-1]
        if width not in self.vectors:
            self.vectors[width] = torch.rand(width, generator=self.generator, dtype=x.dtype) + 0.5
        vector = self.vectors[width]
        return vector.expand(*x.shape[:-1], width).clone() if self.width else x * vector

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _tried(module: "SelfAttention", given: Any) -> Rotation | None:
    """The first rotation that explains the layer's keys and queries, or None."""
    generator = torch.Generator().manual_seed(0)
    parts = [given] if isinstance(given, Tensor) else list(given)
    if any(t.dim() != 3 for t in parts) or (len(parts) == 1) != parts[0].is_complex():
        return None

    def draw() -> Tensor:
        return torch.rand(1, TRIED, parts[0].shape[-1], generator=generator, dtype=torch.float64) + 0.5

    cos, sin = draw(), draw()  # no two alike, and not those of any angle: each place of theirs shows in the answer
    pack: Callable[[Tensor, Tensor], Any] = torch.complex if len(parts) == 1 else lambda a, b: (a, b)
    plain = type(module)
    plain = getattr(plain, "gatekv_plain", plain)
    shell = object.__new__(plain)
    vars(shell).update(vars(module))
    inner = {n: m for n, m in module._modules.items() if m is not None}
    stand_ins = {name: _StandIn(child, generator) for name, child in inner.items()}
    vars(shell)["_modules"] = cast(Any, stand_ins)
    raw, seen = (_handed(shell, plain, pack(a, b)) for a, b in ((torch.ones_like(cos), 0 * sin), (cos, sin)))
    norms = {name: s.vectors for name, s in stand_ins.items() if not s.width}
    if any((x - x[:, :, :1]).abs().max() > 1e-5 for x in raw):
        return None
    found = []
    for layout, angles, sign in [("none", "channels", 1), *product(LAYOUTS, ANGLES, (1, -1))]:
        try:
            rotary = Rotation(layout, angles, sign).read(pack(cos, sin))
            names = [_norm(raw[i].double(), seen[i].double(), rotary, norms) for i in range(2)]
        except RuntimeError:  # shapes that do not belong together
            continue
        if all(n is not False for n in names):
            found.append(Rotation(layout, angles, sign, cast(Any, tuple(names))))
    return found[0] if found else None


def _norm(raw: Tensor, seen: Tensor, rotary: Rotary, norms: dict[str, dict[int, Tensor]]) -> Any:
    """Name of the norm behind a rotation that makes `seen` of `raw`, None without a norm; False: it does not."""
    scales = {name: by_width.get(raw.shape[-1]) for name, by_width in norms.items()}
    for name, scale in ({None: None} | scales).items():
        if name is None or scale is not None:
            told = Rotary(*rotary, rotary.layout, scale)
            if torch.allclose(rotate(_divided(raw, scale), told), seen, rtol=1e-4, atol=1e-4):
                return name
    return False


def _handed(shell: nn.Module, plain: type[nn.Module], given: Any) -> tuple[Tensor, Tensor]:
    """(keys, queries) that a forward with these position embeddings hands to attention."""
    known = {"position_embeddings": given, "position_ids": torch.arange(TRIED)[None], "gatekv": Probe()}
    names = [*inspect.signature(plain.forward).parameters.values()][2:]
    hidden = torch.zeros(1, TRIED, getattr(shell.config, "hidden_size", 1), dtype=torch.float64)
    told = {p.name: known.get(p.name) for p in names if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    try:
        with torch.no_grad():
            plain.forward(shell, hidden, **(told | known))
    except _Seen as seen:
        return cast("tuple[Tensor, Tensor]", seen.args)
    raise ValueError("its forward does not ask for attention")
