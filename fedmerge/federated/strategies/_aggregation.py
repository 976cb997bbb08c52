"""A strategy of Flower's Message API on uploads that have passed the gate: what it would send, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import SiteError
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.statistics._base import State
from fedmerge.federated.strategies._base import Strategy

MEMORY = ("m_t", "v_t", "momentum_vector")
"""What Flower's strategies keep from round to round, beside theta^r itself."""


class Aggregation:
    """One global model in the making. theta_0: its layout, which every result is brought back to.

    Integers stay those of theta^r: nothing trains them, and Flower would average them as floats. So do tensors that no hospital has
    changed, such as the statistics of BatchNorm: their mean differs by rounding, and Adam divides by how much.
    """

    def __init__(self, strategy: Strategy, theta_0: Mapping[str, Tensor]) -> None:
        self.strategy, self.layout = strategy, theta_0
        with _of_some_run():
            self.server = strategy.server()

    def round(self, number: int, theta: State, uploads: Sequence[Upload]) -> State:
        """theta^{r+1} from theta^r and what hospitals have sent, in the order given: sums depend on it. number: r, from 1.

        Raises SiteError if the strategy can make nothing of so few.
        """
        from flwr.app import ArrayRecord, ConfigRecord
        from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies

        if not uploads:  # Flower would wait for one for ever
            raise SiteError(f"round {number}: found no answer of any hospital; expected at least one. Their logs say why")
        nodes, out = _Nodes(len(uploads)), {name: theta[name] for name in self.layout}  # some strategies go by the order of arrays
        try:
            with _of_some_run(), np.errstate(over="ignore", invalid="ignore"):  # what comes out is checked
                list(self.server.configure_train(number, ArrayRecord(out), ConfigRecord({}), nodes))
                arrays, _ = self.server.aggregate_train(number, [self._message(upload) for upload in uploads])
        except (AggregationError, InconsistentMessageReplies, ValueError) as error:
            raise SiteError(
                f"round {number}: found {len(uploads)} answers; expected as many as the strategy needs: {error}"
            ) from None
        assert arrays is not None
        found = {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}
        if broken := [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]:
            mend = f". Lower {self.strategy.own_key}" if self.strategy.own_key else ""
            found_in = f"found NaN or infinity in {broken[0]} of the global model"
            raise SiteError(f"round {number}: {found_in}; expected finite numbers{mend}")
        return {
            name: found[name].reshape(like.shape).to(like.dtype) if self._trained(name, theta, uploads) else theta[name]
            for name, like in self.layout.items()
        }

    def _trained(self, name: str, theta: State, uploads: Sequence[Upload]) -> bool:
        """Whether anybody has moved this tensor away from theta_0, now or before."""
        first = self.layout[name]
        seen = (theta[name], *(upload.weights[name] for upload in uploads))
        return first.is_floating_point() and not all(torch.equal(tensor, first) for tensor in seen)

    def memory(self) -> State:
        """What the server remembers, as tensors, for a snapshot."""
        kept = {name: _flat(getattr(self.server, name, None)) for name in MEMORY}
        return {f"{name}.{key}": torch.from_numpy(np.array(array)) for name, of in kept.items() for key, array in of.items()}

    def recall(self, memory: State) -> None:
        """Go on from a snapshot's memory."""
        for name in MEMORY:
            found = {key.removeprefix(f"{name}."): t.numpy() for key, t in memory.items() if key.startswith(f"{name}.")}
            if found:
                by_number = all(key.isdigit() for key in found)
                setattr(self.server, name, [found[str(number)] for number in range(len(found))] if by_number else found)

    def _message(self, upload: Upload) -> Any:
        from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

        told = MetricRecord({"num-examples": upload.scalars["n"], "steps": upload.scalars["steps"]})
        weights = ArrayRecord({name: upload.weights[name] for name in self.layout})
        content = RecordDict({"arrays": weights, "metrics": told})
        for kind, state in upload.statistics.items():
            content[kind] = ArrayRecord(dict(state))
        return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


@contextmanager
def _of_some_run() -> Iterator[None]:
    """Flower's messages say of which run they are; in the plain loop there is none. Nor does it log: our progress says as much."""
    from flwr.common.logger import FLOWER_LOGGER
    from flwr.supercore.task_identity import TaskIdentity

    level = FLOWER_LOGGER.level
    FLOWER_LOGGER.setLevel("ERROR")

    names = [name for name in ("_task_id", "_run_id", "_node_id") if getattr(TaskIdentity, name) is None]
    for name in names:
        setattr(TaskIdentity, name, 1)
    try:
        yield
    finally:
        for name in names:
            setattr(TaskIdentity, name, None)
        FLOWER_LOGGER.setLevel(level)


class _Nodes:
    """The part of Flower's grid that a strategy looks at: the hospitals of this round, who have been drawn and asked."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        """One number for each."""
        return list(range(1, self.count + 1))


def _flat(value: Any) -> dict[str, Any]:
    """Arrays by name, or by number where Flower keeps a list."""
    if value is None:
        return {}
    return {str(key): array for key, array in (enumerate(value) if isinstance(value, list) else value.items())}
