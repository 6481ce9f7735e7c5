"""How fast does a saved model decode, and how much memory does its cache take? Against itself without pruning.

target=kernels times one attention layer against its peers instead (pipelines.kernel_benchmark), target=generation whole
models that write text, beside other engines (pipelines.generation_benchmark), target=feedback what the loops that
correct a pruned model buy (pipelines.feedback_benchmark), target=gradients what pruning by gradients is worth and costs
(pipelines.gradient_benchmark), target=hidden how long texts are classified when tokens leave the residual stream
(pipelines.hidden_benchmark), target=cascade whether asking with few keys first meets the risk that it states
(pipelines.cascade_benchmark).
"""

from __future__ import annotations

from pathlib import Path

from ctxprune import checkpoint
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.packing import pack
from pipelines import (
    cascade_benchmark,
    feedback_benchmark,
    generation_benchmark,
    gradient_benchmark,
    hidden_benchmark,
    kernel_benchmark,
    output,
)
from pipelines.config import Config
from pipelines.decoding_benchmark import TEXT, measure, text_of
from pipelines.evaluate import as_trained, corpus_for, refuse_changed
from pipelines.machine import device, machine, versions
from pipelines.models import refuse_long
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """The verb: one record on stdout, or many for the kernels and for generation."""
    if config.benchmark.target == "kernels":
        return kernel_benchmark.main(config)
    if config.benchmark.target == "generation":
        return generation_benchmark.main(config, overrides)
    if config.benchmark.target == "gradients":
        return gradient_benchmark.main(config, overrides)
    if config.benchmark.target == "hidden":
        return hidden_benchmark.main(config)
    if config.benchmark.target == "cascade":
        return cascade_benchmark.main(config)
    folder = model_folder(Path(config.generate.checkpoint))
    config = as_trained(config, overrides, folder)
    with Bars() as bars:
        data = corpus_for(config, folder, bars)
        if config.benchmark.target == "feedback":
            refuse_changed(data, folder, overrides)
            return _feedback(config, folder, data)
        with bars.task("benchmark (repeats)", config.benchmark.repeats) as advance:
            speed = measure(folder, data, config.benchmark, advance)
    settings = vars(config.benchmark)
    record = {"checkpoint": str(folder), **speed, "benchmark": settings, "machine": machine(), "versions": versions()}
    text = (
        f"{folder}: batch {settings['batch']}, prompt {settings['prompt']}, {settings['new_tokens']} tokens decoded, "
        f"median of {settings['repeats']}\n"
        f"  pruned  {speed['tokens_per_second']:10.1f} tokens/s  {speed['ms_per_token']:8.3f} ms per step  "
        f"{speed['cache_bytes']:12,} cache bytes live\n"
        f"  dense   {speed['tokens_per_second_dense']:10.1f} tokens/s  {speed['ms_per_token_dense']:8.3f} ms per step  "
        f"{speed['cache_bytes_dense']:12,} cache bytes\n"
        f"  ratio   {speed['tokens_per_second'] / speed['tokens_per_second_dense']:10.2f} x speed     "
        f"{speed['cache_bytes'] / speed['cache_bytes_dense']:20.3f} x cache"
    )
    output.emit(record, config.format, text)
    return 0


def _feedback(config: Config, folder: Path, data: Path) -> int:
    settings = config.benchmark
    about = {"checkpoint": folder.name, "benchmark": vars(settings), "feedback": vars(config.feedback)}
    about |= {"machine": machine(), "versions": versions()}
    ids, asked = text_of(data, settings), config.feedback
    if "alarm" in asked.loops and settings.new_tokens < 2:
        raise UserError("the alarm is measured from the second new token on: give benchmark.new_tokens=2 or more")
    model = checkpoint.load(folder, device=device())
    refuse_long(model, settings.prompt + settings.new_tokens, TEXT)
    if asked.packed:
        pack(model)
    how = asked.loops, asked.draft, asked.temperature
    for record in feedback_benchmark.records(model, ids, settings.prompt, settings.repeats, *how):
        output.emit(record | about, config.format, feedback_benchmark.line(record))
    return 0
