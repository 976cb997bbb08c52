"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import Net, expert_states

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["merge", "adapt"])
def test_an_example_runs_and_is_short(code: str) -> None:
    a, b, c, base = expert_states(4)
    stream = torch.randn(2, 5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    names = {"model": Net(), "state_a": a, "state_b": b, "state_c": c, "state_0": base, "stream": stream}
    exec(code, names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    if "logits" in names:
        assert names["logits"].shape == (5, 3)  # type: ignore[attr-defined]
