"""A budget as a user gives it: a share of the prompt, or a number of tokens."""

import math
import numbers

Amount = int | float  # an int is a number of tokens, a float a share


def checked_budget(budget: Amount | None) -> Amount | None:
    """The budget with its kind settled: None, a share in (0, 1] as a float, or a number of tokens above 1 as an int.

    1 and 1.0 both mean all of the prompt; a float above 1 that is whole, as 512.0, is a number of tokens.

    Raises:
        ValueError: anything else.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget is a number, a share like 0.25 or tokens like 512; got {budget!r}.")
    if not 0 < budget < math.inf:
        raise ValueError(
            f"budget is a share of the prompt, above 0 and at most 1, or a number of tokens; got {budget}."
        )
    if budget <= 1:
        return float(budget)
    if budget != int(budget):
        raise ValueError(
            f"budget={budget} is neither a share of the prompt, above 0 and at most 1, nor a whole number of tokens: "
            f"use {budget / 100:g} for {budget:g} %, or {round(budget)} tokens."
        )
    return int(budget)


def read_budget(text: str) -> Amount | None:
    """The budget that a command line names, for `checked_budget`: ".25" and "1" are shares, "512" tokens, "none" is
    None.

    Raises:
        ValueError: what is no number.
    """
    if text.strip().lower() == "none":
        return None
    try:
        number = float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"budget {text!r} is no number: use shares like .25, or tokens like 512.") from None
    return float(number) if number <= 1 else number


def budget_text(budget: Amount | None) -> str:
    """As tables and titles name it: "25 %", "512 tokens", or "no budget"."""
    if budget is None:
        return "no budget"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g} %"


def share_of(budget: Amount | None, length: int) -> float:
    """The share of a row of `length` real tokens that the budget allows: 1 where there is none, or it holds all."""
    if budget is None:
        return 1.0
    return min(1.0, budget / max(length, 1)) if isinstance(budget, int) else budget


def count_of(budget: Amount | None, length: int) -> int:
    """Tokens of a row of `length` real tokens that the budget allows, rounded down."""
    return math.floor(share_of(budget, length) * length + 1e-6)
