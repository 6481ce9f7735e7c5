"""How is a record of the cascade's benchmark read? Three lines for people."""

from __future__ import annotations


def line(record: dict) -> str:
    """Three lines for people: the promise, what it saves, what it costs."""
    first, second = record["budgets"]
    at = [f"{share:.1%}" for share in record["answered"]]
    low, high = record["worst_differing_limits"]
    alone = ", ".join(f"{one['budget']} alone {one['right']:.1%}" for one in record["alone"])
    differing = ", ".join(f"{one['budget']} alone {one['differing']:.2%}" for one in record["alone"])
    may = (1 - record["confidence"]) * record["draws"]
    verdict = "kept" if record["kept"] else "BROKEN"
    return (
        f"{first}, {second}, then all {record['prompt_tokens']} keys, risk {record['risk']:.1%}: promise {verdict}: "
        f"above it in {record['broken']} of {record['draws']} draws of {record['calibration_questions']:,} questions "
        f"({may:.3g} expected at most), surely in {record['broken_surely']}\n"
        f"    on {record['judged_questions']:,} unseen questions {record['differing']:.2%} differ from the whole "
        f"context's answer, worst draw {record['worst_differing']:.2%} (95 % limits {low:.2%} to {high:.2%}); "
        f"{differing}; right {record['right']:.1%}, {alone}, whole {record['right_whole']:.1%}\n"
        f"    answered by {first} keys {at[0]}, by {second} {at[1]}, by all {at[2]}; {record['live_tokens']:.1f} keys "
        f"live at an answer, {record['live_tokens'] / record['prompt_tokens']:.2f}x of all; tokens read "
        f"{record['tokens_read']:.2f}x, pairs attended {record['attended']:.2f}x of one dense pass{_pays(record)}"
    )


def _pays(record: dict) -> str:
    return "" if record["attended"] < 1 else ": asking again costs more than small budgets save"
