"""How is a record of the gradients' benchmark read? One line for people."""

from __future__ import annotations


def line(record: dict) -> str:
    """One line for people."""
    rows = f"last {record['queries']} {'query' if record['queries'] == 1 else 'queries'}"
    if record["part"] == "cost":
        low, high = record["ratio_spread"]
        return (
            f"{record['rows']} x {record['length']} tokens, {rows}: forward {record['forward_ms']:.1f} ms, with edge "
            f"gradients {record['with_gradients_ms']:.1f} ms: {record['ratio']:.3f}x, {low:.3f} to {high:.3f} in "
            f"{record['repeats']} rounds (predicted {record['predicted_ratio']:.3f}x)"
        )
    signed, size = record["signed"], record["size"]
    text = (
        f"{record['score']:30} {rows:15} rank correlation with leaving keys out {_of(signed['all'])}  "
        f"by layer {' '.join(format(layer['mean'], '5.2f') for layer in signed['layers'])}  "
        f"of sizes {_of(size['all'])}  {record['context']} keys, {record['windows']} windows"
    )
    if "aim" in record:
        reached = signed["all"]["mean"] >= record["aim"]
        text += f"; the aim of {record['aim']:g} is {'reached' if reached else 'MISSED'}"
    return text


def _of(spread: dict) -> str:
    return f"{spread['mean']:5.2f} ({spread['lowest']:.2f} to {spread['highest']:.2f})"
