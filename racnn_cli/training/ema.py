"""Averaged weights: an exponential moving average of what a phase trains, with torch's AveragedModel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from racnn_cli.core import distributed


class Ema:
    """Moving average of parameters and buffers; without effect where the decay is 0.

    Args:
        model: the network, whose names the averages have.
        modules: the parts of it that are trained.
        decay: of the average. It grows to this value over the first updates, so that a short phase is not an average
            over its start.

    Attributes:
        values: name in the network's state dict to its average.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], decay: float) -> None:
        self.decay, self.values, self._live = decay, dict[str, Tensor](), dict[str, Tensor]()
        if decay <= 0:
            return
        self._trained = nn.ModuleList(modules)
        self._averaged = AveragedModel(self._trained, avg_fn=self._average, use_buffers=True)
        self.updates = 0
        names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        averages = self._averaged.module.state_dict()
        for key, tensor in self._trained.state_dict(keep_vars=True).items():
            self._live[names[id(tensor)]] = tensor
            self.values[names[id(tensor)]] = averages[key]

    @property
    def updates(self) -> int:
        """Updates that the average has seen."""
        return int(self._averaged.n_averaged) - 1 if self.values else 0

    @updates.setter
    def updates(self, count: int) -> None:
        # At 0 AveragedModel would copy the weights instead of averaging: it starts at 1, from the copy it was made of.
        if self.decay > 0:
            self._averaged.n_averaged.fill_(count + 1)

    def _average(self, average: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
        if not value.is_floating_point():
            return value
        decay = min(self.decay, (1 + int(updates)) / (10 + int(updates)))
        # What did not change stays as it is, infinite entries of a mask too.
        return torch.where(average == value, value, average.lerp(value.to(average.dtype), 1 - decay))

    def update(self) -> None:
        """Count the weights as they are now."""
        if self.values:
            self._averaged.update_parameters(self._trained)

    def average_buffers(self) -> None:
        """Replace averaged buffers by their mean over the processes; averaged weights are alike in all of them."""
        distributed.average_buffers(
            value for name, value in self.values.items() if not isinstance(self._live[name], nn.Parameter)
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the network the averaged weights for good."""
        for name, value in self.values.items():
            self._live[name].copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            live = self._live[name].detach().clone()
            self._live[name].copy_(value)
            value.copy_(live)
