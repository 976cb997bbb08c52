"""Static merges beside mergekit and FusionBench: CPU time of their rule over ours, in one process, one thread.

    PYTHONPATH=/where/they/are python benchmarks/others.py --model vit_base_patch32_224

Both libraries are asked for nothing but the arithmetic: tensors are in memory, and no file is read or written. What is not
installed is left out. Ours merges one row of all parameters, theirs tensor by tensor, or as flat vectors where their own code
makes these. Options are the same where both have them: TIES keeps 0.2, DARE 0.5, DELLA 0.5 -/+ 0.1, Breadcrumbs 0.14.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module as module
from typing import Annotated, Any

import torch
import typer
from merging import a_bank
from ratios import seconds

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import Static, load_method

State = dict[str, torch.Tensor]
Work = Callable[[list[State], State], object]


def of_mergekit() -> dict[str, Work]:
    """Their rules by our names."""
    gta, TensorGroup = (
        module("mergekit.merge_methods.generalized_task_arithmetic"),
        module("mergekit.merge_methods.base").TensorGroup,
    )
    karcher_merge_tensors = module("mergekit.merge_methods.karcher").karcher_merge_tensors
    model_stock_merge_method = module("mergekit.merge_methods.model_stock").model_stock_merge_method
    slerp = module("mergekit.merge_methods.slerp").slerp

    def each(rule: Callable[[list[torch.Tensor], torch.Tensor], object]) -> Work:
        return lambda states, base: [rule([state[name] for state in states], start) for name, start in base.items()]

    def group(tensors: list[torch.Tensor], base: torch.Tensor) -> Any:
        return TensorGroup.from_tensors([base, *tensors], base_index=0)

    def arithmetic(consensus: bool, sparse: str | None, **given: float) -> Work:
        rule = gta.GeneralizedTaskArithmeticMerge(
            consensus_method=gta.ConsensusMethod.sum if consensus else None,
            sparsification_method=gta.SparsificationMethod(sparse) if sparse else None,
            default_normalize=False,
            default_rescale=False,
            method_name="",
            method_pretty_name=None,
            method_reference_url=None,
        )

        def one(tensors: list[torch.Tensor], base: torch.Tensor) -> object:
            every = {key: dict.fromkeys(range(len(tensors) + 1), value) for key, value in ({"weight": 0.3} | given).items()}
            return rule.merge_group(
                group(tensors, base), **every, **{"int8_mask": False, "normalize": consensus, "rescale": False, "lambda": 1.0}
            )

        return each(one)

    return {
        "mean": each(lambda tensors, _: sum(tensors) / len(tensors)),
        "slerp of two": each(lambda tensors, _: slerp(torch.full((1,), 0.5), tensors[0][None], tensors[1][None])),
        "slerp": each(lambda tensors, _: karcher_merge_tensors(tensors, [1 / len(tensors)] * len(tensors))),
        "model_stock": each(lambda tensors, base: model_stock_merge_method.merge_group(group(tensors, base), filter_wise=False)),
        "task_arithmetic": arithmetic(False, None),
        "ties": arithmetic(True, "magnitude", density=0.2),
        "dare": arithmetic(False, "random", density=0.5),
        "breadcrumbs": arithmetic(False, "magnitude_outliers", density=0.14, gamma=0.01),
        "della": arithmetic(True, "della_magprune", density=0.5, epsilon=0.1),
    }


def of_fusion_bench() -> dict[str, Work]:
    """Their rules by our names."""
    module_random_drop_ = module("fusion_bench.method.dare.utils").module_random_drop_
    simple_average = module("fusion_bench.method.simple_average").simple_average
    slerp_on_state_dicts = module("fusion_bench.method.slerp.slerp").slerp_on_state_dicts
    utilities, states_of = (
        module("fusion_bench.method.ties_merging.ties_merging_utils"),
        module("fusion_bench.utils.state_dict_arithmetic"),
    )

    def summed(states: list[State], base: State, drop: float = 0) -> object:
        total: Any = None
        for state in states:
            tau = states_of.state_dict_sub(state, base)
            if drop:
                module_random_drop_(tau, drop, rescale=True)
            total = tau if total is None else states_of.state_dict_add(total, tau)
        return states_of.state_dict_add(base, states_of.state_dict_mul(total, 0.3))

    def ties(states: list[State], base: State) -> object:
        start = utilities.state_dict_to_vector(base)
        taus = torch.stack([utilities.state_dict_to_vector(state) for state in states]) - start
        with contextlib.redirect_stdout(io.StringIO()):
            return start + 0.3 * utilities.ties_merging(taus, reset_thresh=20, merge_func="dis-mean")

    return {
        "mean": lambda states, _: simple_average(states),
        "slerp of two": lambda states, _: slerp_on_state_dicts(0.5, states[0], states[1]),
        "task_arithmetic": summed,
        "ties": ties,
        "dare": lambda states, base: summed(states, base, 0.5),
    }


def ours(name: str, bank: Bank, two: Bank) -> Callable[[], object]:
    """Our rule of that name."""
    rule = load_method("slerp" if name == "slerp of two" else name)
    assert isinstance(rule, Static)
    return lambda: rule.merge(two if name == "slerp of two" else bank)


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="a model of timm")] = "vit_tiny_patch16_224",
    repeats: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Print a table of ratios: above 1 we are faster."""
    torch.set_num_threads(1)
    bank = a_bank(model, 4)
    names = list(bank.shapes)
    *states, base = ({name: bank.state_dict(row)[name] for name in names} for row in bank.rows)
    matrices = [
        {name: value.flatten(0 if len(value) == 1 else 1) if value.ndim > 1 else value for name, value in one.items()}
        for one in (*states, base)
    ]  # mergekit's DELLA ranks along the second axis, and fails where it has one entry
    two = Bank.of(bank.model, states[:2], base)
    print(f"torch {torch.__version__}, 1 thread, {model}: {bank.P / 1e6:.1f} M parameters, K = 4, {repeats} repeats")
    for library, rules in (("mergekit", of_mergekit), ("FusionBench", of_fusion_bench)):
        try:
            found = rules()
        except ImportError as error:
            print(f"{library}: not measured ({error})")
            continue
        for name, theirs in found.items():
            mine, theirs_ = ours(name, bank, two), partial(theirs, matrices[:-1], matrices[-1])
            mine()
            theirs_()
            ratios = []
            for _ in range(repeats):
                before, taken, after = seconds(mine), seconds(theirs_), seconds(mine)
                ratios.append(2 * taken / (before + after))
            print(f"{library:12} {name:16} {statistics.median(ratios):6.2f} times ours", flush=True)


if __name__ == "__main__":
    typer.run(main)
