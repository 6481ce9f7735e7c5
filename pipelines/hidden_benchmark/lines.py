"""How does a person read the records? One line each."""

from __future__ import annotations

ROUNDING = 1e-6
"""Of a mean in float32."""


def data(record: dict) -> str:
    """What is classified by what, and titles above the lines on accuracy."""
    rows, short = record["rows"], sum(record["left_out"].values())
    tags = record["task"] == "entities"
    kinds, gone = ("tags", "longer sentences") if tags else ("classes", "shorter texts")
    joined = (
        "sentences are joined into rows; each in a short row of its own, they would cost dense less\n" if tags else ""
    )
    measure = f"{'F1':>6}  {'words':>6}" if tags else f"{'right':>6}"
    return (
        f"{len(record['labels'])} {kinds}, {rows['train']} rows to train on and {rows[record['judged_on']]} of the "
        f"{record['judged_on']} split, {record['tokens']} tokens each; {short} {gone} left out; always the most "
        f"frequent {'tag' if tags else 'class'}: {record['most_frequent']:.1%}\n"
        f"{joined}BERT, {record['parameters'] / 1e6:.1f} M parameters; from scratch {record['base_steps']} steps, then "
        f"{record['steps']} of {record['batch']} rows for each method\n"
        f"{'method':<22} {measure}  {'points to dense, 95 %':<24} {'FLOPs':>6}  tokens by layer"
    )


def accuracy(record: dict) -> str:
    """One method's accuracy beside dense."""
    beside = "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * record[name] for name in ("against_dense", "against_dense_low", "against_dense_high"))
    )
    kept = " ".join(map(str, record["kept"]))
    right = f"{record['f1']:>6.1%}  {record['accuracy']:>6.1%}" if "f1" in record else f"{record['accuracy']:>6.1%}"
    return f"{record['method']:<22} {right}  {beside:<24} {record['flops_of_dense']:>5.2f}x  {kept}"


def unlearned(dense: dict, data: dict) -> str | None:
    """What to say where the dense model has learned nothing that could be lost; None where it has."""
    if dense["f1"] > 0 if "f1" in dense else dense["accuracy"] > data["most_frequent"] + ROUNDING:
        return None
    does = "finds no name" if "f1" in dense else "is no better than always saying the most frequent class"
    return f"the dense model {does}: nothing here says what pruning costs; raise hidden.base_steps or give more texts"


def prefill(record: dict) -> str:
    """One method's time at one batch."""
    low, high = record["speedup_spread"]
    fastest, slowest = record["prefill_ms_spread"]
    return (
        f"batch {record['batch']:>3}  {record['method']:<22} {record['prefill_ms']:>8.1f} ms "
        f"({fastest:.1f} to {slowest:.1f})  {record['speedup']:.2f}x ({low:.2f} to {high:.2f}) as fast as dense in "
        f"{record['rounds']} rounds; deciding {record['deciding_ms']:.2f} ms, {record['deciding_share']:.1%}"
    )
