"""Packed rows taken apart: a gate, its sinks and its budget know documents, attention knows rows."""

import torch


class Documents:
    """The documents of packed rows, each a row of its own, left to right, pads behind.

    Attributes:
        valid: [documents, longest] bool; on_host: the same where segments lie. real: [rows, tokens] bool, the same for
            the packed rows.
    """

    def __init__(self, segments: torch.Tensor, device: torch.device | None = None) -> None:
        """segments: [rows, tokens] int, the document's number in its row, contiguous and from 0; -1 for pads. device:
        of what is taken apart, where that is another one: counting waits for no accelerator then."""
        device = segments.device if device is None else device
        rows, tokens = segments.shape
        counts = segments.amax(-1) + 1
        first = counts.cumsum(0) - counts
        real = segments >= 0
        document = (segments + first[:, None])[real]
        lengths = torch.bincount(document, minlength=int(counts.sum()))
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(document), device=segments.device) - starts[document]
        self.shape, self.real = (rows, tokens), real.to(device)
        self.at = real.flatten().nonzero()[:, 0].to(device)  # of every real token in the packed rows …
        self.to = (document * int(lengths.max()) + place).to(device)  # … and among the documents
        self.on_host = torch.arange(int(lengths.max()), device=segments.device) < lengths[:, None]
        self.valid = self.on_host.to(device)

    def apart(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Packed [rows, ..., tokens at dim, ...] -> [documents, ..., longest, ...], zeros at pads."""
        x = x.movedim(dim, 1)
        out = x.new_zeros(self.valid.numel(), *x.shape[2:]).index_copy(
            0, self.to.to(x.device), x.flatten(0, 1)[self.at.to(x.device)]
        )
        return out.unflatten(0, self.valid.shape).movedim(1, dim)

    def together(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The way back; pads are zero."""
        x = x.movedim(dim, 1)
        rows, tokens = self.shape
        out = x.new_zeros(rows * tokens, *x.shape[2:]).index_copy(
            0, self.at.to(x.device), x.flatten(0, 1)[self.to.to(x.device)]
        )
        return out.unflatten(0, self.shape).movedim(1, dim)
