"""Everything that is remembered of a session between two utterances, and nothing else.

Letters: L lanes, K convolution width, N state size, E inner width of a Mamba block, F targets
that are fed back: those of utterances. A field that the model does not
use has width 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vaemo import files
from vaemo.errors import StateMismatchError


@dataclasses.dataclass(frozen=True)
class SessionState:
    """Memory of L sessions side by side: fixed size, lane axis first, passed in and returned, never modified.

    `SessionRegressor.fresh_state` makes one. A model accepts only states with its own shapes and fingerprint.

    Attributes:
        conv_tail: Last inputs of every layer's causal convolution, (L, layers, K-1, channels), model dtype.
        ssm: Scan state of every layer, (L, layers, N, E) for Mamba-1, (L, layers, heads, headdim, N) for Mamba-2;
            float32, or float64 in a float64 model.
        hidden: State of every GRU layer, (L, layers, d_model).
        c: Session state c_t after the EMA, (L, d_c).
        last_feedback: Values of the targets that the next step receives, (L, F), on the model's label range.
        last_observed: True where `last_feedback` was observed, not predicted, (L, F).
        n_steps: Utterances seen, (L,), int64; 0 is fresh.
        middle: Middle of the label range, the first feedback of a session.
        fingerprint: Checkpoint that made the state; empty for a model that was not loaded from one.

    Example:
        >>> model = vaemo.SessionRegressor(vaemo.config.ModelConfig(), vaemo.config.UpdaterConfig(), {"speech": 40})
        >>> state = model.fresh_state(2)
        >>> state.n_steps, state.last_feedback.shape
        (tensor([0, 0]), torch.Size([2, 2]))
        >>> state.save("state.safetensors")
        >>> SessionState.load("state.safetensors").lanes
        2
    """

    conv_tail: Tensor
    ssm: Tensor
    hidden: Tensor
    c: Tensor
    last_feedback: Tensor
    last_observed: Tensor
    n_steps: Tensor
    middle: float = 0.5
    fingerprint: str = ""

    @staticmethod
    def fresh(
        lanes: int,
        shapes: dict[str, tuple[int, ...]],
        *,
        middle: float,
        n_fed: int = 2,
        fingerprint: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SessionState:
        """The state before the first utterance.

        Args:
            lanes: Sessions side by side, L.
            shapes: Shape per lane of conv_tail, ssm, hidden and c, as `SessionRegressor.state_shapes` gives it.
            middle: Middle of the label range.
            n_fed: F.
            fingerprint: Checkpoint that the state belongs to.
            dtype: Of the floating-point fields; the scan state has at least float32.
            device: Where the tensors lie.
        """
        zeros = {
            name: torch.zeros(
                (lanes, *shape),
                dtype=torch.promote_types(dtype, torch.float32) if name == "ssm" else dtype,
                device=device,
            )
            for name, shape in shapes.items()
        }
        return SessionState(
            **zeros,
            last_feedback=torch.full((lanes, n_fed), middle, dtype=dtype, device=device),
            last_observed=torch.zeros(lanes, n_fed, dtype=torch.bool, device=device),
            n_steps=torch.zeros(lanes, dtype=torch.int64, device=device),
            middle=middle,
            fingerprint=fingerprint,
        )

    @property
    def lanes(self) -> int:
        """Sessions side by side."""
        return len(self.n_steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes together; the same however many steps were seen."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields by name."""
        return {name: getattr(self, name) for name in TENSOR_FIELDS}

    def map(self, function: Callable[[Tensor], Tensor]) -> SessionState:
        """The state with `function` applied to every tensor."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def reset(self, where: Tensor) -> SessionState:
        """The state with the lanes where `where` (L,), bool, is true as fresh ones, and the others untouched."""
        if where.shape != (self.lanes,) or where.dtype != torch.bool:
            raise StateMismatchError(
                f"reset got {where.dtype} of shape {tuple(where.shape)}; it takes one bool per lane: ({self.lanes},)."
            )

        def cleared(name: str, tensor: Tensor) -> Tensor:
            fresh = self.middle if name == "last_feedback" else 0
            return torch.where(where.view(-1, *[1] * (tensor.dim() - 1)), torch.full_like(tensor, fresh), tensor)

        changed: dict[str, Any] = {name: cleared(name, tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def select(self, lanes: Tensor | slice | list[int]) -> SessionState:
        """The state of some lanes, in the order given."""
        return self.map(lambda tensor: tensor[lanes])

    @staticmethod
    def stack(states: Sequence[SessionState]) -> SessionState:
        """The lanes of several states as one state.

        Raises:
            StateMismatchError: if the states come from different models.
        """
        first = states[0]
        for other in states[1:]:
            first.check_same_model(other)
        joined: dict[str, Any] = {name: torch.cat([getattr(state, name) for state in states]) for name in TENSOR_FIELDS}
        return dataclasses.replace(first, **joined)

    def check_same_model(self, other: SessionState) -> None:
        """Raise StateMismatchError unless `other` has this state's fingerprint, shapes per lane and dtypes."""
        if self.fingerprint != other.fingerprint:
            raise StateMismatchError(
                f"a session state belongs to the checkpoint '{other.fingerprint[:12] or 'none'}', not to "
                f"'{self.fingerprint[:12] or 'none'}'. Continue it with its own checkpoint, or start afresh."
            )
        for name, tensor in self.tensors().items():
            found = getattr(other, name)
            if found.shape[1:] != tensor.shape[1:] or found.dtype != tensor.dtype:
                raise StateMismatchError(
                    f"the session state's {name} is {found.dtype} of {tuple(found.shape[1:])} per lane; this model has "
                    f"{tensor.dtype} of {tuple(tensor.shape[1:])}. Continue the state with the model that made it."
                )

    def detach(self) -> SessionState:
        """The state cut off from the graph that made it."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> SessionState:
        """The state on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, with the fingerprint of its checkpoint."""
        said = {"fingerprint": self.fingerprint, "middle": repr(self.middle)}
        files.write_safetensors(path, self.tensors(), said)

    @staticmethod
    def load(path: str | Path, *, fingerprint: str | None = None) -> SessionState:
        """The state that `save` wrote.

        Args:
            path: A safetensors file.
            fingerprint: Checkpoint that it must belong to; None leaves the check to the model that receives it.

        Raises:
            StateMismatchError: if the file is not a session state, is not whole, or belongs to another checkpoint.
        """
        tensors, metadata = read_tensors(path, "session state")
        if set(tensors) != set(TENSOR_FIELDS) or not {"fingerprint", "middle"} <= set(metadata):
            raise StateMismatchError(
                f"session state '{path}' holds {', '.join(sorted(tensors)) or 'nothing'}; "
                f"a whole one holds {', '.join(sorted(TENSOR_FIELDS))}, its fingerprint and the label range's middle."
            )
        if fingerprint is not None and metadata["fingerprint"] != fingerprint:
            raise StateMismatchError(
                f"session state '{path}' belongs to the checkpoint '{metadata['fingerprint'][:12] or 'none'}', not to "
                f"'{fingerprint[:12] or 'none'}'. Continue it with its own checkpoint, or start afresh."
            )
        return SessionState(**tensors, middle=float(metadata["middle"]), fingerprint=metadata["fingerprint"])


TENSOR_FIELDS = tuple(
    field.name for field in dataclasses.fields(SessionState) if field.name not in {"middle", "fingerprint"}
)


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        StateMismatchError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateMismatchError(f"{what} '{path}' cannot be read: {error}") from None
